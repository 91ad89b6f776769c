"""For notebooks and scripts: run, evaluate and compare, open and show artifacts, and sample from models.

`guide/digits.ipynb` demonstrates what needs no run.

    from pipelines import notebook as enat

    enat.ls("train")                                # a table: size, age, key, dataset, description
    model = enat.open_model("train/3f2a")           # or name@alias of MLflow's registry
    enat.show(enat.sample(model, labels="0-9", num_images=40))  # a picture, which is shown if a cell ends with it
    done = enat.run("configs/digits.yaml", train={"num_steps": 2000})  # as `enat run` does; a cell shows its summary
    done.artifact("train"), done.scores["main"]["frechet_distance"]
    enat.compare("digits")                          # as `enat compare` does

A store is a folder or s3://bucket/prefix. An artifact is named by its stage, a slash and a prefix of its key. Errors are a
ValueError with one sentence.

Shape legend: B images, L codes, N steps, H x W pixels.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console, Group
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from enat.sampler_config import SamplerConfig
from enat.text import TextEncoder
from pipelines.artifacts import lineage as artifacts_lineage
from pipelines.artifacts.inventory import Query, list_artifacts, list_table
from pipelines.artifacts.last_used import record_read
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_existing
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection
from pipelines.comparison.query import Comparison
from pipelines.data import inspection
from pipelines.data.token_map import TokenMap
from pipelines.sampling import models, pictures
from pipelines.sampling import request as sampling_request
from pipelines.sampling import sample as sampling_sample
from pipelines.sampling.models import Generator
from pipelines.storage.s3_client import S3Config
from pipelines.tracking import run as tracking
from pipelines.workflow.config import merge

warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm's, in notebooks without ipywidgets

_STORE = "runs/store"
_WIDTH = 110  # of what a cell shows

Store = ArtifactStore | str | Path


@dataclass(frozen=True)
class Artifact(JupyterMixin):
    """One artifact of a store. A cell that ends with it shows its content."""

    store: ArtifactStore
    manifest: Manifest

    def __rich__(self) -> Group:
        return inspection.facts_table(self.store, self.manifest)

    def path(self, name: str) -> Path:
        """One of its files, on this machine. Raises StorageError if it has no file of that name."""
        return self.store.fetch(self.manifest, name)

    def input(self, name: str) -> Artifact:
        """One of its inputs, by the name in the manifest: "token_map", "tokenizer", ..."""
        if name not in self.manifest.inputs:
            raise ValueError(f"{self.manifest.stage} is made from {', '.join(self.manifest.inputs) or 'nothing'}, not from {name}")
        return Artifact(self.store, inspection.input_of(self.store, self.manifest, name))

    def lineage(self) -> Tree:
        """Two branches: its inputs, and what was made from it."""
        from pipelines.run import graph  # imports all stages, which takes seconds

        found, both = artifacts_lineage.Lineage(self.store.manifests(), graph.describe), Tree("", hide_root=True)
        both.children += artifacts_lineage.trees(found, self.manifest)
        return both

    def contact_sheet(self, num_images: int = 32) -> Image.Image:
        """For a token map: source images, each with its reconstruction to the right."""
        return inspection.contact_sheet(self.store, self.manifest, num_images)


@dataclass(frozen=True)
class SampledImages:
    """images: uint8 (B, 3, H, W).   codes: int64 (B, L).   steps: uint8 (N + 1, B, 3, H, W), the known codes after each step."""

    request: sampling_request.SampleRequest
    images: Tensor
    codes: Tensor
    steps: Tensor

    def strip(self, num_images: int = 8) -> Image.Image:
        """How the first images were generated: a row per image, a column per step."""
        return pictures.strip(self.steps[:, :num_images], pictures.scale_for(self.images.shape[-1]))

    def animation(self, columns: int = 8) -> bytes:
        """The same for all images, as a GIF."""
        return pictures.animation(self.steps, min(columns, len(self.images)), pictures.scale_for(self.images.shape[-1]))


@dataclass(frozen=True)
class RunResult(JupyterMixin):
    """What a run made. A cell that ends with it shows the summary of `enat run`."""

    answer: Mapping[str, Any]
    """As `enat run --json` prints it."""
    store: ArtifactStore

    def __rich__(self) -> Text:
        from pipelines.run import summary

        return _shown(partial(summary.show, self.answer))

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Metrics of "main", of each variant, and of each with its protocol ("main/val")."""
        scores: dict[str, dict[str, float]] = self.answer["scores"]
        return scores

    def artifact(self, stage: str) -> Artifact:
        """stage: of the run, or of a variant: "train", "train@untrained". Raises ValueError for any other."""
        keys = {each["stage"]: each["key"] for each in self.answer["stages"]}
        if stage not in keys:
            raise ValueError(f"this run has no stage {stage}; its stages are {', '.join(keys)}")
        return open_artifact(f"{stage.partition('@')[0].partition('/')[0]}/{keys[stage]}", self.store)


@dataclass(frozen=True)
class ComparisonResult(JupyterMixin):
    """Evaluations side by side. A cell that ends with it shows the tables of `enat compare`."""

    comparison: Comparison

    def __rich__(self) -> Text:
        from pipelines.comparison import table

        return _shown(partial(table.show, self.comparison))

    @property
    def answer(self) -> dict[str, Any]:
        """As `enat compare --json` prints it: protocols, rows, differences."""
        from pipelines.comparison import table

        return table.to_json(self.comparison)

    def write(self, path: str | Path) -> Path:
        """Write the table (.csv), the figures (.png), or a page with everything and the samples (.html).

        Raises ValueError for another ending, or if there is no figure to draw."""
        from pipelines.comparison import compare as work
        from pipelines.comparison.page import Grids

        path = Path(path)
        if path.suffix not in (".csv", ".png", ".html"):
            raise ValueError(f"{path} cannot be written; end its name with .csv, .png or .html")
        grids = work.read_grids(self.comparison) if path.suffix == ".html" else Grids()
        files = work.make_files(self.comparison, path.stem, grids)
        content = {".csv": files.table, ".png": files.figures, ".html": files.page}[path.suffix]
        if content is None:
            raise ValueError(f"no figure can be drawn into {path}: no run has both a distance and gmacs_total, or a sweep")
        work.write(path, content)
        return path


def run(config: str | Path, **overrides: Any) -> RunResult:
    """Run the stages of a config, as `enat run` does. Existing artifacts are reused, and interrupted stages resume.

    overrides: values that replace those of the file, such as workspace="runs" or train={"num_steps": 2000}; a mapping replaces the
    values that it names. Raises ValueError for values that cannot work, before anything is computed.
    """
    from pipelines.run import runner
    from pipelines.run.loading import load_run

    connection.prepare_environment()
    loaded = load_run(Path(config), _assignments(overrides))
    answer = runner.run(loaded, str(config), Console())
    return RunResult(answer, _open(answer["store"], loaded.s3))


def evaluate(
    samples: str | Path,
    name: str,
    *,
    config: str | Path | None = None,
    kind: str = "auto",
    labels: str | None = None,
    **overrides: Any,
) -> RunResult:
    """Score images of another generator, as `enat evaluate` does.

    samples: a folder, .tar, .npz or .parquet, local or s3://.   name: of the generator, in comparisons.   config: a run whose
    reference and metrics are used.   kind, labels: as for `enat evaluate`.   overrides: as for run, such as
    reference={"npz": "VIRTUAL_imagenet256_labeled.npz"}.
    """
    from pipelines.data.image_sets import ImageSetConfig
    from pipelines.run import runner

    connection.prepare_environment()
    images = ImageSetConfig(path=str(samples), name=name, kind=kind, labels=labels)
    loaded, build = runner.evaluation_of(images, None if config is None else Path(config), _assignments(overrides))
    answer = runner.run(loaded, str(config or "a notebook"), Console(), build)
    return RunResult(answer, _open(answer["store"], loaded.s3))


def compare(
    *runs: str,
    experiments: Sequence[str] = ("enat",),
    filter: str | None = None,
    published: str = "auto",
    tracking_uri: str | None = None,
    workspace: str | Path = "runs",
) -> ComparisonResult:
    """Tracked evaluations side by side, as `enat compare` shows them. Nothing is logged.

    runs: names of configs, or ids of MLflow runs; without any, all evaluations of the experiments.   filter: of MLflow on runs of
    stage evaluate.   published: a dataset, "auto" or "none".   tracking_uri: the default is MLFLOW_TRACKING_URI, or the database in
    the workspace. Raises ValueError if nothing is found.
    """
    from pipelines.comparison.query import Query as Asked
    from pipelines.comparison.query import compare as read

    uri = tracking.resolve_uri(tracking.TrackingConfig(uri=tracking_uri), Path(workspace))
    return ComparisonResult(read(uri, Asked(experiments=tuple(experiments), filter=filter, runs=runs), published))


def ls(*stages: str, dataset: str | None = None, store: Store = _STORE) -> Table:
    """List the artifacts of some or all stages, newest first. Raises ValueError for an unknown stage."""
    from pipelines.run import graph  # imports all stages, which takes seconds

    graph.check_stages(stages)
    opened = _open(store)
    query = Query(stages=stages, datasets=(dataset,) if dataset else ())
    found = list_artifacts(opened.manifests(), query, now=time.time(), describe=graph.describe, dataset_name=graph.dataset_name)
    return list_table(found)


def open_artifact(name: str, store: Store = _STORE) -> Artifact:
    """name: "token_map/3f2a"."""
    opened = _open(store)
    found = inspection.find(opened, name)
    record_read(opened, found)
    return Artifact(opened, found)


def open_token_map(name: str | Artifact, store: Store = _STORE) -> TokenMap:
    """Codes, labels and captions of all rows, in memory. name: "3f2a", "token_map/3f2a", or the artifact."""
    found = name if isinstance(name, Artifact) else open_artifact(name if "/" in name else f"token_map/{name}", store)
    if found.manifest.stage != "token_map":
        raise ValueError(f"{found.manifest.stage}/{found.manifest.key[:12]} is not a token map; list them with ls('token_map')")
    return TokenMap.open(found.store, found.manifest)


def open_model(name: str, store: Store | None = None, tracking_uri: str | None = None) -> Generator:
    """A model with its tokenizer: "train/3f2a", or a registered model: name@alias, models:/name/version.

    store: the default is runs/store, or the store that the registered version names.   tracking_uri: the default is
    MLFLOW_TRACKING_URI, or runs/mlflow.db.
    """
    if not models.is_registered(name):
        return models.from_artifact(_open(store or _STORE), name)
    uri = tracking.resolve_uri(tracking.TrackingConfig(uri=tracking_uri), Path("runs"))
    return models.from_registry(uri, name, _open(store) if store else None, S3Config())


def sample(
    generator: Generator,
    *,
    labels: str | Sequence[int] = (),
    captions: Sequence[str] = (),
    encoder: TextEncoder | None = None,
    num_images: int | None = None,
    seed: int = 0,
    device: str = "auto",
    **sampler: Any,
) -> SampledImages:
    """Images of a model. `enat sample` and stage generate make the same images with the same seed.

    labels: as for `enat sample`, such as "207,360-362 x2", or numbers.   captions, encoder: for a model of captions.
    num_images: the default is the number of labels or captions, or 16.   sampler: values that replace those of the model's
    SamplerConfig, such as num_steps=12; a list replaces the scalar.
    """
    config = generator.model.config
    numbers = (
        sampling_request.parse_labels(labels, config.num_classes, generator.class_names)
        if isinstance(labels, str)
        else tuple(labels)
    )
    if wrong := [label for label in numbers if not isinstance(label, Integral)]:
        raise ValueError(f"labels holds {wrong[0]!r}, which is not a class number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
    own = ("the model's sampler", generator.sampler.values_beside(sampler))
    request = sampling_request.SampleRequest(
        num_images=(len(numbers) or len(captions) or 16) if num_images is None else num_images,
        sampler=merge(SamplerConfig, [own, (f"sampler {sampler}", sampler)]),
        labels=numbers,
        captions=tuple(captions),
        seed=seed,
        device=sampling_request.choose_device(device),
    )
    batches = [batch for batch, _ in sampling_sample.sample_batches(generator, request, encoder)]
    steps = [pictures.step_images(generator.vqgan, batch.trajectory, batch.codes, config.mask_id) for batch in batches]
    images, codes = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "codes"))
    return SampledImages(request, images, codes, torch.cat(steps, dim=1))


def show(images: SampledImages | Tensor) -> Image.Image:
    """A grid of samples, with one column per requested label or caption; or of uint8 (B, 3, H, W)."""
    if isinstance(images, Tensor):
        return pictures.grid_of(images)
    return pictures.grid_of(images.images, images.request.num_asked)


def _open(store: Store, s3: S3Config | None = None) -> ArtifactStore:
    return store if isinstance(store, ArtifactStore) else open_existing(str(store), s3 or S3Config())


def _assignments(overrides: Mapping[str, Any]) -> list[str]:
    """The same as the command line gives them. JSON is YAML."""
    return [f"{name}={json.dumps(value, default=str)}" for name, value in overrides.items()]


def _shown(show: Callable[[Console], None]) -> Text:
    """What a function prints on a terminal, with its colours."""
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=_WIDTH, legacy_windows=False)
    show(terminal)
    text = Text.from_ansi(terminal.file.getvalue().strip("\n"), no_wrap=True, overflow="ignore")  # type: ignore[attr-defined]
    return text
