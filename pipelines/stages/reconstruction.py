"""Stage reconstruction: how well the tokenizer reproduces real images, an upper bound for every generator of its codes.

Images are decoded from their codes in the token map. The stage measures the distance of their features to the reference, PSNR and
SSIM against the originals, which are read again from the dataset, and how evenly the codes are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from enat.config import PRECISIONS, VQGANConfig, check_choices, check_in
from enat.cost import decoder_macs
from enat.metrics.extractors import extractor_macs
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import TokenizerExecution
from pipelines.data import token_map as data_token_map
from pipelines.data.dataset import Dataset
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation.extractors import ExtractorFile, ReferenceSummary, require_same_features
from pipelines.evaluation.features import (
    MOMENTS_FILES,
    FeatureSpec,
    compute_features,
    drawn_evenly,
    feature_work,
    num_feature_parts,
    read_rows,
    stored_moments,
)
from pipelines.evaluation.readers import Decoded, Decoder, Rows, code_decoder
from pipelines.workflow.config import added, set_by
from pipelines.workflow.costs import cost_metrics
from pipelines.workflow.models import TokenizerSummary
from pipelines.workflow.stage import Input, PublishContext, Stage, StageContext, StageResult
from pipelines.workflow.summary import Summary
from pipelines.workflow.work import Done, Foreseen, Work

_MOST_PSNR = 100.0  # decibels, for an exact reproduction, whose ratio is infinite
_MEASURES = ("psnr", "ssim")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Images of the dataset, encoded and decoded again, against the originals."""

    num_images: int | None = None
    """Number of images, from the start of the dataset, at least 2. Null takes all. Unit: images."""
    precision: str = added("fp32")
    """Number format of the decoder: "fp32", "tf32" (on GPUs) or "bf16". See evaluate.precision."""
    dataset: DatasetConfig | None = set_by("dataset")
    """Images that were encoded."""
    execution: TokenizerExecution = field(default_factory=TokenizerExecution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_in(self, "[2, inf)", "num_images")
        check_choices(self, precision=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class ReconstructionSummary(Summary):
    """reference, reference_digest: of the real images in the comparison.   num_images: number of measured images."""

    extractor: str
    extractor_digest: str
    reference: str
    reference_digest: str
    num_images: int
    rounding: str = "uint8"


@dataclass(frozen=True)
class Reconstructions:
    """Images of a dataset decoded from their codes, each measured against its original. Images in quarantine are skipped.

    quarantined: their indices in the dataset, ascending.
    """

    dataset: Dataset
    token_map: Manifest
    tokenizer: Manifest
    quarantined: tuple[int, ...]
    precision: str = "fp32"
    is_compiled: bool = False

    @property
    def store(self) -> ArtifactStore:
        return self.dataset.store

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        info = data_token_map.TokenMapSummary.read(self.token_map).info
        resolution = info.resolution
        is_left_out = set(self.quarantined)
        rows = [row for index, row in enumerate(self.dataset.read(start, stop), start) if index not in is_left_out]
        num_codes = info.grid_size**2
        if not rows:
            shape = (0, 3, resolution, resolution)
            return {"codes": np.empty((0, num_codes), np.int64), "originals": np.empty(shape, np.uint8)}
        first = start - int(np.searchsorted(self.quarantined, start))
        keys, codes = data_token_map.read_codes(self.store, self.token_map, range(first, first + len(rows)))
        for key, row in zip(keys, rows, strict=True):
            if key != row.key:
                raise ValueError(f"the token map has {key} where the dataset has {row.key}; they are not of the same images")
        originals = np.stack([row.pixels(resolution) for row in rows])
        return {"codes": codes.astype(np.int64), "originals": originals}

    def exact(self) -> Reconstructions:
        return replace(self, precision="fp32", is_compiled=False) if self.precision != "fp32" or self.is_compiled else self

    def decoder(self, device: str) -> Decoder:
        from enat.metrics.image_pairs import psnr, ssim

        decode = code_decoder(self.store, self.tokenizer, device, precision=self.precision, is_compiled=self.is_compiled)

        def decoded(rows: Rows) -> Decoded:
            images = decode(rows).images
            ratio = psnr(images, rows["originals"]).clamp(max=_MOST_PSNR)
            return Decoded(images, {"psnr": ratio, "ssim": ssim(images, rows["originals"])})

        return decoded


def run(config: ReconstructionConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads a token map, its tokenizer, its dataset and a reference.

    Writes moments of the decoded images, and the measures of each image. Measures their distance to the reference, PSNR, SSIM and
    how evenly the codes are used. Raises ValueError if the inputs do not belong together.
    """
    from enat.metrics.moments import frechet_distance

    assert config.dataset is not None
    reference, tokens, tokenizer = (inputs[name] for name in ("reference", "token_map", "tokenizer"))
    require_same_features(reference)
    dataset = Dataset(config.dataset, context.store, inputs["dataset"])
    info, real = data_token_map.TokenMapSummary.read(tokens).info, ReferenceSummary.read(reference)
    architecture = TokenizerSummary.read(tokenizer).config
    info.require(
        "the tokenizer",
        tokenizer_digest=tokenizer.digest,
        grid_size=architecture.grid_size,
        codebook_size=architecture.codebook_size,
    )
    if real.resolution != info.resolution:
        raise ValueError(f"the token map has {info.resolution} px and the reference {real.resolution} px")
    num_images = min(config.num_images or dataset.num_images, dataset.num_images)
    context.connect_for(config.execution, "reconstruction")
    spec = FeatureSpec(num_images=num_images, images_per_pass=real.images_per_pass, kept=drawn_evenly(num_images, 0, 0))
    left_out, is_compiled = _quarantined(dataset, tokens, context), config.execution.compile
    reader = Reconstructions(dataset, tokens, tokenizer, left_out, config.precision, is_compiled)
    job = compute_features(reader, spec, ExtractorFile.of_reference(context.store, reference), config.execution, context)
    distance = frechet_distance(job.moments["features"], stored_moments(context.store, reference)["features"])
    measures = {name: read_rows(context.store, context.stage, context.key, job.files, name) for name in _MEASURES}
    return StageResult(
        files=[*(context.write(MOMENTS_FILES[name], found.save) for name, found in job.moments.items()), *job.files],
        summary=ReconstructionSummary(
            extractor=real.extractor,
            extractor_digest=real.extractor_digest,
            reference=real.of,
            reference_digest=reference.digest,
            num_images=job.count,
        ),
        metrics={
            "reconstruction_fid" if real.extractor == "inception" else "reconstruction_frechet_distance": distance,
            **{name: float(values.mean()) for name, values in measures.items()},
            **job.changes,
            **{name: tokens.metrics[name] for name in ("code_usage", "code_perplexity")},
        },
        worker_seconds=job.worker_seconds,
        device_seconds=job.device_seconds,
        work=[Done(work := _work(config, num_images, architecture, real), job.worker_seconds, work.num_workers)],
    )


def foresee(config: ReconstructionConfig, inputs: Mapping[str, Any]) -> Foreseen:
    real, num_images = inputs["reference"], inputs["dataset"].num_images
    num_images = min(config.num_images or num_images, num_images)
    return Foreseen(
        summary=ReconstructionSummary(
            extractor=real.extractor, extractor_digest="", reference="", reference_digest="", num_images=num_images
        ),
        work=[_work(config, num_images, inputs["tokenizer"].config, real)],
        size=8 * real.outputs["features"] ** 2 + 8 * num_images,
        num_parts=num_feature_parts(num_images),
    )


def _work(config: ReconstructionConfig, num_images: int, tokenizer: VQGANConfig, reference: ReferenceSummary) -> Work:
    macs = decoder_macs(tokenizer) + extractor_macs(reference.extractor, tokenizer.resolution)
    return feature_work(num_images, macs, config.execution, reference.images_per_pass, config.precision)


def _publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Logs the cost of the artifact and all its inputs. No evaluation reads a reconstruction, so no other total includes it."""
    if context.is_recorded:
        return
    context.run.log_metrics(cost_metrics(context.store, manifest, context.stages, context.prices))
    if context.prices is not None:
        context.run.set_tags({"enat.currency": context.prices.currency})


def _quarantined(dataset: Dataset, tokens: Manifest, context: StageContext) -> tuple[int, ...]:
    """Indices of the images that the token map does not have, ascending."""
    left_out = set(pq.read_table(context.store.fetch(tokens, data_token_map.QUARANTINE))["key"].to_pylist())
    if not left_out:
        return ()
    keys = dataset.index(0, dataset.num_images)["key"].to_pylist()
    return tuple(index for index, key in enumerate(keys) if key in left_out)


def _describe(manifest: Manifest) -> str:
    summary = ReconstructionSummary.read(manifest)
    return f"{summary.num_images:,} images decoded from codes, by {summary.extractor}"


STAGE = Stage(
    "reconstruction",
    2,
    run,
    reads={name: Input((name,)) for name in ("dataset", "tokenizer", "token_map", "reference")},
    config=ReconstructionConfig,
    summary=ReconstructionSummary,
    foresee=foresee,
    kind="evaluation",
    files=(*MOMENTS_FILES.values(), "features-*.safetensors"),
    describe=_describe,
    publish=_publish,
)
