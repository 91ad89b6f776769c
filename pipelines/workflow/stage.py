"""A stage, a node of a graph of stages, and what a stage may touch while it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection
from pipelines.cluster.resources import Workers
from pipelines.tracking.run import RunHandle, TrackingConfig
from pipelines.workflow.progress import Bar
from pipelines.workflow.summary import Summary
from pipelines.workflow.work import Done, Foreseen, Prices

SCRATCH = "fresh-"  # prefix of the names of stages that compute existing artifacts again
MAIN = "main"  # what a run's own model is called beside its variants


@dataclass(frozen=True)
class Input:
    """What a stage reads under one name.

    stages: names of the stages that can make it; the first one that is part of the run does.
    is_needed: for a config of the stage, given the run's sections by stage name as attributes; the default is always.
    is_per_variant: also one of every variant, under the name `<name>@<variant>`.
    is_per_protocol: also one of every protocol, under the name `<name>/<protocol>` or `<name>/<protocol>@<variant>`.
    is_in_key: whether the artifact decides what the stage makes. If it only shows how the work goes, the manifest does not name it.
    """

    stages: tuple[str, ...]
    is_needed: Callable[[Any, Any], bool] = lambda config, run: True
    is_per_variant: bool = False
    is_per_protocol: bool = False
    is_in_key: bool = True


def execution_of(config: Any) -> Workers | None:
    workers: Workers | None = getattr(config, "execution", None)
    return workers


@dataclass(frozen=True)
class Stage:
    """Everything that is known of a stage, so that no other module needs to ask for it by name.

    version: raised whenever the code of the stage changes its result; part of every key.
    run: `(config, inputs, context) -> StageResult`.
    reads: what it reads, by name.
    config: the class of its config. The run gives `dataset`, `seed` and `s3` to a config that has such a field and leaves it out.
    summary: the class of what it tells other stages.
    foresee: `(config, summaries of its inputs) -> Foreseen`: what it will make and the work it takes, for predictions. Raises
        UnforeseeableError if that is not known. None: nothing of it, and of stages that read it, is predicted.
    kind: what its time is counted as, one of costs.KINDS; None counts it as other.
    is_counted_if_imported: whether an imported artifact also took time here.
    files: patterns of the names of its files and records.
    external: fields of the config that name files outside the store.
    workers: what a config asks the cluster for; None if it asks for nothing.
    imports: modules that Ray's tasks of this stage import, and that take long. A cluster of one machine imports them ahead.
    does_without_ray: whether `run` also works in the process of the driver, for a run so small that starting Ray would take longer.
    describe: the sentence that lists an artifact; "" lists its first metrics.
    reevaluation: what happens to the artifact when a registered model is evaluated again. "kept": it is reused, because it is part
        of the model. "conditions": it is reused, unless the request changes what the model is compared with. "measured": it is
        computed again.
    shares_work_on: the input that two nodes of the stage share if the second takes over work of the first. Such nodes run one after
        the other.
    accept: raises ValueError if an existing artifact does not meet a limit in a config that is not part of the key.
    title: of a config, the name by which people know its data. It is part of no key, so that it can be corrected, and it is shown
        for all that is made from the artifact. The default passes on that of the first input which has one; None ends it there.
    has_curves: whether its tracking run has curves. Then single values are tags of the run: as metrics they would be charts of one
        point among the curves.
    publish: makes an artifact known to others, given its inputs. It is called for reused artifacts, too, so repeating it must be
        harmless. An error in it is logged as a warning.
    """

    name: str
    version: int
    run: Callable[[Any, Mapping[str, Manifest], StageContext], StageResult]
    _: KW_ONLY
    reads: Mapping[str, Input] = field(default_factory=dict)
    config: type | None = None
    summary: type[Summary] = Summary
    foresee: Callable[[Any, Mapping[str, Any]], Foreseen] | None = None
    kind: str | None = None
    is_counted_if_imported: bool = False
    files: tuple[str, ...] = ()
    external: tuple[str, ...] = ()
    workers: Callable[[Any], Workers | None] = execution_of
    imports: tuple[str, ...] = ()
    does_without_ray: bool = False
    describe: Callable[[Manifest], str] = lambda manifest: ""
    reevaluation: Literal["kept", "conditions", "measured"] = "kept"
    shares_work_on: str | None = None
    accept: Callable[[Any, Manifest], None] | None = None
    title: Callable[[Any], str | None] | None = None
    has_curves: bool = False
    publish: Callable[[Manifest, Mapping[str, Manifest], PublishContext], None] | None = None

    def is_in_key(self, name: str) -> bool:
        """Whether an input is part of the stage's key. name: as the stage reads it, also of a variant or protocol."""
        read = self.reads.get(name.partition("@")[0].partition("/")[0])
        return read is None or read.is_in_key


@dataclass(frozen=True)
class Node:
    """A stage as part of a pipeline. inputs: name of the input -> id of the node that makes it.

    identity: of the config, if it is known already. The identity of a dataset requires a listing of all its files.
    """

    id: str
    stage: Stage
    config: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    identity: Any = None


def titles_of(nodes: Iterable[Node]) -> dict[str, str]:
    """The names of the data that nodes make or were made from, by the ids of the nodes that have one; see Stage.title."""
    found: dict[str, str] = {}
    for node in nodes:
        if node.stage.title is not None:
            title = node.stage.title(node.config)
        else:
            title = next((found[id] for id in node.inputs.values() if id in found), None)
        found |= {} if title is None else {node.id: title}
    return found


WorkersT = TypeVar("WorkersT", bound=Workers)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage made: `files` are the artifact, `records` describe how it was made.

    worker_seconds: summed over workers.   device_seconds: of accelerators.   work: in the order in which it was done.
    """

    files: Sequence[FileRecord]
    records: Sequence[FileRecord] = ()
    summary: Summary | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    worker_seconds: float = 0.0
    device_seconds: float = 0.0
    work: Sequence[Done] = ()


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker of a stage may use: the store under the stage's own key, and its tracking run."""

    stage: str
    key: str
    store: ArtifactStore
    run: RunHandle

    def write(self, name: str, write: Callable[[Path], object]) -> FileRecord:
        """Store the file that `write` creates at the path it is given."""
        with tempfile.TemporaryDirectory(prefix=f"enat-{self.stage}-") as folder:
            path = Path(folder) / name
            write(path)
            return self.store.put_file(self.stage, self.key, name, path)


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """A later node of the same stage that is to be computed in this run, whose inputs exist already."""

    config: Any
    inputs: Mapping[str, Manifest]
    key: str


@dataclass(frozen=True, kw_only=True)
class StageContext(WorkerContext):
    """What the driver of a stage may use: also the terminal. `connect` connects to Ray; a stage that needs Ray calls it or
    connect_for first.

    node: its id in the pipeline, such as evaluate@variant.   made: artifacts of the run so far, by the ids of their nodes.
    siblings: for which a stage may leave parts, if that saves work.
    spare_cpus: CPUs that a stage may use beside its workers, for tasks that feed them. None: all that the cluster has.
    is_alone: whether no other stage of the run is computed meanwhile.
    """

    console: Console
    connect: Callable[[], None]
    node: str = ""
    made: Mapping[str, Manifest] = field(default_factory=dict)
    siblings: Sequence[Sibling] = ()
    spare_cpus: int | None = None
    is_alone: bool = True

    def connect_for(self, workers: WorkersT, section: str) -> WorkersT:
        """Connect to Ray, and return the workers. Raises ValueError if the cluster does not have the resources that they request.

        section: of the config that sets them. In a run so small that it does without Ray, this process is the only worker.
        """
        self.connect()
        if not connection.is_connected():
            return workers.together()
        connection.require(workers, section)
        return workers

    def bar(self, total: int, unit: str) -> Bar:
        return Bar(self.console, self.node or self.stage, total, unit)

    def of(self, sibling: Sibling) -> StageContext:
        """The same under the key of a sibling."""
        return replace(self, key=sibling.key, siblings=())

    def for_workers(self) -> WorkerContext:
        return WorkerContext(stage=self.stage, key=self.key, store=self.store, run=self.run)


@dataclass(frozen=True, kw_only=True)
class PublishContext:
    """What `publish` may use. run: that made the artifact, in tracking.   node: its id in the pipeline, such as evaluate@variant.

    is_recorded: whether `run` is of an earlier command and has all that is known of the artifact.
    model_run: the tracking run of the model, which contains those of its stages, or links to them.   stages: all stages by name.
    titles: by the names of inputs, and of the artifact itself under "", what their data is called now. A reused artifact records
        what it was called when it was made.
    """

    store: ArtifactStore
    run: RunHandle
    tracking: TrackingConfig
    node: str
    prices: Prices | None = None
    stages: Mapping[str, Stage] = field(default_factory=dict)
    model_run: RunHandle | None = None
    is_recorded: bool = False
    titles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan. key: None while an input does not exist yet, because keys contain the digests of inputs."""

    node: Node
    key: str | None
    manifest: Manifest | None
    parts_done: int = 0

    @property
    def is_reused(self) -> bool:
        return self.manifest is not None


@dataclass(frozen=True)
class FinishedStage:
    """One line of a closing summary. seconds: of this run; the cost of a reused artifact is in its manifest."""

    node: Node
    manifest: Manifest
    is_reused: bool
    seconds: float


class StageError(RuntimeError):
    """A stage failed. What it has committed stays, and the same command continues from there."""
