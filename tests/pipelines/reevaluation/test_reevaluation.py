"""Registered models are evaluated again when that is due, by what is there, and what moved is told: real MLflow, Ray and stages."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from layouts import open_dataset
from mlflow import MlflowClient
from rich.console import Console
from summaries import summary_of

from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cli.reevaluate import reevaluate as command
from pipelines.data.dataset import INDEX
from pipelines.data.samples import SamplesSummary
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.reevaluation import plan as reevaluation_plan
from pipelines.reevaluation import reevaluate, report
from pipelines.reevaluation.drift import Tolerances, find_drift
from pipelines.reevaluation.plan import Request
from pipelines.reevaluation.reevaluate import LEASE, Options, Outcome, exit_code
from pipelines.registry import evaluation_record, model_card
from pipelines.registry.evaluation_record import EvaluationRecord, EvaluationSummary
from pipelines.run import graph, runner
from pipelines.stages import generate
from pipelines.tracking import run as tracking
from pipelines.tracking import search
from pipelines.tracking.run import TrackingConfig
from pipelines.workflow import driver
from pipelines.workflow import provenance as workflow_provenance
from pipelines.workflow.stage import Node, PublishContext, StageContext, StageResult

MODEL = ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=2)
NAME = "enat-tiny-photographs"
CARD_SAMPLER = SamplerConfig(num_steps=2, guidance_scale=2.0)
LONG_AGO = "2026-01-02T03:04:05+00:00"


@dataclass(frozen=True)
class Lab:
    """A workspace with a store and a registry, and a config that says how to evaluate."""

    root: Path
    config: Path

    @property
    def store(self) -> ArtifactStore:
        return open_store(str(self.root / "store"))

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def copy(self, target: Path) -> Lab:
        """With another place, which has a registry of its own; what is registered says where it lay before."""
        return replace(self, root=Path(shutil.copytree(self.root, target / "lab")))

    def arguments(self, *overrides: str) -> list[str]:
        return [f"workspace={self.root}", f"store={self.root / 'store'}", *overrides]

    def request(self, *overrides: str, with_config: bool = True) -> Request:
        return Request.of(self.config if with_config else None, self.arguments(*overrides))

    def run(self, *overrides: str, with_config: bool = True, **options: Any) -> list[Outcome]:
        request = self.request(*overrides, with_config=with_config)
        return reevaluate.reevaluate(request, "a test", Options(**options), Console(file=io.StringIO()))

    def one(self, *overrides: str, **options: Any) -> Outcome:
        (outcome,) = self.run(*overrides, **options)
        return outcome

    def tags(self, name: str = NAME) -> dict[str, str]:
        return dict(self.client.get_model_version(name, "1").tags)

    def tag(self, **tags: str) -> None:
        version = search.read_version(self.uri, NAME, "1")
        search.tag_version(self.uri, version, {f"enat.{name}": value for name, value in tags.items()})

    def files(self) -> dict[str, int]:
        """Everything in the store but notes of use, with the time it was written."""
        paths = (path for path in (self.root / "store").rglob("*") if path.is_file() and path.name != ".used")
        return {str(path.relative_to(self.root)): path.stat().st_mtime_ns for path in paths}

    def stage_runs(self, stage: str) -> list[Any]:
        """MLflow's runs of a stage, newest first."""
        experiment = self.client.get_experiment_by_name("enat")
        filter_string = f"tags.`enat.stage` = '{stage}'"
        return list(self.client.search_runs([experiment.experiment_id], filter_string, order_by=["attributes.start_time DESC"]))


def _commit(store: ArtifactStore, stage: str, key: str, inputs: Mapping[str, Manifest], **fields: Any) -> Manifest:
    sources = {name: {"stage": source.stage, "key": source.key, "digest": source.digest} for name, source in inputs.items()}
    usual = {"config": {}, "files": ()}
    provenance = {"created": LONG_AGO, "code": "test", "seconds": 1.0, "worker_seconds": 2.0, "device_seconds": 0.0}
    return store.commit(
        Manifest(stage=stage, key=key, stage_version=1, inputs=sources, provenance=provenance, **{**usual, **fields})
    )


def _file(store: ArtifactStore, folder: Path, stage: str, key: str, name: str, module: torch.nn.Module) -> Any:
    save_weights(folder / name, module)
    return store.put_file(stage, key, name, folder / name)


def _register(lab: Lab, manifest: Manifest, inputs: Mapping[str, Manifest], name: str = NAME) -> None:
    run = tracking.start_run(lab.uri, TrackingConfig(), "train", {})
    tags = model_card.model_tags(manifest, inputs, lab.store.uri)
    assert run.register_model(name, {"README.md": b"a card"}, tags, "a card", "newest") == "1"
    run.finish()


@pytest.fixture(scope="module")
def registered(vqgan: VQGAN, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A model with the weights it began with, registered and never evaluated."""
    root = tmp_path_factory.mktemp("registered") / "lab"
    folder = tmp_path_factory.mktemp("weights")
    values = {
        "name": "tiny",
        "dataset": {"kind": "image_folder", "name": "photographs", "path": str(image_folder)},
        "reference": {"num_epochs": 1},
        "generate": {"num_samples": 16, "shard_size": 8, "sampler": {"num_steps": 3}},
    }
    config = folder / "tiny.yaml"
    config.write_text(json.dumps(values))
    lab = Lab(root, config)
    store = lab.store
    images = DatasetConfig(kind="image_folder", name="photographs", path=str(image_folder))
    index = open_dataset(images, open_store(str(folder / "store")))
    file = store.put_file("dataset", "d" * 64, INDEX, index.store.fetch(index.manifest, INDEX))
    known = {"config": dataclasses.asdict(images), "files": (file,), "summary": dict(index.manifest.summary)}
    dataset = _commit(store, "dataset", "d" * 64, {}, **known)
    weights = _file(store, folder, "tokenizer", "2" * 64, "vqgan.safetensors", vqgan)
    tokenizer = _commit(store, "tokenizer", "2" * 64, {}, files=(weights,), summary=summary_of("tokenizer", config=vqgan.config))
    token_map = _commit(
        store,
        "token_map",
        "3" * 64,
        {"tokenizer": tokenizer, "dataset": dataset},
        summary=summary_of("token_map", rows=12),
        metrics={"rows": 12.0},
    )
    inputs = {"token_map": token_map, "tokenizer": tokenizer}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ENAT(MODEL).eval()
    manifest = _commit(
        store,
        "train",
        "1" * 64,
        inputs,
        files=(_file(store, folder, "train", "1" * 64, "model.safetensors", model),),
        config={
            "model": {"preset": None},
            "masking": {"alpha": 12.0, "beta": 3.0, "reuse_probability": 0.5},
            "sampler": dataclasses.asdict(CARD_SAMPLER),
        },
        summary={
            "model": dataclasses.asdict(MODEL),
            "parameters": 1234,
            "tokenizer_digest": tokenizer.digest,
            "num_steps": 70,
            "dataset": "photographs",
            "is_imported": False,
        },
    )
    _register(lab, manifest, inputs)
    return lab


@pytest.fixture(scope="module")
def evaluated(registered: Lab, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Outcome]:
    lab = registered.copy(tmp_path_factory.mktemp("evaluated"))
    return lab, lab.one()


@pytest.fixture
def lab(evaluated: tuple[Lab, Outcome], tmp_path: Path) -> Lab:
    """A copy of an evaluated model's workspace, to change."""
    return evaluated[0].copy(tmp_path)


def replace_stage(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    parts = [replace(part, stage=replace(part.stage, **fields)) if part.stage.name == name else part for part in graph.GRAPH]
    monkeypatch.setattr(graph, "GRAPH", tuple(parts))


@dataclass
class Light:
    """Sampling and scoring that say what they are told to, at once. error: raised in place of the next sampling."""

    now: dict[str, float]
    error: BaseException | None = None
    num_runs: int = 0


@pytest.fixture
def light(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Light:
    """In place of the stages' own code: keys, artifacts, tags and tracking stay what they are. At first with equal scores."""
    manifest = lab.store.read_manifest(*EvaluationRecord.of(lab.tags()).evaluation.split("/"))
    samples = SamplesSummary.read(lab.store.read_manifest("generate", manifest.inputs["samples"]["key"]))
    evaluation = EvaluationSummary.read(manifest)
    told = Light(dict(manifest.metrics))

    def sample(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        told.num_runs += 1
        if (error := told.error) is not None:
            told.error = None
            raise error
        file = context.write("samples", lambda path: path.write_text("samples"))
        return StageResult(files=[file], summary=replace(samples, num_samples=config.num_samples))

    def score(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        protocol = evaluation_protocol.protocol_of(inputs["reference"], inputs["samples"], config.settings)
        summary = replace(evaluation, protocol=protocol, protocol_digest=evaluation_protocol.protocol_digest(protocol))
        return StageResult(files=[], summary=summary, metrics=told.now)

    replace_stage(monkeypatch, "generate", run=sample, files=())
    replace_stage(monkeypatch, "evaluate", run=score, publish=None)
    return told


# Evaluating -----------------------------------------------------------------------------------------------------------------


def test_a_model_that_was_never_evaluated_is(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    assert (outcome.verdict, outcome.note, outcome.num_computed) == ("evaluated", "never evaluated", 4), outcome.note
    assert outcome.worker_seconds > 0 and outcome.was == {}
    stage, _, key = outcome.evaluation.partition("/")
    manifest = lab.store.read_manifest(stage, key)
    assert manifest.inputs["model"]["key"] == "1" * 64 and manifest.summary["num_samples"] == 16
    assert outcome.now == {name: value for name, value in manifest.metrics.items() if name in evaluation_protocol.SCORES}
    assert outcome.now["frechet_distance"] > 0
    assert {path.name for path in (lab.root / "store" / "train").iterdir()} == {"1" * 64}, "nothing is trained"


def test_artifacts_have_the_keys_by_which_a_run_finds_them(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    model = lab.store.read_manifest("train", "1" * 64)
    run = lab.request().config
    node = Node("generate", generate.STAGE, replace(run.generate, seed=0, dataset=run.dataset), {"model": "train"})
    key = driver.stage_key(node, {"model": model})
    assert lab.store.read_manifest("generate", key).summary["num_samples"] == 16
    samples = lab.store.read_manifest("evaluate", outcome.evaluation.partition("/")[2]).inputs["samples"]
    assert samples["key"] == key


def test_the_version_says_what_was_found_and_when(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    tags = lab.tags()
    recorded = EvaluationRecord.of(tags)
    assert recorded.scores == outcome.now and recorded.evaluation == outcome.evaluation and recorded.node == "evaluate"
    assert abs(datetime.now(UTC) - recorded.evaluated) < timedelta(minutes=5)
    manifest = lab.store.read_manifest(*outcome.evaluation.split("/"))
    assert tags["enat.protocol_digest"] == manifest.summary["protocol_digest"]
    assert tags["enat.artifact"] == "train/" + "1" * 64 and LEASE not in tags and "enat.drift" not in tags


def test_the_evaluation_is_tracked_where_comparisons_look(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    (run,) = lab.stage_runs("evaluate")
    assert run.info.status == "FINISHED" and run.data.metrics["frechet_distance"] == outcome.now["frechet_distance"]
    assert run.data.tags["enat.model_version"] == "1" and "enat.protocol" in run.data.tags
    parent = lab.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == f"{NAME}-v1"
    assert lab.client.get_run(parent.data.tags["mlflow.parentRunId"]).info.run_name == "reevaluate"


@pytest.mark.parametrize("with_config", [True, False])
def test_what_was_evaluated_is_fresh_and_nothing_is_done(lab: Lab, with_config: bool) -> None:
    before, tags = lab.files(), lab.tags()
    outcome = lab.one(with_config=with_config)
    assert outcome.verdict == "fresh" and exit_code([outcome]) == 0
    assert lab.files() == before and lab.tags() == tags


def test_an_evaluation_as_before_needs_no_dataset(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DatasetConfig, "identity", None)  # which would list its files
    assert lab.one(with_config=False).verdict == "fresh"


def test_an_old_evaluation_is_measured_anew_and_compared(lab: Lab, light: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    state = workflow_provenance.CodeState(version="1.0", commit="a" * 40, diff_digest=None, digest="c" * 64)
    monkeypatch.setattr(workflow_provenance, "read_state", lambda: state)  # as in a job
    monkeypatch.setattr(workflow_provenance, "code_version", lambda: state.label)
    lab.tag(evaluated=LONG_AGO)
    recorded = EvaluationRecord.of(lab.tags())
    assert lab.one(with_config=False).verdict == "fresh", "no limit is given"
    outcome = lab.one(with_config=False, older_than=30 * 86400.0)
    assert (outcome.verdict, outcome.num_computed, light.num_runs) == ("evaluated", 2, 1), outcome.note
    assert "computed again, nothing moved" in outcome.note and outcome.was == outcome.now == recorded.scores
    found = EvaluationRecord.of(lab.tags())
    assert found == replace(recorded, evaluated=found.evaluated) and datetime.now(UTC) - found.evaluated < timedelta(minutes=5)
    assert lab.one(with_config=False, older_than=30 * 86400.0).verdict == "fresh" and light.num_runs == 1
    experiment = lab.client.get_experiment_by_name("enat")
    (run,) = lab.client.search_runs([experiment.experiment_id], "run_name = 'reevaluate'", max_results=1)
    assert state.tags.items() <= run.data.tags.items()


def test_an_old_evaluation_that_is_no_longer_found_is_drift(lab: Lab, light: Light) -> None:
    lab.tag(evaluated=LONG_AGO)
    recorded = EvaluationRecord.of(lab.tags())
    light.now["frechet_distance"] *= 1.1
    outcome = lab.one(with_config=False, older_than=86400.0)
    assert (outcome.verdict, exit_code([outcome])) == ("drift", 3) and "(+10 %)" in outcome.note
    found = EvaluationRecord.of(lab.tags())
    assert found.drift == outcome.note and found.scores == recorded.scores, "what was recorded stays the measure"


def test_what_is_there_already_is_as_old_as_it_is(lab: Lab, light: Light) -> None:
    """Nothing is measured, so nothing is younger for it."""
    stage, key = EvaluationRecord.of(lab.tags()).evaluation.split("/")
    manifest = lab.store.read_manifest(stage, key)
    lab.store.delete_manifest(stage, key)
    lab.store.commit(replace(manifest, provenance={**manifest.provenance, "created": LONG_AGO}))
    version = search.read_version(lab.uri, NAME, "1")
    search.tag_version(lab.uri, version, {name: None for name in version.tags if name.startswith("enat.eval")})
    outcome = lab.one()
    assert (outcome.verdict, outcome.num_computed, light.num_runs) == ("evaluated", 0, 0)
    assert outcome.note == "never evaluated; everything was reused"
    assert EvaluationRecord.of(lab.tags()).evaluated.isoformat() == LONG_AGO
    assert lab.one(older_than=86400.0, is_dry_run=True).verdict == "due"


@pytest.mark.parametrize(
    ("overrides", "moves", "verdict"),
    [
        ((), 1.1, "drift"),
        (("generate.sampler.num_steps=5",), 1.1, "evaluated"),
        (("generate.num_samples=24",), 1.1, "evaluated"),
    ],
)
def test_where_the_artifact_is_gone_what_is_recorded_is_compared_with(
    lab: Lab, light: Light, overrides: tuple[str, ...], moves: float, verdict: str
) -> None:
    recorded = EvaluationRecord.of(lab.tags())
    lab.store.delete_manifest(*recorded.evaluation.split("/"))
    light.now["frechet_distance"] *= moves
    outcome = lab.one(*overrides)
    assert outcome.verdict == verdict and outcome.was == recorded.scores
    assert outcome.note.startswith("frechet_distance" if verdict == "drift" else "its evaluation is gone from the store")
    assert ("not comparable" in outcome.note) == bool(overrides)
    assert ("enat.drift" in lab.tags()) == (verdict == "drift")


def test_an_evaluation_that_is_due_is_kept_from_collection(lab: Lab) -> None:
    stage, _, key = EvaluationRecord.of(lab.tags()).evaluation.partition("/")
    note = lab.root / "store" / stage / key / ".used"
    os.utime(note, (0, 0))
    lab.one(with_config=False, is_dry_run=True)
    assert note.stat().st_mtime == 0
    lab.one(with_config=False)
    assert time.time() - note.stat().st_mtime < 300
    assert (("train", "1" * 64)) in lab.store.recorded_inputs(stage, key)


# What is due ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("generate.num_samples=24", "generate.num_samples is 24, was 16"),
        ("generate.sampler.num_steps=5", "generate.sampler.num_steps is 5, was 3"),
        ("evaluate.settings.num_splits=2", "evaluate.settings.num_splits is 2, was 10"),
        ("reference.num_epochs=2", "another reference"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_an_evaluation_by_other_settings_is_due_and_it_is_said_which(
    evaluated: tuple[Lab, Outcome], override: str, reason: str, with_config: bool
) -> None:
    outcome = evaluated[0].one(override, with_config=with_config, is_dry_run=True)
    assert (outcome.verdict, outcome.note) == ("due", reason)
    assert outcome.was["frechet_distance"] > 0


def test_how_it_is_computed_makes_nothing_due(evaluated: tuple[Lab, Outcome]) -> None:
    overrides = ("generate.execution.worker_batch_size=3", "evaluate.execution.num_workers=2", "generate.execution.num_workers=2")
    for with_config in (True, False):
        assert evaluated[0].one(*overrides, with_config=with_config, is_dry_run=True).verdict == "fresh"


def test_a_dry_run_writes_nothing(registered: Lab) -> None:
    before, tags = registered.files(), registered.tags()
    outcome = registered.one(is_dry_run=True)
    assert (outcome.verdict, outcome.note) == ("due", "never evaluated")
    assert registered.files() == before and registered.tags() == tags
    assert not registered.stage_runs("evaluate")


@pytest.mark.faults
def test_without_a_config_a_first_evaluation_goes_by_the_card_and_the_dataset(registered: Lab) -> None:
    request = registered.request("generate.num_samples=30", with_config=False)
    version = search.read_version(registered.uri, NAME, "1")
    model = reevaluation_plan.open_model(version, request.config)
    plan = reevaluation_plan.make_plan(model, None, request)
    by_id = {node.id: node for node in plan.nodes}
    assert [node.id for node in plan.nodes] == ["dataset", "reference", "generate", "evaluate"]
    assert by_id["generate"].config.sampler == CARD_SAMPLER and by_id["generate"].config.num_samples == 30
    assert by_id["dataset"].config.name == "photographs" and by_id["reference"].config.resolution == 16


def test_weights_from_elsewhere_need_to_be_told_what_they_are_compared_with(registered: Lab) -> None:
    request = registered.request(with_config=False)
    model = reevaluation_plan.open_model(search.read_version(registered.uri, NAME, "1"), request.config)
    inputs = {"tokenizer": model.manifest.inputs["tokenizer"]}
    with pytest.raises(ValueError, match="trained on is not known here; give a CONFIG"):
        reevaluation_plan.make_plan(replace(model, manifest=replace(model.manifest, inputs=inputs)), None, request)


@pytest.mark.faults
def test_an_evaluation_that_is_gone_is_made_again_only_where_it_is_said_how(lab: Lab) -> None:
    lab.store.delete_manifest(*EvaluationRecord.of(lab.tags()).evaluation.split("/"))
    outcome = lab.one(with_config=False)
    assert outcome.verdict == "failed" and "give a CONFIG" in outcome.note and exit_code([outcome]) == 1
    outcome = lab.one(is_dry_run=True)
    assert (outcome.verdict, outcome.note) == ("due", "its evaluation is gone from the store")


@pytest.mark.faults
def test_scores_that_are_defined_otherwise_are_computed_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = EvaluationRecord.of(lab.tags())
    monkeypatch.setattr(evaluation_protocol, "METRIC_VERSION", 99)
    # The stage writes its protocol in the driver, so that it sees the same version.
    outcome = lab.one(with_config=False)
    assert (outcome.verdict, outcome.num_computed, outcome.moved) == ("evaluated", 1, ())
    assert "another metric version" in outcome.note and "not comparable" in outcome.note
    after = EvaluationRecord.of(lab.tags())
    assert after.evaluation != before.evaluation
    manifest = lab.store.read_manifest(*after.evaluation.split("/"))
    assert manifest.summary["protocol"]["metric_version"] == "99"
    assert lab.one(with_config=False).verdict == "fresh"


# Drift ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("options", [{"is_fresh": True}, {"older_than": 86400.0}])
def test_computed_anew_nothing_moves_and_nothing_is_overwritten(lab: Lab, options: dict[str, Any]) -> None:
    before, recorded = lab.files(), EvaluationRecord.of(lab.tags())
    lab.tag(drift="fid 1 -> 2", evaluated=LONG_AGO)
    outcome = lab.one(with_config=False, **options)
    assert (outcome.verdict, outcome.num_computed, outcome.moved) == ("evaluated", 2, ()), outcome.note
    assert outcome.now == outcome.was == recorded.scores, "the same bits"
    after = lab.files()
    assert {path: after[path] for path in before} == before
    assert {Path(path).parts[1] for path in after.keys() - before.keys()} == {"fresh-generate", "fresh-evaluate"}
    found = EvaluationRecord.of(lab.tags())
    assert found.evaluation == recorded.evaluation and found.drift is None and found.evaluated.year > 2025
    assert lab.stage_runs("fresh-evaluate")[0].data.tags["enat.is_check"] == "true"


@pytest.mark.faults
def test_a_changed_result_is_drift(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of stage generate that draws otherwise, of a version that says so."""

    def run(config: Any, inputs: Any, context: Any) -> Any:
        return generate.run(replace(config, seed=config.seed + 1), inputs, context)

    replace_stage(monkeypatch, "generate", version=1000, run=run)
    recorded = EvaluationRecord.of(lab.tags())
    outcome = lab.one(with_config=False)
    assert (outcome.verdict, exit_code([outcome])) == ("drift", 3), outcome.note
    assert outcome.was == recorded.scores != outcome.now
    assert "kernel_distance" in {moved.metric for moved in outcome.moved}
    tags = lab.tags()
    assert tags["enat.drift"] == outcome.note and tags["enat.evaluation"] == outcome.evaluation != recorded.evaluation
    assert lab.stage_runs("evaluate")[0].data.tags["enat.drift"] == outcome.note
    again = lab.one(with_config=False)
    assert again.verdict == "fresh" and outcome.note in again.note, "it stays written until a measurement finds none"
    check = lab.one(with_config=False, older_than=0.0)
    assert check.verdict == "evaluated" and check.was == check.now == outcome.now, "that is what it is measured to be now"
    assert "enat.drift" not in lab.tags()
    text = report.to_json([outcome])
    assert text["exit_code"] == 3 and json.loads(json.dumps(text, allow_nan=False)) == text
    assert text["models"][0]["drift"]["kernel_distance"]["tolerance"] == 0.01


SCORES = st.dictionaries(st.sampled_from([*evaluation_protocol.SCORES, "images_per_second"]), st.floats(-1e6, 1e6), min_size=1)


@given(SCORES, st.floats(0, 10))
def test_equal_scores_never_drift_and_costs_are_none(scores: dict[str, float], tolerance: float) -> None:
    assert find_drift(scores, scores, Tolerances(tolerance)) == []
    others = {name: value + 1 for name, value in scores.items()}
    assert {
        moved.metric for moved in find_drift(scores, others, Tolerances(0))
    } == scores.keys() & evaluation_protocol.SCORES.keys()


@pytest.mark.parametrize(
    ("was", "now", "moves"),
    [
        (10.0, 10.1, False),
        (10.0, 10.1005, True),
        (10.0, 9.89, True),
        (-2.0, -2.01, False),
        (0.0, 0.0, False),
        (0.0, 1e-9, True),
        (1.0, math.nan, True),
    ],
)
def test_a_score_moves_by_more_than_its_tolerance(was: float, now: float, moves: bool) -> None:
    assert bool(find_drift({"fid": was}, {"fid": now}, Tolerances(0.01))) == moves


def test_tolerances_are_given_for_all_metrics_or_by_name() -> None:
    tolerances = Tolerances.parse(["0.2", "kid=0.5", "recall=inf"])
    assert (tolerances.of("fid"), tolerances.of("kid")) == (0.2, 0.5)
    now = dict.fromkeys(("kid", "recall", "fid"), 1.4)
    assert [moved.metric for moved in find_drift(dict.fromkeys(now, 1.0), now, tolerances)] == ["fid"]
    assert Tolerances.parse([]).of("fid") == 0.01
    for wrong in ("a lot", "-1", "fid=nan", "loss=0.1"):
        with pytest.raises(ValueError, match="--tolerance"):
            Tolerances.parse([wrong])


# Several models, several processes ----------------------------------------------------------------------------------------


def _second(lab: Lab, name: str, **tags: str) -> None:
    """Another registered model, which is the same artifact but for its tags."""
    found = lab.tags()
    run = tracking.start_run(lab.uri, TrackingConfig(), "train", {})
    kept = {name: found[name] for name in ("enat.digest", "enat.created", "enat.artifact", "enat.store")}
    run.register_model(name, {"README.md": b""}, {**kept, **tags}, "", "newest")
    run.finish()


def test_a_model_that_fails_does_not_stop_the_others(lab: Lab) -> None:
    _second(lab, "enat-a-lost", **{"enat.artifact": "train/" + "9" * 64})
    lost, found = lab.run(with_config=False)
    assert lost.verdict == "failed" and f"train/{'9' * 12} is not in {lab.root / 'store'} or " in lost.note
    assert found.verdict == "fresh" and exit_code([lost, found]) == 1
    console = Console(file=io.StringIO(), width=200)
    report.show([lost, found], console)
    shown = console.file.getvalue()
    assert "failed: enat-a-lost version 1: train/" in shown and f"fresh: {NAME} version 1: evaluated" in shown


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """Of a run, as commands write it."""
    loggers = [logging.getLogger(), logging.getLogger("pipelines")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    runner.log_to(tmp_path / "logs" / "run.log")
    yield tmp_path / "logs" / "run.log"
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


def _terminal_status(lab: Lab) -> dict[str, str]:
    """Of all runs in MLflow, by name: that of the newest one."""
    experiment = lab.client.get_experiment_by_name("enat")
    found = lab.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return {run.info.run_name: run.info.status for run in found}


def test_a_model_that_fails_while_it_is_evaluated_does_not_stop_the_next(
    lab: Lab, light: Light, log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {key: value for key, value in lab.tags().items() if key.startswith(("enat.eval", "enat.protocol", "enat.score"))}
    _second(lab, "enat-a-first", **{**own, "enat.evaluated": LONG_AGO})
    light.error = RuntimeError("no luck")
    failed, evaluated = lab.run(with_config=False, older_than=0.0)
    assert (failed.version.name, failed.verdict, evaluated.verdict) == ("enat-a-first", "failed", "evaluated")
    assert "stage generate failed: RuntimeError: no luck" in failed.note and light.num_runs == 2
    assert EvaluationRecord.of(lab.tags("enat-a-first")).evaluated.isoformat() == LONG_AGO and LEASE not in lab.tags("enat-a-first")
    status = _terminal_status(lab)
    assert (status["reevaluate"], status["enat-a-first-v1"], status[f"{NAME}-v1"]) == ("FAILED", "FAILED", "FINISHED")
    logged = log_file.read_text()
    assert "enat-a-first version 1 failed\nTraceback" in logged and "raise error\nRuntimeError: no luck" in logged
    assert capsys.readouterr().err == "", "people are told in one line"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(15)])
def test_no_run_looks_as_if_it_went_on_after_an_interruption(lab: Lab, light: Light, interruption: BaseException) -> None:
    light.error = interruption
    with pytest.raises(type(interruption)):
        lab.one(with_config=False, older_than=0.0)
    status = _terminal_status(lab)
    assert {status[name] for name in ("reevaluate", f"{NAME}-v1", "generate")} == {"KILLED"}
    assert LEASE not in lab.tags()


def test_which_models_are_meant(lab: Lab) -> None:
    for name in ("nat-s-photographs", "other-model"):
        _second(lab, name)
    client = lab.client
    client.create_registered_model("enat-by-hand")
    client.create_model_version("enat-by-hand", "runs:/0/model", await_creation_for=0)
    client.set_registered_model_alias("enat-by-hand", "newest", "1")
    client.set_registered_model_alias(NAME, "best", "1")
    names = lambda **options: [outcome.version.name for outcome in lab.run(is_dry_run=True, **options)]  # noqa: E731
    assert names() == [NAME, "nat-s-photographs"]
    assert names(match=("*-photographs",)) == [NAME, "nat-s-photographs"] and names(match=("other*",)) == ["other-model"]
    assert names(alias="best") == [NAME]
    with pytest.raises(ValueError, match=r"no registered model that matches .* has the alias worst"):
        names(alias="worst")
    with pytest.raises(ValueError, match=r"no registered model that matches enat-x\* has the alias newest"):
        names(match=("enat-x*",))


def test_what_was_never_evaluated_comes_first_then_the_oldest(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own = lab.tags()
    for name, moment in (("enat-b", "2026-03-01T00:00:00+00:00"), ("enat-a", "2026-05-01T00:00:00+00:00")):
        recorded = {key: value for key, value in own.items() if key.startswith("enat.eval")}
        _second(lab, name, **{**recorded, "enat.evaluated": moment})
    _second(lab, "nat-new")
    seen: list[str] = []
    verdicts = {"nat-new": "failed", "enat-b": "drift", "enat-a": "evaluated", NAME: "evaluated"}

    def evaluate(self: Any, case: Any) -> Outcome:
        seen.append(case.model.version.name)
        return Outcome(version=case.model.version, verdict=verdicts[case.model.version.name])

    monkeypatch.setattr(reevaluate._Evaluator, "evaluate", evaluate)
    outcomes = lab.run(older_than=0.0, limit=2)
    assert seen == ["nat-new", "enat-b", "enat-a"], "one that fails takes no other's place"
    assert {outcome.version.name: outcome.verdict for outcome in outcomes}[NAME] == "due"
    verdicts |= {"nat-new": "busy", "enat-b": "fresh"}
    seen.clear()
    lab.run(older_than=0.0, limit=1)
    assert seen == ["nat-new", "enat-b", "enat-a"]


def _lease(pid: int, hours: float = 1, host: str | None = None) -> str:
    until = datetime.now(UTC) + timedelta(hours=hours)
    return f"{host or socket.gethostname()} {pid} {until.isoformat(timespec='seconds')}"


def test_a_model_that_another_process_evaluates_is_left_to_it(lab: Lab, light: Light) -> None:
    lab.tag(lease=_lease(1, host="elsewhere"))
    outcome = lab.one(older_than=0.0)
    assert (outcome.verdict, outcome.note) == ("busy", "process 1 on elsewhere is at it") and exit_code([outcome]) == 0
    lab.tag(lease=_lease(1, hours=-1, host="elsewhere"))
    assert lab.one(older_than=0.0).verdict == "evaluated" and LEASE not in lab.tags()


def test_a_lease_ends_with_its_process_or_its_time() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert reevaluate._holder_of(_lease(ended.pid)) is None
    assert reevaluate._holder_of(_lease(os.getpid())) == f"process {os.getpid()} on {socket.gethostname()}"
    for nobody in (None, "", "someone", "a b c", _lease(os.getpid(), hours=-1)):
        assert reevaluate._holder_of(nobody) is None


@pytest.mark.faults
def test_what_another_process_evaluated_meanwhile_is_not_evaluated_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.tag(evaluated=LONG_AGO)
    examine = reevaluate._examine

    def and_then_another_evaluates(*arguments: Any) -> Any:
        case = examine(*arguments)
        lab.tag(evaluated=datetime.now(UTC).isoformat(timespec="seconds"))
        return case

    monkeypatch.setattr(reevaluate, "_examine", and_then_another_evaluates)
    for options in ({"older_than": 86400.0}, {"older_than": 86400.0, "is_fresh": True}):
        lab.tag(evaluated=LONG_AGO)
        outcome = lab.one(**options)
        assert (outcome.verdict, outcome.note) == ("fresh", "evaluated meanwhile by another process")
    assert LEASE not in lab.tags()


@pytest.mark.faults
def test_two_processes_that_evaluate_the_same_model_agree(registered: Lab, tmp_path: Path) -> None:
    lab = registered.copy(tmp_path)
    code = "from pipelines.cli.main import main; main()"
    for attempt, extra in enumerate((["--json"], ["--json", "--fresh"])):
        command_line = [sys.executable, "-c", code, "reevaluate", str(lab.config), *lab.arguments(), *extra]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        both = [
            subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in "ab"
        ]
        said = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        verdicts = {json.loads(out)["models"][0]["verdict"] for out, _ in said}
        assert verdicts <= {"evaluated", "busy", "fresh"} and "evaluated" in verdicts, attempt
        assert LEASE not in lab.tags()
        recorded = EvaluationRecord.of(lab.tags())
        manifest = lab.store.read_manifest(*recorded.evaluation.split("/"))
        for record in (*manifest.files, *manifest.records):
            lab.store.fetch(manifest, record.name)
        assert recorded.scores["frechet_distance"] == manifest.metrics["frechet_distance"]


@pytest.mark.faults
def test_two_processes_without_a_lease_do_the_same_work_and_agree(registered: Lab, tmp_path: Path) -> None:
    """The lease saves work; artifacts and tags are the same without it."""
    lab = registered.copy(tmp_path)
    code = (
        "import os, sys, json; from pathlib import Path; from rich.console import Console\n"
        "from pipelines.cluster import connection; connection.prepare_environment()\n"
        "from pipelines.reevaluation import reevaluate; from pipelines.reevaluation.plan import Request\n"
        "reevaluate.LEASE = f'enat.lease-{os.getpid()}'\n"
        "reevaluate._Evaluator._meanwhile = lambda self, case, tags: case\n"
        "request = Request.of(Path(sys.argv[1]), sys.argv[2:])\n"
        "(outcome,) = reevaluate.reevaluate(request, 'test', reevaluate.Options(), Console(stderr=True))\n"
        "print(json.dumps([outcome.verdict, outcome.note, outcome.evaluation, dict(outcome.now)]))"
    )
    command_line = [sys.executable, "-c", code, str(lab.config), *lab.arguments()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    both = [subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True, env=environment) for _ in "ab"]
    said = [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in both]
    assert {each[0] for each in said} <= {"evaluated", "fresh"}, said
    assert said[0][2:] == said[1][2:] and said[0][2] == EvaluationRecord.of(lab.tags()).evaluation
    assert len(list((lab.root / "store" / "evaluate").iterdir())) == 1


# What a run writes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Record an evaluation as stage evaluate publishes it."""
    monkeypatch.setattr(model_card, "registered_name", lambda manifest: NAME)
    store = lab.store
    manifest = store.read_manifest(*EvaluationRecord.of(lab.tags()).evaluation.split("/"))
    inputs = {name: store.read_manifest(source["stage"], source["key"]) for name, source in manifest.inputs.items()}

    def publish(node: str = "evaluate", key: str | None = None, created: str = LONG_AGO, **metrics: float) -> None:
        made = {**manifest.provenance, "created": created}
        changed = replace(manifest, key=key or manifest.key, provenance=made, metrics=metrics or manifest.metrics)
        run = tracking.start_run(lab.uri, TrackingConfig(), node, {})
        context = PublishContext(store=store, run=run, tracking=TrackingConfig(), node=node)
        evaluation_record.record(changed, inputs, context, evaluation_protocol.SCORES)
        evaluation_record.record(
            changed, {**inputs, "model": replace(inputs["model"], files=())}, context, evaluation_protocol.SCORES
        )

    return publish


def test_a_run_records_its_evaluation_and_reuse_makes_it_no_older(lab: Lab, publish: Callable[..., None]) -> None:
    before = EvaluationRecord.of(lab.tags())
    publish()
    assert EvaluationRecord.of(lab.tags()) == before, "it was found to be right later than it was made"
    publish(key="8" * 64, created="2026-02-03T04:05:06+00:00", fid=3.25, images_per_second=4.0)
    after = EvaluationRecord.of(lab.tags())
    assert after.evaluation == "evaluate/" + "8" * 64 and after.scores == {"fid": 3.25}, "scores of the earlier one are gone"
    assert after.evaluated == datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


def test_a_variant_that_samples_otherwise_does_not_replace_the_run_s_own(lab: Lab, publish: Callable[..., None]) -> None:
    before = lab.tags()
    publish("evaluate@few-steps", key="8" * 64, fid=1.0)
    assert lab.tags() == before
    lab.tag(evaluation_node="evaluate@few-steps")
    publish("evaluate@few-steps", key="8" * 64, fid=1.0)
    assert EvaluationRecord.of(lab.tags()).scores == {"fid": 1.0}
    publish("evaluate@other", key="7" * 64, fid=2.0)
    assert EvaluationRecord.of(lab.tags()).scores == {"fid": 1.0}
    publish("evaluate", key="6" * 64, fid=3.0)
    assert EvaluationRecord.of(lab.tags()).scores == {"fid": 3.0}


def test_tags_of_someone_else_are_no_record() -> None:
    assert (
        EvaluationRecord.of({}) is None
        and EvaluationRecord.of({"enat.evaluated": "yesterday", "enat.evaluation": "evaluate/1"}) is None
    )
    assert EvaluationRecord.of({"enat.evaluated": LONG_AGO}) is None


# The command ----------------------------------------------------------------------------------------------------------------


def test_the_command_answers_as_json(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    result = CliRunner().invoke(command, [str(lab.config), "--dry-run", "--json", *lab.arguments()], catch_exceptions=False)
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["counts"] == {"fresh": 1}
    (model,) = answer["models"]
    assert (model["model"], model["version"], model["evaluation"]) == (NAME, "1", outcome.evaluation)
    assert model["was"] == outcome.now


def test_the_command_says_what_is_due_in_a_table(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    result = CliRunner().invoke(command, ["--dry-run", "--older-than", "0s", *lab.arguments()], catch_exceptions=False)
    assert f"{outcome.now['frechet_distance']:.5g}" in result.stdout and "due: " in result.stdout
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a.yaml", "b.yaml"], "give one CONFIG, not a.yaml and b.yaml"),
        (["--older-than", "long"], "'long' is not an age"),
        (["--tolerance", "fid=much"], "--tolerance fid=much is not a number"),
        (["generate.num_sample=3"], "did you mean generate.num_samples?"),
        (["no-such.yaml"], "the config file no-such.yaml does not exist"),
        (["workspace=/nowhere"], "no runs are tracked at sqlite:////nowhere/mlflow.db"),
    ],
)
def test_bad_input_is_said_in_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(command, ["--dry-run", *arguments])
    assert sentence in (result.stderr + str(result.exception))
    assert isinstance(result.exception, ValueError | SystemExit)


def test_exit_codes_put_failure_before_drift(registered: Lab) -> None:
    version = search.read_version(registered.uri, NAME, "1")
    outcomes = {name: Outcome(version=version, verdict=name) for name in ("fresh", "due", "busy", "evaluated", "drift", "failed")}
    assert exit_code([outcomes[name] for name in ("fresh", "due", "busy", "evaluated")]) == 0
    assert exit_code([outcomes["drift"], outcomes["evaluated"]]) == 3
    assert exit_code(list(outcomes.values())) == 1
