"""Stage tokenizer: a VQGAN, trained here on small images or imported from a file of weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from enat.config import TokenizerRecipe, VQGANConfig
from enat.cost import decoder_macs, encoder_macs, num_vqgan_parameters
from enat.images import make_grid, png_bytes, to_float, to_uint8
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster import waiting
from pipelines.cluster.resources import Workers
from pipelines.data.dataset import Dataset
from pipelines.data.samples import check_codebook
from pipelines.data.sources.config import DatasetConfig
from pipelines.storage.external import content_digest, local_file
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.config import set_by
from pipelines.workflow.models import TokenizerSummary
from pipelines.workflow.progress import Reporter
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult, WorkerContext
from pipelines.workflow.work import Done, Foreseen, Work

WEIGHTS = "vqgan.safetensors"
PICTURE = "reconstructions.png"
_MAX_IMAGES = 50_000  # the first ones of the dataset, which are held in memory


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A VQGAN, trained with `recipe` or imported from `weights`. Its architecture is a preset with any field replaced."""

    preset: str = "vqgan-small"
    """Architecture: "vqgan-256", "vqgan-512" (published), or "vqgan-small" (16 px)."""
    resolution: int | None = None
    """Height and width of images. Null takes the preset's. Unit: pixels."""
    base_channels: int | None = None
    """Channels of the first level. Null takes the preset's."""
    channel_multipliers: tuple[int, ...] | None = None
    """Channels of each level as multiples of base_channels. Each level but the first halves the resolution. Null takes the
    preset's."""
    num_res_blocks: int | None = None
    """Residual blocks per level. Null takes the preset's."""
    latent_dim: int | None = None
    """Width of a code vector. Null takes the preset's."""
    codebook_size: int | None = None
    """Number of different codes. Null takes the preset's."""
    weights: str | None = None
    """Published weights (.safetensors, .pth, .ckpt): a path, s3://, hf://, https://, or the "sha256:..." under which `enat
    import` keeps them. Null trains a tokenizer."""
    recipe: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    """Training of the tokenizer. Not used with `weights`."""
    dataset: DatasetConfig | None = None
    """Images to train the tokenizer on. Null takes the run's dataset."""
    s3: S3Config | None = set_by("s3 or buckets")
    """Access to the bucket of `weights`."""
    seed: int | None = None
    """Seed of the training. Null takes the run's seed."""
    execution: Workers = field(default_factory=Workers)
    """The worker of this stage."""

    def __post_init__(self) -> None:
        check_codebook(self.architecture().codebook_size)

    def architecture(self) -> VQGANConfig:
        given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(VQGANConfig)}
        return VQGANConfig.preset(self.preset, **{name: value for name, value in given.items() if value is not None})

    def identity(self) -> dict[str, Any]:
        architecture = dataclasses.asdict(self.architecture())
        if self.weights is not None:
            return {"architecture": architecture, "weights": content_digest(self.weights, "tokenizer.weights", self.s3)}
        return {"architecture": architecture, "recipe": dataclasses.asdict(self.recipe), "seed": self.seed}


def run(config: TokenizerConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the index of a dataset and its first images, or published weights.

    Writes the weights of the tokenizer, and a picture of reconstructions if it was trained here. Measures the reconstruction error
    and how evenly the codes are used.
    """
    import ray

    from enat.checkpoint import open_vqgan, save_weights

    architecture = config.architecture()
    summary = TokenizerSummary(config=architecture, is_imported=config.weights is not None)
    if config.weights is not None:
        vqgan = open_vqgan(local_file(config.weights, "tokenizer.weights", config.s3), architecture)
        return StageResult(files=[context.write(WEIGHTS, lambda path: save_weights(path, vqgan))], summary=summary)

    assert config.dataset is not None
    dataset = Dataset(config.dataset, context.store, inputs["dataset"])
    context.connect_for(config.execution, "tokenizer")
    with context.bar(config.recipe.num_steps, "steps") as bar, bar.reporter() as reporter:
        task = ray.remote(**config.execution.resources)(_train)
        trained = waiting.get(task.remote(config, dataset, context.for_workers(), reporter))
    return StageResult(
        files=[trained["file"]],
        records=[trained["record"]],
        summary=summary,
        metrics=trained["metrics"],
        worker_seconds=trained["seconds"],
        device_seconds=config.execution.device_seconds(trained["seconds"]),
        work=[Done(_training(config), trained["seconds"], 1)],
    )


def foresee(config: TokenizerConfig, inputs: Mapping[str, Any]) -> Foreseen:
    architecture = config.architecture()
    return Foreseen(
        summary=TokenizerSummary(config=architecture, is_imported=config.weights is not None),
        work=[_training(config)] if config.weights is None else [],
        size=4 * num_vqgan_parameters(architecture),
    )


def _training(config: TokenizerConfig) -> Work:
    architecture, recipe = config.architecture(), config.recipe
    return Work(
        name="training",
        count=recipe.num_steps * recipe.batch_size,
        macs=3 * (encoder_macs(architecture) + decoder_macs(architecture)),
        workers=dataclasses.replace(config.execution, num_workers=1),
        batch_size=recipe.batch_size,
    )


def _train(config: TokenizerConfig, dataset: Dataset, context: WorkerContext, reporter: Reporter) -> dict[str, Any]:
    """The whole training, in one worker."""
    import torch

    from enat.checkpoint import save_weights
    from enat.tokenizer import VQGAN
    from enat.training.tokenizer import code_usage, train_tokenizer

    assert config.seed is not None
    started = time.monotonic()
    torch.set_num_threads(config.execution.num_threads)
    architecture, device = config.architecture(), config.execution.device
    images = torch.from_numpy(dataset.load_images(architecture.resolution, 0, _MAX_IMAGES)[0])
    with torch.random.fork_rng(devices=[]):  # torch initializes convolutions by the global generator
        torch.manual_seed(config.seed)
        vqgan = VQGAN(architecture).to(device)
    floats = to_float(images).to(device)
    for step in train_tokenizer(vqgan, floats, config.recipe, torch.Generator().manual_seed(config.seed)):
        reporter.report(step.step, f"reconstruction error {step.reconstruction_error:.4f}")
        if step.step % 20 == 0:
            context.run.log_metrics({"loss": step.loss, "reconstruction_mse": step.reconstruction_error}, step.step)

    codes = torch.cat([vqgan.encode(part) for part in floats.split(256)])
    decoded = torch.cat([vqgan.decode(part) for part in codes.split(256)])
    usage, perplexity = code_usage(codes, architecture.codebook_size)
    error = torch.mean((decoded - floats).double().square()).item()
    pairs = torch.stack([images[:40], to_uint8(decoded[:40]).cpu()], dim=1).flatten(0, 1)
    picture = png_bytes(make_grid(pairs, columns=10, scale=max(1, 48 // architecture.resolution)))
    context.run.log_bytes(picture, PICTURE)
    file = context.write(WEIGHTS, lambda path: save_weights(path, vqgan))
    record = context.write(PICTURE, lambda path: path.write_bytes(picture))
    metrics = {"reconstruction_mse": error, "code_usage": usage, "code_perplexity": perplexity}
    return {"file": file, "record": record, "metrics": metrics, "seconds": time.monotonic() - started}


def _describe(manifest: Manifest) -> str:
    summary = TokenizerSummary.read(manifest)
    how = "imported" if summary.is_imported else "trained"
    return f"{how}, {summary.config.codebook_size:,} codes, {summary.config.resolution} px"


STAGE = Stage(
    "tokenizer",
    2,
    run,
    reads={"dataset": Input(("dataset",), lambda config, run: config.weights is None)},
    config=TokenizerConfig,
    imports=("torch", "enat.training.tokenizer", "pipelines.stages.tokenizer"),
    summary=TokenizerSummary,
    foresee=foresee,
    kind="tokenizing",
    has_curves=True,
    files=(WEIGHTS, PICTURE),
    external=("weights",),
    workers=lambda config: config.execution if config.weights is None else None,
    describe=_describe,
    title=lambda config: None,  # what is made with a tokenizer is not named after the images it was trained on
)
