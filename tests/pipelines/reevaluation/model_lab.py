"""A registered model in a workspace of its own, evaluated once by the real stages; and stages that answer at once."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN
from material.layouts import open_dataset
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import INDEX
from pipelines.data.samples import SamplesSummary
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.reevaluation import reevaluate
from pipelines.reevaluation.plan import Request
from pipelines.reevaluation.reevaluate import Options, Outcome
from pipelines.registry import model_card
from pipelines.registry.evaluation_record import EvaluationRecord, EvaluationSummary
from pipelines.run import graph
from pipelines.tracking import run as tracking
from pipelines.tracking import search
from pipelines.tracking.run import TrackingConfig
from pipelines.workflow.stage import StageContext, StageResult

MODEL = ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=2)
NAME = "enat-tiny-photographs"
CARD_SAMPLER = SamplerConfig(num_steps=2, guidance_scale=2.0)
LONG_AGO = "2026-01-02T03:04:05+00:00"


@dataclass(frozen=True)
class Lab:
    """A workspace with a store and a registry, and a config for evaluations."""

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
        """A copy of the workspace with a registry of its own. Registered versions name the store of the original."""
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
        """Everything in the store but notes of use and logs, with the time it was written."""
        paths = (path for path in (self.root / "store").rglob("*") if path.is_file() and path.name != ".used")
        paths = (path for path in paths if ".logs" not in path.parts)
        return {str(path.relative_to(self.root)): path.stat().st_mtime_ns for path in paths}

    def stage_runs(self, stage: str) -> list[Any]:
        """MLflow's runs of a stage, newest first."""
        return self.search(f"tags.`enat.stage` = '{stage}'", order_by=["attributes.start_time DESC"])

    def search(self, filter_string: str = "", **options: Any) -> list[Any]:
        experiment = self.client.get_experiment_by_name("enat")
        return list(self.client.search_runs([experiment.experiment_id], filter_string, **options))


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


def register_again(lab: Lab, name: str, **tags: str) -> None:
    """Register the same artifact under another name, with other tags."""
    found = lab.tags()
    run = tracking.start_run(lab.uri, TrackingConfig(), "train", {})
    kept = {name: found[name] for name in ("enat.digest", "enat.created", "enat.artifact", "enat.store")}
    run.register_model(name, {"README.md": b""}, {**kept, **tags}, "", "newest")
    run.finish()


@pytest.fixture(scope="module")
def registered(vqgan: VQGAN, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A model with its initial weights, registered and never evaluated."""
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
    rows = {"summary": summary_of("token_map", rows=12), "metrics": {"rows": 12.0}}
    token_map = _commit(store, "token_map", "3" * 64, {"tokenizer": tokenizer, "dataset": dataset}, **rows)
    inputs = {"token_map": token_map, "tokenizer": tokenizer}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ENAT(MODEL).eval()
    masking = {"alpha": 12.0, "beta": 3.0, "reuse_probability": 0.5}
    known = {"tokenizer_digest": tokenizer.digest, "num_steps": 70, "dataset": "photographs"}
    manifest = _commit(
        store,
        "train",
        "1" * 64,
        inputs,
        files=(_file(store, folder, "train", "1" * 64, "model.safetensors", model),),
        config={"model": {"preset": None}, "masking": masking, "sampler": dataclasses.asdict(CARD_SAMPLER)},
        summary=summary_of("train", model=MODEL, **known),
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
    """Replaces sampling and scoring. now: the scores that they return.   error: raised by the next sampling."""

    now: dict[str, float]
    error: BaseException | None = None
    num_runs: int = 0


@pytest.fixture
def light(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Light:
    """Replaces the code of the stages, not their keys, artifacts, tags and tracking. The scores are equal at first."""
    manifest = lab.store.read_manifest(*EvaluationRecord.of(lab.tags()).evaluation.split("/"))
    samples = SamplesSummary.read(lab.store.read_manifest("generate", manifest.inputs["samples"]["key"]))
    evaluation = EvaluationSummary.read(manifest)
    replaced = Light(dict(manifest.metrics))

    def sample(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        replaced.num_runs += 1
        if (error := replaced.error) is not None:
            replaced.error = None
            raise error
        file = context.write("samples", lambda path: path.write_text("samples"))
        return StageResult(files=[file], summary=replace(samples, num_samples=config.num_samples))

    def score(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        protocol = evaluation_protocol.protocol_of(inputs["reference"], inputs["samples"], config.settings)
        summary = replace(evaluation, protocol=protocol, protocol_digest=evaluation_protocol.protocol_digest(protocol))
        return StageResult(files=[], summary=summary, metrics=replaced.now)

    replace_stage(monkeypatch, "generate", run=sample, files=())
    replace_stage(monkeypatch, "evaluate", run=score, publish=None)
    return replaced
