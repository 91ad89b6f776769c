"""A run from its YAML file, checked as far as can be without computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from enat.config import ENATConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.data.captions import CaptionFeaturesInfo
from pipelines.data.dataset import DatasetSummary
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.data.token_map import TokenMapInfo
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.stages import evaluate, generate
from pipelines.storage.open import forget_commits
from pipelines.workflow import config as configuration
from pipelines.workflow.config import ConfigError

# A placeholder for features that do not exist yet, to check the rest of a model.
_ANY_CAPTIONS = CaptionFeaturesInfo(num_captions=0, captions_per_file=1, num_positions=1, width=1, encoder_digest="")


@dataclass(frozen=True)
class _Counts:
    """What a dataset is known to have. None: only a scan tells."""

    num_classes: int | None = None
    num_captions: int | None = None


def load_run(path: Path | None, overrides: Sequence[str] = (), *, is_dataset_here: bool = True) -> RunConfig:
    """A run from YAML, if any, and overrides, checked as far as can be without computing. Raises ValueError.

    is_dataset_here: False if another machine reads the dataset, which this one may not be able to access.
    """
    forget_commits()
    run = configuration.load_config(RunConfig, path, overrides)
    for name, each in run.every_run().items():
        try:
            _check(each, is_dataset_here)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}" if name else str(error)) from error
    return run


def check_scanned(run: RunConfig, found: Mapping[DatasetConfig, Manifest]) -> None:
    """Check a run against datasets that were scanned, by their configs, before anything is trained on them. Raises ConfigError."""
    read = {config: DatasetSummary.read(manifest) for config, manifest in found.items()}
    counts = {config: _Counts(len(summary.class_names), summary.num_captions) for config, summary in read.items()}
    for name, each in run.every_run().items():
        try:
            _check_counts(each, lambda dataset: counts.get(dataset.pinned(), _Counts()))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}" if name else str(error)) from error


def _unscanned(dataset: DatasetConfig) -> _Counts:
    classes = open_source(dataset).known_classes()
    return _Counts(
        num_classes=dataset.num_classes if classes is None else len(classes),
        num_captions=0 if dataset.kind in ("digits", "image_folder", "images") else None,
    )


def _check_counts(run: RunConfig, counts_of: Callable[[DatasetConfig], _Counts]) -> None:
    """Raises ValueError for labels, classes and captions that the datasets of a run do not have."""
    needed = graph.needed_stages(run)
    given = graph.section(graph.stages()["token_map"], run).dataset
    is_given_read = given is not None and not needed.isdisjoint(("token_map", "captions", "evaluate"))
    counts = counts_of(given) if is_given_read else _Counts()
    tokenizer, is_text = run.tokenizer.architecture(), run.train.model.text
    if "captions" in needed and counts.num_captions == 0:
        raise ValueError(
            f"captions.encoder is given, but dataset {given.title} has no captions; leave it out, or use another dataset"
        )
    real = graph.section(graph.stages()["reference"], run)
    is_classifier = "reference" in needed and real.extractor == "classifier" and real.npz is None
    if is_classifier and counts_of(real.dataset).num_classes == 0:
        raise ValueError(
            f"reference.extractor classifier is trained on labels, and dataset {real.dataset.title} has none; choose another one"
        )
    if "evaluate" in needed and run.evaluate.clip_score is not None and not is_text:
        raise ValueError("evaluate.clip_score needs samples of captions, and this model is conditioned on classes; leave it out")
    if "evaluate" in needed and run.evaluate.judge is not None and (is_text or counts.num_classes == 0):
        raise ValueError("evaluate.judge needs samples of classes, and this model has none; leave it out")
    if "train" not in needed:
        return
    num_classes = counts.num_classes if run.train.weights is None else run.train.model.num_classes or ENATConfig.num_classes
    if num_classes is None and not is_text:
        num_classes = run.train.model.num_classes
    info = TokenMapInfo(
        dataset="" if given is None else given.title,
        resolution=tokenizer.resolution,
        grid_size=tokenizer.grid_size,
        codebook_size=tokenizer.codebook_size,
        num_classes=1 if num_classes is None else num_classes,
        tokenizer_digest="",
    )
    model = run.train.model.architecture(info, _ANY_CAPTIONS)
    if "generate" in needed and (is_text or num_classes is not None):
        generate.label_scheme(run.generate, model)


def _check(run: RunConfig, is_dataset_here: bool) -> None:
    """Check now what would fail in a late stage, such as a model that does not fit the token map that the tokenizer will make."""
    needed = graph.needed_stages(run)
    for key, other in (("reference.dataset", "reference.npz"), ("tokenizer.dataset", "tokenizer.weights")):
        if _value_at(run, key) is not None and _value_at(run, other) is not None:
            raise ValueError(f"{key} would be ignored, because {other} is given; set one of them to null")
    is_trained = run.train.weights is None and "train" in needed
    if is_trained and run.generate.dataset is not None and not run.train.model.text:
        raise ValueError("generate.dataset would be ignored, because only models of captions read it; set it to null")
    if is_trained and run.train.model.text and run.captions.encoder is None:
        raise ValueError("train.model.text requires features of captions; set captions.encoder")
    _check_counts(run, cache(_unscanned) if is_dataset_here else lambda dataset: _Counts(dataset.num_classes))
    if is_trained and run.generate.sampler.reuse and run.train.model.reuse is False:
        raise ValueError("generate.sampler.reuse needs a model with train.model.reuse; set one of them to match the other")
    if "generate" in needed:
        _check_kept_weights(run, is_trained)
    if "evaluate" in needed:
        resolution = run.tokenizer.architecture().resolution
        if run.reference.resolution not in (None, resolution):
            raise ValueError(
                f"reference.resolution is {run.reference.resolution}; it must be that of the samples, {resolution}, because scores "
                "of two sizes are not comparable"
            )
        num_samples = run.evaluate.num_samples or run.generate.num_samples
        if num_samples > run.generate.num_samples:
            raise ValueError(f"evaluate.num_samples is {num_samples}; there are {run.generate.num_samples} (generate.num_samples)")
        evaluate.check_metrics(run.evaluate, run.reference.extractor, num_samples, run.reference.num_kept)


def _check_kept_weights(run: RunConfig, is_trained: bool) -> None:
    """Raises ValueError if the training does not keep the weights that samples are asked from."""
    generate, execution = run.generate, run.train.execution
    steps = {"checkpoint": generate.checkpoint, "guide_checkpoint": generate.guide_checkpoint}
    for name, value in {**steps, "ema_length": generate.ema_length}.items():
        if run.train.weights is not None and value is not None:
            raise ValueError(f"generate.{name} would be ignored, because train.weights are published weights; set it to null")
    if not is_trained:
        return
    if generate.ema_length is not None and not execution.ema_lengths:
        raise ValueError("generate.ema_length needs averages of the training; set train.execution.ema_lengths, such as [0.05, 0.1]")
    last, keep_every = run.train.num_steps, execution.keep_every
    for name, step in steps.items():
        if step is not None and step != last and (keep_every is None or step % keep_every):
            raise ValueError(
                f"generate.{name} is {step}; set train.execution.keep_every to a divisor of it, so that its weights are kept"
            )
        if step is not None and step > last:
            raise ValueError(f"generate.{name} is {step}; it must be at most train.num_steps, which is {last}")


def _value_at(run: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(run, section), name)
