"""Keys, plans and runs of stages: existing artifacts are reused, and a key depends on what decides the outcome and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.artifacts import last_used
from pipelines.artifacts.lease import Leases
from pipelines.artifacts.manifest import Manifest, name_of
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution, Workers
from pipelines.run import graph
from pipelines.run.loading import load_run
from pipelines.storage.base import StorageError
from pipelines.workflow import driver, node_run, stage
from pipelines.workflow.config import ConfigError
from pipelines.workflow.node_run import Session
from pipelines.workflow.stage import Node, Stage, StageContext, StageError, StageResult, titles_of
from pipelines.workflow.summary import Summary

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"
NO_VARIANTS = "variants.untrained=null"


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    word: str = "a"
    execution: Workers = field(default_factory=Workers)


@dataclass(frozen=True, kw_only=True)
class LengthSummary(Summary):
    length: int


@dataclass
class Counted:
    """Stages of text files that count how often they are run."""

    runs: list[str] = field(default_factory=list)

    def write(self, config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        self.runs.append(config.word)
        before = [context.store.fetch(manifest, "text").read_text() for manifest in inputs.values()]
        text = "".join([*before, config.word])
        return StageResult(
            files=[context.write("text", lambda path: path.write_text(text))],
            records=[context.write("log.json", lambda path: path.write_text(str(len(self.runs))))],
            summary=LengthSummary(length=len(text)),
            metrics={"length": len(text)},
            worker_seconds=2.0,
        )

    def nodes(self, first: str = "a", second: str = "b", *, versions: tuple[int, int] = (1, 1), workers: int = 1) -> list[Node]:
        execution = Workers(num_workers=workers)
        return [
            Node("first", Stage("write", versions[0], self.write), WordConfig(word=first, execution=execution)),
            Node(
                "second", Stage("append", versions[1], self.write), WordConfig(word=second, execution=execution), {"text": "first"}
            ),
        ]


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def session(local_store: ArtifactStore, make_session: Callable[..., Any]) -> Session:
    return make_session(local_store)


# Running -------------------------------------------------------------------------------------------------------------------


def test_a_run_makes_every_node_from_its_inputs_and_a_second_run_reuses_all(counted: Counted, session: Session) -> None:
    done = driver.execute(counted.nodes(workers=3), session)
    assert [(item.node.id, item.is_reused) for item in done] == [("first", False), ("second", False)]
    first, second = (item.manifest for item in done)
    assert session.store.fetch(second, "text").read_text() == "ab"
    assert second.inputs == {"text": {"stage": "write", "key": first.key, "digest": first.digest}}
    assert second.config == {"word": "b", "execution": {"num_workers": 3, "cpus_per_worker": 1.0, "gpus_per_worker": 0.0}}
    assert second.summary == {"summary_version": 1, "length": 2} and second.metrics == {"length": 2.0}
    assert second.provenance["worker_seconds"] == 2.0 and second.provenance["seconds"] > 0
    assert str(second.provenance["code"]).startswith("0.")
    assert [session.store.read_manifest(item.stage, item.key) for item in (first, second)] == [first, second]
    again = driver.execute(counted.nodes(), session)
    assert counted.runs == ["a", "b"] and all(item.is_reused for item in again)
    assert [item.manifest for item in again] == [first, second]


@pytest.mark.parametrize(
    ("changed", "run_again"),
    [
        ({"workers": 8}, []),
        ({"second": "c"}, ["c"]),
        ({"first": "c"}, ["c", "b"]),
        ({"versions": (1, 2)}, ["b"]),
        ({"versions": (2, 1)}, ["a", "b"]),
    ],
)
def test_only_the_stages_that_a_change_affects_run_again(
    counted: Counted, session: Session, changed: dict[str, Any], run_again: list[str]
) -> None:
    """The new version of "first" makes the same bytes, but under another key, which its digest holds."""
    driver.execute(counted.nodes(), session)
    counted.runs.clear()
    driver.execute(counted.nodes(**changed), session)
    assert counted.runs == run_again


def test_parts_are_removed_after_the_commit(session: Session) -> None:
    def run(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        context.store.put_part(context.stage, context.key, "part-0", {"rows": 1})
        return StageResult(files=[context.write("text", lambda path: path.write_text("text"))])

    (done,) = driver.execute([Node("n", Stage("write", 1, run), WordConfig())], session)
    assert session.store.read_parts("write", done.manifest.key) == {}


def test_the_terminal_has_a_line_per_stage(counted: Counted, local_store: ArtifactStore, make_session: Callable[..., Any]) -> None:
    terminal = io.StringIO()
    session = make_session(local_store, console=Console(file=terminal, width=100))
    driver.execute(counted.nodes(), session)
    driver.execute(counted.nodes(second="c"), session)
    lines = terminal.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["first", "second", "first", "second"]
    assert ["reused" in line for line in lines] == [False, False, True, False]


# What is in use ------------------------------------------------------------------------------------------------------------


def _third(run: Callable[..., StageResult]) -> Node:
    return Node("third", Stage("third", 1, run), WordConfig(), {"text": "second"})


def test_an_active_stage_has_recorded_all_artifacts_of_the_run(counted: Counted, session: Session) -> None:
    """Also inputs of a later stage: they must not be removed as unused while this stage runs for weeks."""
    recorded: list[tuple[str, str]] = []

    def run(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        recorded.extend(context.store.recorded_inputs(context.stage, context.key))
        return counted.write(config, inputs, context)

    done = driver.execute([*counted.nodes(), _third(run)], session)
    assert recorded == sorted((item.manifest.stage, item.manifest.key) for item in done[:2])


def test_use_is_recorded_again_while_a_stage_runs(
    counted: Counted, local_store: ArtifactStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_used, "_EVERY", 0.01)
    given = driver.execute(counted.nodes(first="given")[:1], session)[0].manifest

    def old() -> list[Path]:
        return [path for path in Path(local_store.uri).glob("*/*/.used") if path.stat().st_mtime < 1000]

    def run(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        records = [*Path(local_store.uri).glob("*/*/.used")]
        for path in records:
            os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while old():
            assert time.monotonic() < deadline, old()
            time.sleep(0.005)
        assert len(records) == 4, "of the given one, of two that are made, and of this one"
        return counted.write(config, inputs, context)

    driver.execute([*counted.nodes(), _third(run)], session, {"elsewhere": given})
    assert "enat-use-recorder" not in [thread.name for thread in threading.enumerate()]


def test_use_that_cannot_be_recorded_costs_one_warning(
    counted: Counted, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ArtifactStore, "record_use", refused)
    with caplog.at_level("WARNING", "pipelines"):
        done = driver.execute(counted.nodes(), session)
    (record,) = caplog.records
    message = record.getMessage()
    assert f"write/{done[0].manifest.key[:12]}" in message and "`enat artifacts gc`" in message and "Permission denied" in message


# Publishing ----------------------------------------------------------------------------------------------------------------


def _published(counted: Counted, publish: Callable[..., None]) -> list[Node]:
    first, second = counted.nodes()
    return [first, dataclasses.replace(second, stage=dataclasses.replace(second.stage, publish=publish))]


def test_new_and_reused_artifacts_are_published_after_the_commit(counted: Counted, session: Session) -> None:
    calls: list[tuple[Any, ...]] = []

    def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: stage.PublishContext) -> None:
        assert context.store is session.store and context.tracking is session.tracking
        assert session.store.read_manifest(manifest.stage, manifest.key) == manifest
        calls.append((manifest, inputs))

    nodes = _published(counted, publish)
    first, second = (item.manifest for item in driver.execute(nodes, session))
    driver.execute(nodes, session)
    assert calls == [(second, {"text": first})] * 2


def test_publishing_that_fails_is_one_warning_and_the_run_continues(
    counted: Counted, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    def publish(*arguments: Any) -> None:
        raise KeyError("license")

    nodes = [*_published(counted, publish), Node("third", Stage("append", 1, counted.write), WordConfig(word="c"))]
    with caplog.at_level("WARNING", "pipelines"):
        assert len(driver.execute(nodes, session)) == 3
    assert [record.getMessage() for record in caplog.records] == ["second was made, but not published (KeyError: 'license')"]


# Failing -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("it broke"), StageError, "stage third failed: RuntimeError: it broke"),
        (ValueError("it is wrong"), ValueError, "it is wrong"),  # bad input keeps its sentence
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_stage_that_fails_leaves_its_parts_and_no_artifact(
    counted: Counted, session: Session, error: BaseException, raised: type[BaseException], message: str
) -> None:
    def fail(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        context.write("half", lambda path: path.write_text("half"))
        context.store.put_part(context.stage, context.key, "part-0", {"rows": 1})
        raise error

    published: list[Any] = []
    third = Stage("fail", 1, fail, publish=lambda *arguments: published.append(arguments))
    nodes = [*counted.nodes(), Node("third", third, WordConfig(), {"text": "second"})]
    with pytest.raises(raised) as caught:
        driver.execute(nodes, session)
    assert str(caught.value) == message and published == []
    assert sorted(manifest.stage for manifest in session.store.manifests()) == ["append", "write"]
    planned = driver.plan(nodes, session.store)
    assert [item.is_reused for item in planned] == [True, True, False]
    assert planned[2].parts_done == 1, "the next run resumes from committed parts"


def test_an_error_while_an_interrupt_is_handled_is_an_interrupt(counted: Counted, session: Session) -> None:
    """Python may interrupt the taking of a lock, whose release then fails in place of the interrupt."""

    def interrupted(*_: Any) -> StageResult:
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    with pytest.raises(KeyboardInterrupt):
        driver.execute([*counted.nodes(), _third(interrupted)], session)

    def failed(*_: Any) -> StageResult:
        threading.Lock().release()
        raise AssertionError

    with pytest.raises(StageError, match="release unlocked lock"):
        driver.execute([*counted.nodes(), _third(failed)], session)


def test_the_message_of_a_failure_is_that_of_the_innermost_cause() -> None:
    cause = FloatingPointError("a first line\nloss is nan")
    outer = RuntimeError("the worker failed")
    outer.__cause__ = cause
    wrapped = RuntimeError("the job failed")
    wrapped.worker_failures = {0: outer}  # type: ignore[attr-defined]
    assert node_run._root_cause(wrapped) == "FloatingPointError: loss is nan"
    assert node_run._root_cause(RuntimeError()) == "RuntimeError: "


@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_found_by_a_ray_worker_keeps_its_sentence(counted: Counted, session: Session) -> None:
    """Not as Ray words it, with the worker's traceback in it."""
    import ray

    def fail() -> None:
        raise ValueError("the labels are wrong")

    def run(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        ray.get(ray.remote(num_cpus=1)(fail).remote())
        raise AssertionError("unreachable")

    with pytest.raises((ValueError, StageError)) as caught:
        driver.execute([Node("remote", Stage("remote", 1, run), WordConfig())], session)
    assert str(caught.value).removeprefix("stage remote failed: ") == "the labels are wrong"


@pytest.fixture
def without_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if both runs had begun before either had a lease."""
    monkeypatch.setattr(Leases, "take", lambda *_: None)


@pytest.mark.usefixtures("without_leases")
def test_a_run_adopts_an_artifact_that_another_run_has_just_made(local_store: ArtifactStore, session: Session) -> None:

    def make(depth: int) -> Callable[..., StageResult]:
        def run(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
            if depth:
                driver.execute([Node("n", Stage("write", 1, make(depth - 1)), config)], session)
            return StageResult(files=[context.write("text", lambda path: path.write_text(f"run {depth}"))])

        return run

    outer = driver.execute([Node("n", Stage("write", 1, make(1)), WordConfig())], session)[0].manifest
    assert local_store.fetch(outer, "text").read_text() == "run 0"
    assert list(local_store.manifests()) == [outer]


# Planning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_leases")
def test_a_run_whose_parts_an_identical_run_cleaned_up_adopts_its_artifact(
    counted: Counted, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run commits and removes the parts that this one is about to count."""
    store = session.store

    def run(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        store.put_part(context.stage, context.key, "part", {"rows": 1})
        if not is_other:
            is_other.append(True)
            driver.execute([*counted.nodes(), _third(run)], session)
            assert store.read_parts(context.stage, context.key), "a planned part has no record"
        return counted.write(config, inputs, context)

    is_other: list[bool] = []
    done = driver.execute([*counted.nodes(), _third(run)], session)
    stage_name, key = name_of(done[-1].manifest)
    assert is_other and store.read_manifest(stage_name, key) == done[-1].manifest
    assert {file.name for file in store.list_files(stage_name, key)} == {
        "manifest.json", ".used", *(file.path for file in (*done[-1].manifest.files, *done[-1].manifest.records)),
    }  # fmt: skip


def test_cleaning_up_that_fails_is_one_warning_and_is_repeated(
    counted: Counted, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        context.store.put_part(context.stage, context.key, "part", {"rows": 1})
        return counted.write(config, inputs, context)

    def refuse(self: ArtifactStore, committed: Manifest) -> None:
        raise StorageError("s3://bucket cannot be deleted (AccessDenied)")

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "discard_work", refuse)
        done = driver.execute([*counted.nodes(), _third(run)], session)
    assert "could not be removed (s3://bucket cannot be deleted (AccessDenied)); the next run" in caplog.text
    name = name_of(done[-1].manifest)
    assert session.store.read_parts(*name)
    assert driver.execute([*counted.nodes(), _third(run)], session)[-1].is_reused
    assert session.store.read_parts(*name) == {}


def test_a_plan_knows_the_keys_whose_inputs_exist_and_writes_nothing(counted: Counted, session: Session) -> None:
    nodes = [*counted.nodes(), Node("third", Stage("append", 1, counted.write), WordConfig(word="c"), {"text": "second"})]

    def planned() -> list[tuple[bool, bool]]:
        return [(item.key is not None, item.is_reused) for item in driver.plan(nodes, session.store)]

    assert planned() == [(True, False), (False, False), (False, False)]
    first = driver.plan(nodes, session.store)[0].key
    assert not Path(session.store.uri).exists() and counted.runs == []
    assert driver.execute(nodes[:1], session)[0].manifest.key == first
    assert planned() == [(True, True), (True, False), (False, False)]
    done = driver.execute(nodes, session)
    assert planned() == [(True, True)] * 3
    assert [item.key for item in driver.plan(nodes, session.store)] == [item.manifest.key for item in done]


# The pipeline's keys -------------------------------------------------------------------------------------------------------


@functools.cache
def _keys(*overrides: str) -> dict[str, str]:
    """Keys of a run's nodes, with stand-ins that have only a key for inputs that do not exist yet."""
    found: dict[str, str] = {}
    for node in graph.build(load_run(DIGITS, overrides)):
        stand_ins = {
            name: Manifest(stage="any", key=found[id], stage_version=1, config={}, inputs={}, files=())
            for name, id in node.inputs.items()
        }
        found[node.id] = driver.stage_key(node, stand_ins)
    return found


def _changed(override: str, *both: str) -> set[str]:
    """Nodes whose keys an override changes, beside overrides that hold with and without it. Without variants."""
    before, after = _keys(NO_VARIANTS, *both), _keys(NO_VARIANTS, override, *both)
    assert before.keys() == after.keys()
    return {id for id in before if before[id] != after[id]}


@pytest.mark.parametrize(
    "override",
    [
        *("workspace=elsewhere", "store=elsewhere", "cluster.num_cpus=7", "cluster.address=host:1"),
        *("tracking.uri=http://host", "tracking.experiment=other", "tracking.enabled=false", "tracking.model_alias=best"),
        *("token_map.execution.num_workers=7", "train.execution.on_divergence=rollback", "generate.execution.cpus_per_worker=2"),
        "train.sampler.num_steps=3",
    ],
)
def test_places_and_execution_settings_never_change_a_key(override: str) -> None:
    assert _changed(override) == set()


AFTER_TRAIN = {"train", "generate", "memorization", "evaluate", "report"}
AFTER_TOKENIZER = {"tokenizer", "token_map", "audit"} | AFTER_TRAIN


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("tokenizer.recipe.num_steps=401", AFTER_TOKENIZER),
        ("token_map.shard_size=100", AFTER_TOKENIZER - {"tokenizer"}),
        ("train.learning_rate=2e-3", AFTER_TRAIN),
        ("generate.num_samples=600", AFTER_TRAIN - {"train"}),
        ("reference.num_epochs=21", {"reference", "evaluate", "report"}),
        ("evaluate.judge=null", {"evaluate", "report"}),
        ("report.samples_per_class=2", {"report"}),
        ("name=other", {"report"}),
        ("token_map.precision=bf16", AFTER_TOKENIZER - {"tokenizer"}),
        ("dataset.name=other", {"report"}),
        ("seed=1", AFTER_TOKENIZER | {"reference"}),
        ("tokenizer.resolution=32", AFTER_TOKENIZER | {"reference"}),
    ],
)
def test_what_decides_the_outcome_changes_the_keys_of_its_stage_and_of_later_ones(override: str, stages: set[str]) -> None:
    """One value for each stage. test_keys.py changes every number of a config alone."""
    assert _changed(override, "train.execution.num_workers=1") == stages


def test_nodes_have_the_title_of_the_data_that_they_were_made_from(image_folder: Path) -> None:
    """But for a tokenizer, which may have been trained on other images than the model."""
    other = f"tokenizer.dataset={{kind: image_folder, path: {image_folder}}}"
    overrides = ("dataset.name=photos", other, "variants={small: {train: {num_steps: 5}}}")
    titles = titles_of(graph.build(load_run(DIGITS, overrides)))
    assert titles.pop("dataset") == "image_folder", "that of the tokenizer"
    assert set(titles.values()) == {"photos"} and "tokenizer" not in titles
    assert {
        "dataset-2",
        "token_map",
        "reference",
        "train",
        "generate",
        "evaluate",
        "train@small",
        "evaluate@small",
    } <= titles.keys()


def test_a_variant_shares_the_stages_that_it_does_not_change() -> None:
    def nodes(values: str) -> list[str]:
        return [node.id for node in graph.build(load_run(DIGITS, (NO_VARIANTS, f"variants={values}")))]

    own = ["dataset", "tokenizer", "token_map", "reference", "audit", "train", "generate", "memorization", "evaluate"]
    assert nodes("{}") == [*own, "report"]
    assert nodes("{a: {train: {num_steps: 0}}}") == [*own, "train@a", "generate@a", "memorization@a", "evaluate@a", "report"]
    assert nodes("{a: {generate: {sampler: {num_steps: 4}}}}") == [*own, "generate@a", "memorization@a", "evaluate@a", "report"]
    assert nodes("{a: {train: {execution: {num_workers: 1}}}}") == [*own, "report"]
    assert nodes("{a: {train: {num_steps: 0}}, b: {train: {num_steps: 0}}}") == [
        *own,
        "train@a",
        "generate@a",
        "memorization@a",
        "evaluate@a",
        "report",
    ]


@pytest.mark.parametrize(
    ("targets", "nodes"),
    [
        ("[tokenizer]", ["dataset", "tokenizer"]),
        ("[token_map]", ["dataset", "tokenizer", "token_map"]),
        ("[reference, token_map]", ["dataset", "tokenizer", "token_map", "reference"]),
        ("[train]", ["dataset", "tokenizer", "token_map", "reference", "train", "train@untrained"]),
    ],
)
def test_targets_run_with_the_stages_that_they_need_under_the_same_keys(targets: str, nodes: list[str]) -> None:
    assert _keys(f"targets={targets}") == {id: key for id, key in _keys().items() if id in nodes}
    assert list(_keys(f"targets={targets}")) == nodes


def test_a_target_that_is_not_a_stage_of_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"targets names 'captions'; the stages of this run are tokenizer, dataset, token_map"):
        graph.build(load_run(DIGITS, ("targets=[token_map, captions]",)))


def test_a_model_that_would_not_fit_is_accepted_if_it_is_not_trained() -> None:
    """A config for a token map alone need not know what will be trained on it."""
    nodes = graph.build(load_run(DIGITS, ("targets=[token_map]", "train.model.grid_size=16")))
    assert [node.id for node in nodes] == ["dataset", "tokenizer", "token_map"]


def test_the_nodes_of_a_variant_read_from_its_own() -> None:
    nodes = {node.id: node for node in graph.build(load_run(DIGITS))}
    assert nodes["generate@untrained"].inputs == {"model": "train@untrained"}
    assert nodes["evaluate@untrained"].inputs["samples"] == "generate@untrained"
    assert nodes["evaluate@untrained"].inputs["reference"] == "reference"
    assert nodes["report"].inputs["evaluation@untrained"] == "evaluate@untrained"
    assert nodes["report"].inputs["evaluation"] == "evaluate"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("variants.a.train.num_stps=1", r"variant a: unknown key train\.num_stps; did you mean train\.num_steps\?"),
        ("variants.a.train.model.grid_size=9", r"variant a: train\.model\.grid_size is 9, but the token map of digits"),
        ("variants.main.seed=1", "a variant cannot be called 'main'"),
        ("variants={'a b': {seed: 1}}", "the name 'a b' must begin with a letter or digit"),
        ("name=../up", r"the name '\.\./up' must begin"),
        ("variants.a=3", "variant a"),
        ("variants.a=word", "variant a"),
        ("train.model.reuse=false", r"generate\.sampler\.reuse needs a model with train\.model\.reuse"),
    ],
)
def test_an_invalid_run_is_refused_before_it_starts(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_run(DIGITS, (override,))


def test_invalid_workers_are_refused() -> None:
    for wrong in ({"num_workers": 0}, {"cpus_per_worker": 0}, {"gpus_per_worker": -1}, {"worker_batch_size": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is "):
            Execution(**wrong)
