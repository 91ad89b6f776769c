"""Write runs, metrics, images and registered models to MLflow. search.py reads them.

Tracking is an observer. If its server is down, slow, or refuses a value, one warning is shown and the work continues. What a server
that is down misses is sent when it answers, or by the next command that uses the same artifacts. Workers
hold a `RunHandle` (rank 0 of training logs through one), which opens its own client in the process that uses it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pipelines.cluster import process
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import models
from pipelines.tracking.client import client_of, quiet
from pipelines.tracking.errors import NO_ANSWER, AccessProblem, access_problem, first_line, is_away
from pipelines.tracking.models import Checkpoint, TrackedModel
from pipelines.tracking.registry import (
    DIGEST_TAG,
    TAG_LIMIT,
    as_model_version,
    create_once,
    first_versions,
    model_name,
    move_alias,
    set_version_tags,
    shortened,
    version_of,
)

_log = logging.getLogger(__name__)
_PARAMETER_LIMIT = 6000  # MLflow cuts longer values silently
_DATASET_NAME_LIMIT = 500  # of MLflow
_DATASET_DIGEST_LETTERS = 12  # MLflow accepts 36, and cuts off the name for them
_ILLEGAL = re.compile(r"[^\w\-. /]")
_PLACE = re.compile(r"(https?|(sqlite|postgresql|mysql|mssql)(\+\w+)?)://|databricks|uc:")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
_RETRY_SECONDS = 60.0  # between attempts to reach a server that does not answer; each may take 20
_START_TAG = "enat.start"  # identifies a run before its server has named it
_MODEL_FOLDER = "model"  # of a run's files, the source of the version that the run registers
HOST_TAG, PROCESS_TAG = "enat.host", "enat.process"  # where a run's command runs
_ERROR_TAG, ERROR_FILE = "enat.error", "error.txt"  # of a failed run
_ERROR_LINES = 60  # of a traceback
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow shows views of training instead of those of agents
NOTE = "mlflow.note.content"  # MLflow shows it as the description of a run
_sending = threading.RLock()  # stages that run side by side share an outbox, and MLflow's settings are those of the process
OUT_OF_ORDER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "BAD_REQUEST")  # no answer, or a broken database; others: a refusal


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs, metrics and models are recorded."""

    uri: str | None = None
    """Tracking store of MLflow: http://HOST:5000 or a database. Null takes MLFLOW_TRACKING_URI, or an SQLite file in the workspace.
    """
    experiment: str = "enat"
    """Experiment of MLflow."""
    enabled: bool = True
    """Record runs in MLflow."""
    model_alias: str | None = "newest"
    """Alias that moves to the newest version of a registered model. Null sets none. Other aliases are not changed."""
    system_metrics: bool = False
    """Log CPU, memory, disk and network of the machine of the first training worker to the run of the training, every ten seconds;
    also its GPUs if the package nvidia-ml-py is installed there."""

    def __post_init__(self) -> None:
        alias = self.model_alias
        if alias is None:
            return
        if not re.fullmatch(r"[\w-]{1,255}", alias):
            raise ValueError(f"model_alias is {alias!r}; it must be 1 to 255 letters, digits, '_' and '-', or null for no alias")
        if _RESERVED_ALIAS.fullmatch(alias):
            raise ValueError(f"model_alias is {alias!r}, which MLflow reserves; choose another one, such as newest")


def resolve_uri(config: TrackingConfig, beside: Path) -> str:
    """The tracking URI. Raises ValueError if MLflow could not use it as the address of a server or database."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(beside / 'mlflow.db').absolute()}"
    # Installed packages register the schemes of further servers with MLflow, such as SageMaker's arn:.
    plugins = tuple(f"{entry.name}:" for entry in entry_points(group="mlflow.tracking_store"))
    if config.enabled and not _PLACE.match(uri) and not uri.startswith(plugins):
        where = "the tracking URI" if config.uri else "MLFLOW_TRACKING_URI"
        raise ValueError(f"{where} is {without_credentials(uri)}; write http://HOST:5000, sqlite:///FILE or another database URL")
    return uri


@dataclass(frozen=True, kw_only=True)
class TrackedInput:
    """Data that a run or a model read. digest: of the content.   source: where it is.   context: what it was read as."""

    name: str
    digest: str
    source: str
    context: str


@dataclass
class _Outbox:
    """What one process has not sent yet, in order: of all runs that it records, because parents are made before their stages.

    is_refused: the server answers, and does not accept what is sent.
    """

    waiting: deque[Callable[[Any], Any]] = field(default_factory=deque)
    tried: float = 0.0
    is_refused: bool = False


@dataclass
class RunHandle:
    """One MLflow run. If it has no run_id and is not to be made yet, every method does nothing.

    While the server does not answer, what is logged waits in memory and is sent in order once it answers: MLflow keeps one of
    equal metrics, parameters and tags, so that what arrived although its answer was lost is not recorded twice.
    """

    uri: str
    run_id: str | None
    parent: RunHandle | None = field(default=None, repr=False)
    _is_planned: bool = field(default=False, repr=False)
    _is_first: bool = field(default=True, repr=False)  # of its command
    has_system_metrics: bool = field(default=False, repr=False)  # whether those of a machine that works on it are asked for
    _outbox: _Outbox = field(default_factory=_Outbox, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For workers: what waits here is sent from here. A run that is not made yet has its metrics logged by the driver."""
        return {**self.__dict__, "parent": None, "_is_planned": False, "_outbox": _Outbox(is_refused=self._outbox.is_refused)}

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step. Names are made legal, and values that are not finite are left out."""
        self._log(metrics=_metrics((name, value, step) for name, value in metrics.items()))

    def log_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log what an earlier run measured before this run continued from it. rows: each with its "step"."""
        self._log(metrics=_metrics(_values_of(rows)))

    def log_missing_history(self, rows: Sequence[Mapping[str, float]], key: str) -> None:
        """Log those rows that this run misses, unless another run with this enat.key has all: the server may have been away."""

        def log(client: Any) -> None:
            experiment = client.get_run(self.run_id).info.experiment_id
            runs = client.search_runs([experiment], f"tags.`enat.key` = '{key}'", order_by=["attributes.start_time ASC"])
            own, *others = sorted(runs, key=lambda run: run.info.run_id != self.run_id)
            missing = rows
            for run in (own, *others):
                logged = {point.step for point in client.get_metric_history(run.info.run_id, "loss")}
                if all(row["step"] in logged for row in rows):
                    return
                missing = [row for row in rows if row["step"] not in logged] if run is own else missing
            client.log_batch(self.run_id, metrics=_metrics(_values_of(missing)), synchronous=True)

        if rows:
            self._do(log)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log a nested configuration as dotted parameters."""
        from mlflow.entities import Param

        self._log(params=[Param(_ILLEGAL.sub("_", name), str(value)[:_PARAMETER_LIMIT]) for name, value in _flatten(values)])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log(tags=[RunTag(name, value[:TAG_LIMIT]) for name, value in tags.items()])

    def log_inputs(self, inputs: Sequence[TrackedInput]) -> None:
        """Log data by its digest, which MLflow shows beside the run and by which it finds runs on the same data."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        found = [
            DatasetInput(
                Dataset(
                    name=_dataset_name(each),
                    digest=_dataset_digest(each),
                    source_type="s3" if each.source.startswith("s3://") else "local",
                    source=json.dumps({"uri": each.source}),
                ),
                tags=[InputTag("mlflow.data.context", each.context)],
            )
            for each in inputs
        ]
        if found:
            self._do(lambda client: client.log_inputs(self.run_id, found))

    def log_models(self, found: Sequence[TrackedModel], dataset: TrackedInput | None = None) -> None:
        """List checkpoints as outputs of this run, unless they are listed already. Their scores are on this dataset."""

        def log(client: Any) -> None:
            experiment = client.get_run(self.run_id).info.experiment_id
            for model in found:
                if models.find(client, experiment, model.checkpoint) is None:
                    made = models.make(client, experiment, str(self.run_id), model)
                    metrics = _metrics((name, value, model.checkpoint.step) for name, value in model.scores.items())
                    client.log_batch(self.run_id, metrics=_of_model(metrics, made.model_id, dataset), synchronous=True)

        if found:
            self._do(models.unless_old(log))

    def log_model_input(self, checkpoint: Checkpoint) -> None:
        """Name the checkpoint that this run reads, if it is listed."""
        from mlflow.entities import LoggedModelInput

        def log(client: Any) -> None:
            model = models.find(client, client.get_run(self.run_id).info.experiment_id, checkpoint)
            if model is not None:
                client.log_inputs(self.run_id, models=[LoggedModelInput(model.model_id)])

        self._do(models.unless_old(log))

    def log_model_scores(
        self, checkpoint: Checkpoint, scores: Mapping[str, float], dataset: TrackedInput | None, variant: str, tag: str
    ) -> None:
        """Log scores of a checkpoint, if it is listed, on a dataset that is an input of this run.

        tag: of the model, with the variant that made it. Scores of another variant, such as one with another sampler, have its name
        before their own.
        """

        def log(client: Any) -> None:
            model = models.find(client, client.get_run(self.run_id).info.experiment_id, checkpoint)
            if model is not None:
                prefix = "" if model.tags.get(tag, variant) == variant else f"{variant}/"
                metrics = _metrics((prefix + name, value, checkpoint.step) for name, value in scores.items())
                client.log_batch(self.run_id, metrics=_of_model(metrics, model.model_id, dataset), synchronous=True)

        if scores:
            self._do(models.unless_old(log))

    @contextlib.contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Log the load of this machine meanwhile, if the config asks for it. Without a server nothing is logged."""
        if not self.has_system_metrics or self.run_id is None or self._outbox.is_refused:
            yield
            return
        try:
            with quiet():
                client_of(self.uri)  # limits of requests
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
                monitor.start()
        except Exception as error:  # no failure of an observer may stop the work
            _log.warning("the load of this machine is not logged (%s)", first_line(error))
            yield
            return
        try:
            yield
        finally:
            with quiet():
                monitor.finish()

    def link(self, others: Mapping[str, RunHandle]) -> None:
        """Set tags to the ids of other runs, which may not be made yet: what waits is sent in order."""
        from mlflow.entities import RunTag

        def log(client: Any) -> None:
            tags = [RunTag(name, other.run_id) for name, other in others.items() if other.run_id is not None]
            client.log_batch(self.run_id, tags=tags, synchronous=True)

        if others:
            self._do(log)

    def copy_from(self, other: RunHandle) -> None:
        """Log the metrics of another run, the parameters that this one does not have, and the data."""
        from mlflow.entities import Param

        def copy(client: Any) -> None:
            if other.run_id is None:
                return
            run, own = client.get_run(other.run_id), client.get_run(self.run_id).data.params
            params = [Param(name, value) for name, value in run.data.params.items() if name not in own]
            metrics = _metrics((name, value, 0) for name, value in run.data.metrics.items())
            client.log_batch(self.run_id, metrics=metrics, params=params, synchronous=True)
            client.log_inputs(self.run_id, run.inputs.dataset_inputs)

        self._do(copy)

    def find(self, tags: Mapping[str, str]) -> RunHandle | None:
        """The first finished run of the same experiment with these tags. None if there is none, or the server does not answer."""

        def search(client: Any) -> str | None:
            experiment = client.get_run(self.run_id).info.experiment_id
            wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
            filters = f"{wanted} and attributes.status = 'FINISHED'"
            found = client.search_runs([experiment], filters, max_results=1, order_by=["attributes.start_time ASC"])
            return found[0].info.run_id if found else None

        found: str | None = self._do(search)
        return None if found is None else replace(self, run_id=found, parent=None, _is_planned=False, _is_first=False)

    def _log(self, **entities: Sequence[Any]) -> None:
        """Log any number of metrics, params or tags, which MLflow's client splits into requests."""
        self._do(lambda client: client.log_batch(self.run_id, synchronous=True, **entities))

    def log_bytes(self, content: bytes, name: str) -> None:
        """Log bytes as a file, such as "samples/step-000100.png"."""
        place = Path(name)

        def log(client: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / place.name
                path.write_bytes(content)
                client.log_artifact(self.run_id, str(path), None if place.parent == Path() else str(place.parent))

        self._do(log)

    def log_file(self, path: Path) -> None:
        self.log_bytes(path.read_bytes(), path.name)

    def register_model(
        self,
        name: str,
        files: Mapping[str, bytes],
        tags: Mapping[str, str],
        description: str,
        alias: str | None,
        *,
        checkpoint: Checkpoint | None = None,
    ) -> str | None:
        """Create a version of the registered model `name`, unless one with the same content exists. Returns its number, or None
        if that failed.

        files: written to the run's folder `model`, the source of the version.   tags: must contain enat.digest, which identifies
        the content, and enat.created, in UTC.   alias: set to the version created last, in any order of registration.
        checkpoint: that names the version, if it is listed.
        If a server accepts runs but refuses models, one warning is shown and tracking continues.
        """
        from mlflow.exceptions import MlflowException

        legal = model_name(name)

        def register(client: Any) -> str | None:
            try:
                version = version_of(client, legal, tags[DIGEST_TAG]) or self._new_version(client, legal, files, tags, description)
                if alias is not None:
                    move_alias(client, legal, alias)
                if checkpoint is not None and version is not None:
                    models.unless_old(lambda c: models.name_version(c, str(self.run_id), checkpoint, legal, version))(client)
            except MlflowException as error:
                if error.error_code in OUT_OF_ORDER:
                    raise
                _log.warning("%s is not registered as a model (%s)", legal, first_line(error))
                return None
            return version

        version: str | None = self._do(register)
        return version

    def _new_version(
        self, client: Any, name: str, files: Mapping[str, bytes], tags: Mapping[str, str], description: str
    ) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            client.log_artifacts(self.run_id, folder, _MODEL_FOLDER)
        create_once(lambda: client.create_registered_model(name))
        made = client.create_model_version(
            name,
            f"runs:/{self.run_id}/{_MODEL_FOLDER}",  # a server accepts no local path, and only paths of a run that is named
            self.run_id,
            tags={key: value[:TAG_LIMIT] for key, value in tags.items()},
            description=shortened(description),
            await_creation_for=0,
        )
        # The registry cannot create conditionally. If runs register the same content at once, the first version stays.
        first = version_of(client, name, tags[DIGEST_TAG])
        if first != str(made.version):
            client.delete_model_version(name, str(made.version))
        return first

    def tag_model(self, name: str, digest: str, choose: Callable[[Mapping[str, str]], Mapping[str, str | None]]) -> None:
        """Tag the version of the registered model `name` that has this content, if it exists.

        choose: given its tags, returns those to set. The value None deletes a tag.
        """

        def tag(client: Any) -> None:
            found = first_versions(client, model_name(name)).get(digest)
            if found is not None:
                version = as_model_version(found)
                set_version_tags(client, version, choose(version.tags))

        self._do(tag)

    def finish(self, status: str = "FINISHED") -> None:
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._do(lambda client: client.set_terminated(self.run_id, status, now))
        if self._is_first and status != "KILLED" and not self.flush():
            _log.warning(
                "tracking at %s still does not answer; the same command records what is missing once it does", self._shown_uri
            )

    def flush(self) -> bool:
        """Try to send what waits. Returns whether nothing waits any more."""
        with _sending:
            if self._outbox.waiting:
                self._send()
            return not self._outbox.waiting

    def _do(self, action: Callable[[Any], Any]) -> Any:
        """The result of the action, or None if it has to wait."""
        outbox = self._outbox
        with _sending:
            return self._do_alone(outbox, action)

    def _do_alone(self, outbox: _Outbox, action: Callable[[Any], Any]) -> Any:
        if (self.run_id is None and not self._is_planned) or outbox.is_refused:
            return None
        outbox.waiting.append(action)
        if len(outbox.waiting) > 1 and time.monotonic() < outbox.tried + _RETRY_SECONDS:
            return None
        return self._send()

    def _send(self) -> Any:
        """Send what waits, in order, as far as the server answers. Returns the result of the last action if all were sent."""
        outbox, result, is_first = self._outbox, None, len(self._outbox.waiting) == 1
        while outbox.waiting:
            try:
                with quiet():
                    result = outbox.waiting[0](client_of(self.uri))
            except Exception as error:  # no failure of an observer may stop the work
                outbox.tried, problem = time.monotonic(), access_problem(error)
                if is_away(error):
                    if is_first:
                        later = "what it misses is sent once it answers"
                        _log.warning("tracking at %s does not answer; %s (%s)", self._shown_uri, later, NO_ANSWER.advice)
                    return None
                outbox.is_refused = True
                outbox.waiting.clear()
                problem = problem or AccessProblem("fails", first_line(error))
                _log.warning("tracking at %s %s; this run continues without it (%s)", self._shown_uri, *problem)
                return None
            outbox.waiting.popleft()
        return result

    @property
    def _shown_uri(self) -> str:
        return without_credentials(self.uri)


def prepare(uri: str, config: TrackingConfig) -> None:
    """Import MLflow and open its database in a thread: it takes seconds, in which others may wait for Ray."""

    def open_client() -> None:
        with _sending, quiet(), contextlib.suppress(Exception):  # the first run says what is wrong
            client_of(uri)

    if config.enabled:
        threading.Thread(target=open_client, name="enat-tracking", daemon=True).start()


def start_run(
    uri: str,
    config: TrackingConfig,
    name: str,
    tags: Mapping[str, str],
    parent: RunHandle | None = None,
    *,
    beside: RunHandle | None = None,
) -> RunHandle:
    """Start a run, nested if a parent is given. If tracking is off, the handle does nothing; if it is down, the run is made later.

    beside: the first run of the same command, for a run that is not nested. The first run of a command marks as FAILED what killed
    commands of this host left RUNNING in the experiment.
    """
    first = parent if parent is not None else beside
    is_off = not config.enabled or (first is not None and first.run_id is None and not first._is_planned)
    outbox = first._outbox if first is not None else _Outbox()
    handle = RunHandle(uri, None, parent, not is_off, first is None, config.system_metrics, outbox)
    token, now = uuid.uuid4().hex, int(time.time() * 1000)

    def start(client: Any) -> None:
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            create_once(lambda: client.create_experiment(config.experiment, _artifact_location(uri), tags=_KIND))
            experiment = client.get_experiment_by_name(config.experiment)
        if first is None:
            _fail_runs_of_killed_commands(client, experiment.experiment_id)
        made = client.search_runs([experiment.experiment_id], f"tags.`{_START_TAG}` = '{token}'") if handle._outbox.tried else ()
        if not made:  # else it was made, and the answer was lost
            parents = {"mlflow.parentRunId": parent.run_id} if parent else {}
            own = {HOST_TAG: process.this_host(), PROCESS_TAG: process.this_process(), _START_TAG: token, **_user()}
            made = [client.create_run(experiment.experiment_id, now, {**tags, **own, **parents}, name)]
        handle.run_id = made[0].info.run_id

    handle._do(start)
    return handle


def _fail_runs_of_killed_commands(client: Any, experiment: str) -> None:
    for run in client.search_runs([experiment], f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{process.this_host()}'"):
        if not process.is_alive(run.data.tags.get(PROCESS_TAG, "")):
            client.set_terminated(run.info.run_id, "FAILED")


@contextlib.contextmanager
def ending(run: RunHandle) -> Iterator[RunHandle]:
    """Mark the run as FAILED if the work raises, KILLED if it was asked to end. Work that succeeds finishes it itself."""
    try:
        yield run
    except BaseException as error:
        fail(run, error)
        raise


def fail(run: RunHandle, error: BaseException) -> None:
    """End a run with its error, as description and tag, and with the end of the traceback as a file. KILLED has no error."""
    if isinstance(error, Exception):
        lines = without_credentials("".join(traceback.format_exception(error))).splitlines()
        run.set_tags({_ERROR_TAG: first_line(error), NOTE: f"**Failed:** {_plain(first_line(error))}"})
        run.log_bytes("\n".join([*lines[-_ERROR_LINES:], ""]).encode(), ERROR_FILE)
    run.finish("FAILED" if isinstance(error, Exception) else "KILLED")


def _plain(text: str) -> str:
    """Without what Markdown takes for its own: MLflow renders descriptions."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", text)


def _user() -> dict[str, str]:
    """Who runs this, which MLflow shows in a column. A container may have no name for its user."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):
        return {}


def _artifact_location(uri: str) -> str | None:
    """Files of a local sqlite store are beside it, in any working directory. A server chooses its own place."""
    return str(Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts") if uri.startswith("sqlite:///") else None


def _values_of(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, float, int]]:
    return ((name, value, int(row["step"])) for row in rows for name, value in row.items() if name != "step")


def _metrics(values: Iterable[tuple[str, float, int]]) -> list[Any]:
    """Metrics of this moment from (name, value, step), with legal names and without values that are not finite."""
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    finite = [(name, float(value), step) for name, value, step in values if math.isfinite(value)]
    return [Metric(_ILLEGAL.sub("_", name), value, now, step) for name, value, step in finite]


def _of_model(metrics: Sequence[Any], model_id: str, dataset: TrackedInput | None) -> list[Any]:
    """Metrics that belong to a model and a dataset, too."""
    from mlflow.entities import Metric

    name, digest = (_dataset_name(dataset), _dataset_digest(dataset)) if dataset is not None else (None, None)
    return [Metric(m.key, m.value, m.timestamp, m.step, model_id, name, digest) for m in metrics]


def _dataset_name(dataset: TrackedInput) -> str:
    return dataset.name[:_DATASET_NAME_LIMIT]


def _dataset_digest(dataset: TrackedInput) -> str:
    return dataset.digest[:_DATASET_DIGEST_LETTERS]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
