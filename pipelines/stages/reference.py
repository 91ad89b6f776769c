"""Stage reference: the feature extractor, the moments of its features of real images, and the features of some of these.

The images are those of a dataset, cropped as in the token map, or those of ADM's reference statistics (an .npz file). Extractor
"classifier" is trained here on the labels of the dataset, and tested on a part that is held out. The others have given weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enat.config import PRECISIONS, check_choices, check_in
from enat.metrics.extractors import (
    BUILT_IN,
    OF_INCEPTION,
    WIDTHS,
    FeatureExtractor,
    extractor_kinds,
    extractor_macs,
    load_extractor,
)
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.cluster import waiting
from pipelines.cluster.resources import Execution
from pipelines.data.dataset import Dataset
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import adm_reference
from pipelines.evaluation.adm_reference import NpzImages, NpzReference
from pipelines.evaluation.extractors import EXTRACTOR_FILE, FEATURES_VERSION, ExtractorFile, ReferenceSummary
from pipelines.evaluation.features import (
    MOMENTS_FILES,
    FeatureSpec,
    compute_features,
    drawn_evenly,
    feature_work,
    num_feature_parts,
)
from pipelines.evaluation.readers import BlockReader, PixelBlocks, SourceImages
from pipelines.storage.external import content_digest, folder_digest, local_file, local_folder
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.config import added, set_by
from pipelines.workflow.progress import Reporter
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult, WorkerContext
from pipelines.workflow.work import Done, Foreseen, Work

if TYPE_CHECKING:
    from enat.metrics.moments import FeatureMoments, FeatureStatistics


_WEIGHTS_KEY = "reference.weights"
CROP = "adm-center"  # of datasets, as in their token maps
_FROM_FOLDERS = ("dinov2", "clip")
_HOLD_OUT_EVERY = 5  # every fifth image tests the classifier and never trains it
_MAX_TRAINING_IMAGES = 50_000
_NPZ_IMAGES = 10_000  # of ADM's reference statistics
_UNKNOWN_WIDTH = 1024  # of the features of registered extractors
_KEPT_SEED = 0  # not the run's: runs of all seeds are compared with the same reference


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What samples are compared with: an extractor of features, and features of real images."""

    extractor: str = "classifier"
    """Network whose features are compared: "classifier" (trained on the labels of the dataset), "inception", "inception_clean"
    (with clean-fid's resizing), "dinov2", "clip", or a registered one."""
    num_epochs: int = 20
    """Epochs that the classifier is trained for. Unit: epochs."""
    weights: str | None = None
    """Weights of the extractor: a file, or for dinov2 and clip a folder with config.json and safetensors. A path, s3:// or hf://.
    Null downloads the published weights of inception."""
    npz: str | None = None
    """ADM's reference statistics (.npz) instead of a dataset: a path or s3://."""
    num_kept: int = 50_000
    """Images whose features are kept, drawn evenly. Kernel distance, precision and recall need them. Unit: images."""
    forward_batch_size: int = 32
    """Images that the extractor computes together, here and for samples. The last digits of sums of floats depend on it. Unit:
    images."""
    precision: str = added("fp32")
    """Number format of the extractor, here and for samples: "fp32", "tf32" (on GPUs) or "bf16". For the last two, the change of the
    features is measured on the first images. Features of the classifier's training stay fp32."""
    resolution: int | None = None
    """Height and width that real images are resized to. Null takes the tokenizer's. Unit: pixels."""
    dataset: DatasetConfig | None = None
    """Real images. Null takes the run's dataset."""
    s3: S3Config | None = set_by("s3 or buckets")
    """Access to the bucket of `weights` or `npz`."""
    seed: int | None = None
    """Seed of the classifier's training. Null takes the run's seed."""
    execution: Execution = field(default_factory=Execution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_choices(self, extractor=extractor_kinds(), precision=PRECISIONS)
        if self.extractor == "classifier" and (self.npz or self.weights):
            raise ValueError("reference.extractor classifier is trained on labels; leave reference.npz and reference.weights out")
        if self.extractor in _FROM_FOLDERS and not self.weights:
            raise ValueError(f"reference.extractor {self.extractor} needs reference.weights: a folder, or hf://owner/name")
        check_in(self, "[0, inf)", "num_epochs", "num_kept")
        check_in(self, "[1, inf)", "forward_batch_size", "resolution")

    def identity(self) -> dict[str, Any]:
        common = {name: getattr(self, name) for name in ("extractor", "resolution", "num_kept", "forward_batch_size")}
        common |= {"precision": self.precision} if self.precision != "fp32" else {}  # earlier references keep their keys
        common["npz"] = content_digest(self.npz, adm_reference.KEY, self.s3) if self.npz else None
        if self.extractor == "classifier":
            return {**common, "num_epochs": self.num_epochs, "seed": self.seed}
        return {**common, "weights": self._weights_identity()}

    def _weights_identity(self) -> str:
        if self.weights is None:
            return "published"
        if self.extractor in _FROM_FOLDERS:
            return folder_digest(local_folder(self.weights, _WEIGHTS_KEY, self.s3))
        return content_digest(self.weights, _WEIGHTS_KEY, self.s3)


@dataclass(frozen=True)
class _Made:
    """An extractor's file and its cost."""

    file: FileRecord
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _RealImages:
    """The real images of a reference.

    reader, num_images: images to compute features of; None and 0 if npz has statistics only.   npz: its statistics are of all
    images that the file was made from, of which it may contain some.
    """

    name: str
    described: str
    reader: BlockReader | None
    num_images: int
    dataset: Dataset | None = None
    npz: NpzReference | None = None


def run(config: ReferenceConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the index of a dataset and its images, or an .npz file of published statistics; and weights of the extractor if given.

    Writes the extractor, the moments of its features, and features of num_kept images. Measures the number of images, and for a
    trained classifier its accuracy on images that it did not see.
    """
    real = _real_images(config, inputs, context)
    context.connect_for(config.execution, "reference")
    made = _make_extractor(config, real.dataset, context)
    source = ExtractorFile.of(context.store, config.extractor, context.stage, context.key, made.file, precision=config.precision)
    outputs = dict(source.load().outputs)
    if real.npz is not None:
        assert config.resolution is not None
        real.npz.check(config.extractor, outputs, config.resolution)
    features = None
    if real.reader is not None:
        kept = drawn_evenly(real.num_images, config.num_kept, _KEPT_SEED)
        spec = FeatureSpec(num_images=real.num_images, images_per_pass=config.forward_batch_size, kept=kept)
        features = compute_features(real.reader, spec, source, config.execution, context)
    moments: dict[str, FeatureMoments | FeatureStatistics] = dict(features.moments) if features else {}
    count = features.count if features else None
    if real.npz is not None and real.npz.statistics and config.extractor == "inception":
        moments, count = dict(real.npz.statistics), real.npz.statistics["features"].count
    making_device_seconds = config.execution.device_seconds(made.seconds)
    return StageResult(
        files=[
            made.file,
            *(context.write(MOMENTS_FILES[output], found.save) for output, found in moments.items()),
            *(features.files if features else ()),
        ],
        summary=ReferenceSummary(
            extractor=config.extractor,
            extractor_digest=made.file.sha256,
            outputs=outputs,
            features_version=FEATURES_VERSION,
            images_per_pass=config.forward_batch_size,
            precision=config.precision,
            of=real.described,
            dataset=real.name,
            resolution=config.resolution,
            num_images=count,
            num_kept=features.num_kept if features else 0,
            is_imported=real.npz is not None,
        ),
        metrics={**({} if count is None else {"images": count}), **made.metrics, **(features.changes if features else {})},
        worker_seconds=made.seconds + (features.worker_seconds if features else 0.0),
        device_seconds=making_device_seconds + (features.device_seconds if features else 0.0),
        work=[
            Done(work, took, work.num_workers)
            for work, took in zip(
                _work(config, real.num_images), (made.seconds, features.worker_seconds if features else 0.0), strict=True
            )
        ],
    )


def foresee(config: ReferenceConfig, inputs: Mapping[str, Any]) -> Foreseen:
    resolution, dataset = config.resolution or 256, inputs.get("dataset")
    num_images = dataset.num_images if dataset is not None else _NPZ_IMAGES
    num_kept, width = min(num_images, config.num_kept), WIDTHS.get(config.extractor, _UNKNOWN_WIDTH)
    return Foreseen(
        summary=ReferenceSummary(
            extractor=config.extractor,
            extractor_digest="",
            outputs={"features": width},
            features_version=FEATURES_VERSION,
            images_per_pass=config.forward_batch_size,
            precision=config.precision,
            of="",
            dataset=dataset.name if dataset is not None else "",
            resolution=resolution,
            num_images=num_images,
            num_kept=num_kept,
        ),
        work=_work(config, num_images),
        size=4 * num_kept * width + 8 * width**2,
        num_parts=num_feature_parts(num_images),
    )


def _work(config: ReferenceConfig, num_images: int) -> list[Work]:
    assert config.resolution is not None
    macs = extractor_macs(config.extractor, config.resolution)
    training = Work(
        name="training",
        count=config.num_epochs * min(num_images, _MAX_TRAINING_IMAGES) if config.extractor == "classifier" else 0,
        macs=3 * macs,
        workers=replace(config.execution, num_workers=1),
    )
    return [training, feature_work(num_images, macs, config.execution, config.forward_batch_size, config.precision)]


def _real_images(config: ReferenceConfig, inputs: Mapping[str, Manifest], context: StageContext) -> _RealImages:
    assert config.resolution is not None
    if config.npz is not None:
        npz = NpzReference.open(config.npz, config.s3)
        reader = PixelBlocks(NpzImages(config.npz, config.s3)) if npz.num_images else None
        return _RealImages(npz.name, f"{npz.name}, {config.resolution} px", reader, npz.num_images, npz=npz)
    assert config.dataset is not None
    dataset = Dataset(config.dataset, context.store, inputs["dataset"])
    reader = PixelBlocks(SourceImages(dataset, config.resolution))
    described = f"{dataset.name}, {config.resolution} px, {CROP}"
    return _RealImages(dataset.name, described, reader, dataset.num_images, dataset=dataset)


def _make_extractor(config: ReferenceConfig, dataset: Dataset | None, context: StageContext) -> _Made:
    """Make the extractor once: if the stage resumes after a crash, committed features belong to this extractor."""
    import ray

    committed = context.store.resume_parts(context.stage, context.key).get(EXTRACTOR_FILE)
    if committed is not None:
        return _Made(FileRecord(**committed["file"]), committed["metrics"], committed["seconds"])
    for part in context.store.read_parts(context.stage, context.key):  # features of an extractor that was damaged
        context.store.discard_part(context.stage, context.key, part)
    if config.extractor == "classifier":
        with context.bar(config.num_epochs, "epochs") as bar, bar.reporter() as reporter:
            task = ray.remote(**config.execution.resources)(_train_classifier)
            made: _Made = waiting.get(task.remote(config, dataset, context.for_workers(), reporter))
    else:
        made = _keep_extractor(config, context)
    record = {"file": asdict(made.file), "metrics": dict(made.metrics), "seconds": made.seconds}
    context.store.put_part(context.stage, context.key, EXTRACTOR_FILE, record)
    return made


def _train_classifier(config: ReferenceConfig, dataset: Dataset, context: WorkerContext, reporter: Reporter) -> _Made:
    import torch

    from enat.metrics.classifier import ClassifierExtractor, train_classifier

    assert config.resolution is not None and config.seed is not None
    started = time.monotonic()
    torch.set_num_threads(config.execution.num_threads)
    images, labels = map(torch.from_numpy, dataset.load_images(config.resolution, 0, _MAX_TRAINING_IMAGES))
    if not len(labels) or int(labels.min()) < 0:
        raise ValueError(f"dataset {dataset.name} has no labelled images to train a classifier on; use extractor: inception")
    is_held_out = torch.arange(len(labels)) % _HOLD_OUT_EVERY == 0
    with torch.random.fork_rng(devices=[]):  # torch initializes layers by the global generator
        torch.manual_seed(config.seed)
        extractor = ClassifierExtractor(len(dataset.class_names))
    generator = torch.Generator().manual_seed(config.seed)
    for epoch in train_classifier(extractor, images[~is_held_out], labels[~is_held_out], config.num_epochs, generator):
        reporter.report(epoch.epoch, f"loss {epoch.loss:.3f}")
        context.run.log_metrics({"loss": epoch.loss}, epoch.epoch)
    with torch.inference_mode():
        predicted = torch.cat([extractor.logits(part).argmax(dim=1) for part in images[is_held_out].split(256)])
    accuracy = (predicted == labels[is_held_out]).double().mean().item()
    file = context.write(EXTRACTOR_FILE, extractor.save)
    return _Made(file, {"held_out_accuracy": accuracy}, time.monotonic() - started)


def _keep_extractor(config: ReferenceConfig, context: StageContext) -> _Made:
    """The weights that the config names, in the format of the store. Opening them here refuses wrong files."""
    from safetensors.torch import save_file

    from enat.files.weights import check_finite, read_state_dict
    from enat.metrics.image_encoders import read_image_encoder
    from enat.metrics.inception import InceptionExtractor, published_inception_weights

    place = config.weights
    if config.extractor in _FROM_FOLDERS:
        assert place is not None
        return _Made(
            context.write(EXTRACTOR_FILE, read_image_encoder(config.extractor, local_folder(place, _WEIGHTS_KEY, config.s3)).save)
        )
    weights = read_state_dict(local_file(place, _WEIGHTS_KEY, config.s3)) if place else None
    if config.extractor in OF_INCEPTION:
        check_finite(weights or {}, f"{_WEIGHTS_KEY} {place}")
        return _Made(context.write(EXTRACTOR_FILE, InceptionExtractor(weights or published_inception_weights()).save))
    assert config.extractor not in BUILT_IN
    tensors = {name: tensor.contiguous() for name, tensor in (weights or {}).items()}

    def write(path: Path) -> FeatureExtractor:
        save_file(tensors, path)
        return load_extractor(config.extractor, path)

    return _Made(context.write(EXTRACTOR_FILE, write))


def _describe(manifest: Manifest) -> str:
    summary = ReferenceSummary.read(manifest)
    count = "an unknown number of" if summary.num_images is None else f"{summary.num_images:,}"
    return f"{count} real images by {summary.extractor}"


STAGE = Stage(
    "reference",
    4,
    run,
    reads={"dataset": Input(("dataset",), lambda config, run: config.npz is None)},
    config=ReferenceConfig,
    imports=("torch", "enat.metrics.extractors", "pipelines.stages.reference"),
    summary=ReferenceSummary,
    foresee=foresee,
    kind="evaluation",
    has_curves=True,
    is_counted_if_imported=True,  # published statistics also get features of their images, which are computed here
    files=(EXTRACTOR_FILE, *MOMENTS_FILES.values(), "features-*.safetensors"),
    external=("weights", "npz"),
    describe=_describe,
    reevaluation="conditions",
)
