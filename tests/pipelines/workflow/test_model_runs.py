"""Each model has a run in MLflow with the runs of its stages below it. What another run made is linked to, not recorded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.run import tracked
from pipelines.run.config import RunConfig
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle, TrackingConfig
from pipelines.workflow import config as configuration
from pipelines.workflow import driver, model_runs
from pipelines.workflow.model_runs import ModelRuns
from pipelines.workflow.node_run import Session
from pipelines.workflow.stage import MAIN, Node, Stage, StageContext, StageError, StageResult
from services.mlflow_database import mlflow_database

CONFIG = TrackingConfig(experiment="models")
SIZES = {"small": {"train": {"num_steps": 3}}, "steps-12": {"generate": {"sampler": {"num_steps": 12}}}}


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    value: float = 1.0
    usual: int = 3
    note: str | None = None
    inner: tuple[str, ...] = field(default_factory=tuple)


def _measure(config: PointConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    if config.value < 0:
        raise RuntimeError(f"{config.value} of http://reader:secret@host/images is below 0")
    context.run.log_metrics({"loss": config.value}, 1)
    return StageResult(
        files=[context.write("text", lambda path: path.write_text(str(config.value)))], metrics={"last": config.value}
    )


def _nodes(small: float = 2.0) -> list[Node]:
    shared, curve = Stage("shared", 1, _measure), Stage("curve", 1, _measure, has_curves=True)
    return [
        Node("shared", shared, PointConfig()),
        Node("curve", curve, PointConfig(), {"read": "shared"}),
        Node("curve@small", curve, PointConfig(value=small), {"read": "shared"}),
    ]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_database(tmp_path_factory.mktemp("models"))


@pytest.fixture
def execute(make_session: Callable[..., Session], local_store: ArtifactStore, uri: str, tmp_path: Path) -> Callable[..., None]:
    """Runs nodes as `enat run` does, in an experiment of this test."""
    tracked_at = replace(CONFIG, experiment=tmp_path.name)

    def run(nodes: list[Node], *overrides: str) -> None:
        config = RunConfig(name="sizes", tracking=tracked_at, variants=SIZES)
        with tracked.start(config, uri, "sizes.yaml", overrides, nodes) as models:
            main = models.by_variant[MAIN]
            driver.execute(nodes, make_session(local_store, run=main, tracking=tracked_at, models=models))
            main.finish()

    return run


@pytest.fixture
def found(uri: str, tmp_path: Path) -> Callable[[], list[Any]]:
    client = MlflowClient(uri)

    def search() -> list[Any]:
        experiment = client.get_experiment_by_name(tmp_path.name)
        return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))

    return search


def test_stages_are_below_the_run_of_their_model_and_reused_ones_are_linked(
    execute: Callable[..., None], found: Callable[[], list[Any]]
) -> None:
    execute(_nodes())
    runs = {run.info.run_name: run for run in found()}
    assert set(runs) == {"sizes", "sizes · small", "shared", "curve", "curve@small"}, "no run of a variant without stages"
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    main, small = runs["sizes"].info.run_id, runs["sizes · small"].info.run_id
    expected = {"sizes": None, "sizes · small": None, "shared": main, "curve": main, "curve@small": small}
    assert parents == expected and {run.info.status for run in runs.values()} == {"FINISHED"}
    links = {name: id for name, id in runs["sizes · small"].data.tags.items() if name.startswith(model_runs.LINK)}
    assert links == {"enat.run.main": main, "enat.run.shared": runs["shared"].info.run_id}
    execute(_nodes(), "seed=7")
    again = [run for run in found() if run.info.run_id not in {run.info.run_id for run in runs.values()}]
    assert {run.info.run_name for run in again} == {"sizes · seed 7", "sizes · small · seed 7"}
    tags = {run.info.run_name: run.data.tags for run in again}
    assert tags["sizes · seed 7"]["enat.run.curve"] == runs["curve"].info.run_id
    assert tags["sizes · small · seed 7"]["enat.run.curve"] == runs["curve@small"].info.run_id
    assert tags["sizes · small · seed 7"]["enat.command"] == "sizes.yaml seed=7"
    execute(_nodes(), "dataset.path=http://reader:secret@host/images")
    newest = found()[-1]
    assert newest.info.run_name == "sizes · small · dataset path http://host/images" and "secret" not in str(newest.data.tags)
    assert {run.info.status for run in again} == {"FINISHED"}


def test_a_variant_that_shares_everything_links_to_it_and_has_its_scores(
    make_session: Callable[..., Session], local_store: ArtifactStore, uri: str, tmp_path: Path, found: Callable[[], list[Any]]
) -> None:
    tracked_at = replace(CONFIG, experiment=tmp_path.name)
    train, evaluate = Stage("train", 1, _measure, has_curves=True), Stage("evaluate", 1, _measure)
    nodes = [Node("train", train, PointConfig()), Node("evaluate", evaluate, PointConfig(), {"model": "train"})]
    config = RunConfig(name="sizes", tracking=tracked_at, variants={"twin": {"seed": 0}, "other": {"seed": 1}})
    with tracked.start(config, uri, "sizes.yaml", (), nodes) as models:
        main = models.by_variant[MAIN]
        driver.execute(nodes, make_session(local_store, run=main, tracking=tracked_at, models=models))
        main.log_metrics({"fid": 2.5})
        main.log_params({"model": "enat-1M"})
        assert models.without_nodes() == ["other", "twin"]
        models.link_all("twin", ["train", "evaluate"])
        models.link_all("other", ["shared"])  # nothing of a model
        main.finish()
    runs = {run.info.run_name: run for run in found()}
    assert set(runs) == {"sizes", "sizes · seed 0", "train", "evaluate"}
    twin = runs["sizes · seed 0"]
    links = {name: id for name, id in twin.data.tags.items() if name.startswith(model_runs.LINK)}
    assert links == {
        f"enat.run.{each}": runs[name].info.run_id for each, name in (("main", "sizes"), ("train",) * 2, ("evaluate",) * 2)
    }
    assert twin.data.metrics["fid"] == 2.5 and twin.data.params["model"] == "enat-1M" and twin.info.status == "FINISHED"
    assert twin.data.tags["enat.variant"] == "twin" and list(models.by_variant) == [MAIN, "twin"]


def test_a_run_with_curves_has_no_metrics_of_one_point_beside_them(
    execute: Callable[..., None], found: Callable[[], list[Any]]
) -> None:
    execute(_nodes())
    runs = {run.info.run_name: run.data for run in found()}
    assert runs["curve"].metrics == {"loss": 1.0} and runs["curve"].tags["enat.value.last"] == "1.0"
    assert float(runs["curve"].tags["enat.value.cost/seconds"]) > 0
    assert runs["shared"].metrics["last"] == 1.0 and "enat.value.last" not in runs["shared"].tags
    assert runs["curve@small"].params == {"value": "2.0"}, "only what differs from the defaults"


def test_a_failed_variant_has_the_error_and_other_models_are_not_marked_by_it(
    execute: Callable[..., None], found: Callable[[], list[Any]], uri: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="below 0"):
        execute(_nodes(small=-1.0))
    runs = {run.info.run_name: run for run in found()}
    status = {name: run.info.status for name, run in runs.items()}
    assert status == {
        "sizes": "FAILED",  # the command
        "sizes · small": "FAILED",
        "curve@small": "FAILED",
        "shared": "FINISHED",
        "curve": "FINISHED",
    }
    failed = runs["curve@small"]
    assert "below 0" in failed.data.tags["enat.error"] and failed.data.tags[tracking.NOTE].startswith("**Failed:** ")
    text = Path(MlflowClient(uri).download_artifacts(failed.info.run_id, tracking.ERROR_FILE, str(tmp_path))).read_text()
    assert "in _measure" in text and text.rstrip().endswith("is below 0") and len(text.splitlines()) <= 60
    assert "secret" not in text + str(failed.data.tags) and "host/images" in text


def test_without_a_record_of_the_artifact_reuse_has_a_run_of_its_own(
    execute: Callable[..., None], found: Callable[[], list[Any]], uri: str
) -> None:
    execute(_nodes())
    client = MlflowClient(uri)
    for run in found():
        client.delete_run(run.info.run_id)
    execute(_nodes())
    runs = {run.info.run_name: run.data.tags for run in found()}
    assert set(runs) == {"sizes", "sizes · small", "shared", "curve", "curve@small"}
    assert {tags["enat.reused"] for name, tags in runs.items() if not name.startswith("sizes")} == {"true"}


def test_titles_say_what_differs() -> None:
    assert model_runs.of_overrides(["generate.sampler.num_steps=12"]) == "12 steps"
    assert model_runs.of_overrides(["seed=1", "generate.sampler.guidance_scale=3"]) == "seed 1, guidance 3"
    assert model_runs.of_overrides(["train.num_steps=5", "train.flip=true"]) == "train num_steps 5, train flip true"
    assert model_runs.of_overrides(["a.b=1", "a.c=2", "a.d=3", "a.e=4"]) == "a c 2, a d 3, a e 4, 1 more"
    many = ["a.b=1", "generate.sampler.num_steps=12", "a.c=2", "a.d=3"]
    assert model_runs.of_overrides(many) == "12 steps, a c 2, a d 3, 1 more", "the last ones, which a sweep changes"
    assert model_runs.of_overrides(["workspace=/x", "tracking.uri=y", "train.execution.num_workers=4"]) is None
    assert model_runs.words(configuration.flat(SIZES["steps-12"])) == "12 steps"
    assert model_runs.words(configuration.flat(SIZES["small"])) is None, "the name of the variant says more"


def test_a_second_node_of_a_stage_belongs_to_its_variant() -> None:
    main, started = RunHandle("", None), {}

    def start(variant: str) -> RunHandle:
        started[variant] = RunHandle("", None)
        return started[variant]

    models = ModelRuns(main, start, ["a", "a-2"])
    assert models.of("train") is main and models.of("train-2") is main
    assert models.of("train@a-2") is started["a-2"] and models.of("train@a-3") is started["a"]
    assert set(started) == {"a", "a-2"}


def test_only_values_that_differ_from_defaults_are_changed() -> None:
    run = RunConfig(name="x", store="s3://bucket/store", seed=3)
    found = configuration.changed(run, RunConfig(name="x"))
    assert found == {"store": "s3://bucket/store", "seed": 3}
    assert configuration.changed(PointConfig(note="https://reader:secret@host/x", inner=("a",))) == {
        "note": "https://host/x",
        "inner": ["a"],
    }
