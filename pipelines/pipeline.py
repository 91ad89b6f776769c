"""The pipeline from a dataset to a scored model: its configuration, and the stages it consists of.

dataset, tokenizer -> token_map -> train -> generate -> evaluate -> report, and reference -> evaluate; where asked for, token_map,
reference -> reconstruction. A variant is the same pipeline with some values replaced; what a variant shares with the run's own
model is the same artifact, made once. Images of other generators are scored by the same stages: images, reference -> evaluate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from pipelines import config as configuration
from pipelines.artifacts import digest_of
from pipelines.caption_features import CaptionFeaturesInfo
from pipelines.cluster import ClusterConfig
from pipelines.config import ConfigError
from pipelines.costs import Prices
from pipelines.evaluation_card import MAIN
from pipelines.image_sets import ImageSetConfig
from pipelines.s3 import S3Config
from pipelines.sources import DatasetConfig, open_source
from pipelines.stages import (
    captions,
    dataset,
    evaluate,
    generate,
    image_set,
    reconstruction,
    reference,
    report,
    token_map,
    tokenizer,
    train,
)
from pipelines.token_map import TokenMapInfo
from pipelines.tracking import TrackingConfig
from pipelines.train_config import TrainConfig
from pipelines.workflow import Node, Stage

_WITHOUT_MODEL = {"dataset", "tokenizer", "token_map", "captions", "reference", "reconstruction"}
# Stands for features that are not made yet, where only the rest of a model is looked at.
_ANY_CAPTIONS = CaptionFeaturesInfo(num_captions=0, captions_per_file=1, num_positions=1, width=1, encoder_digest="")

_SEEDED = ("tokenizer", "reference", "train", "generate")  # sections that may have a seed of their own


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One YAML file. A stage's `dataset` and `seed` are the run's where the stage gives none.

    workspace: folder for the store, tracking and logs.   store: of artifacts, a folder or s3://bucket/prefix; None takes
    <workspace>/store.   s3: how buckets are reached, where the usual AWS variables do not say it.
    targets: stages to make, with what they need; none means all, to the report.
    reconstruction: how well the tokenizer keeps the images of the token map; left out where the section is.
    prices: of hours, so that what a result took is told in money, too.
    variants: name -> values that replace those of the run, such as {untrained: {train: {num_steps: 0}}}.
    """

    name: str
    seed: int = 0
    workspace: str = "runs"
    store: str | None = None
    s3: S3Config = field(default_factory=S3Config)
    targets: tuple[str, ...] = ()
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: tokenizer.TokenizerConfig = field(default_factory=tokenizer.TokenizerConfig)
    token_map: token_map.TokenMapConfig = field(default_factory=token_map.TokenMapConfig)
    captions: captions.CaptionsConfig = field(default_factory=captions.CaptionsConfig)
    reference: reference.ReferenceConfig = field(default_factory=reference.ReferenceConfig)
    reconstruction: reconstruction.ReconstructionConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: generate.GenerateConfig = field(default_factory=generate.GenerateConfig)
    evaluate: evaluate.EvaluateConfig = field(default_factory=evaluate.EvaluateConfig)
    report: report.ReportConfig = field(default_factory=report.ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    prices: Prices | None = None
    variants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.variants):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"the name {name!r} must begin with a letter or digit and go on with those, '.', '_' or '-'")
        for name, values in self.variants.items():
            if not isinstance(values, Mapping):
                raise ValueError(f"variant {name} is {values!r}; it must be a mapping of keys to the values that replace the run's")
        seeds = {"seed": self.seed, **{f"{key}.seed": getattr(getattr(self, key), "seed", None) for key in _SEEDED}}
        for key, seed in seeds.items():
            if seed is not None and not 0 <= seed < 2**63:
                raise ValueError(f"{key} is {seed}; it must be at least 0 and below 2**63")
        if MAIN in self.variants:
            raise ValueError(f"a variant cannot be called {MAIN!r}: that is the run's own model")

    @cached_property
    def variant_runs(self) -> dict[str, RunConfig]:
        """The runs that variants stand for, by name. Raises ConfigError."""
        base = replace(self, variants={})
        return {name: configuration.with_overrides(base, values, f"variant {name}") for name, values in self.variants.items()}

    @property
    def store_uri(self) -> str:
        return self.store or str(Path(self.workspace) / "store")


def load_run(path: Path | None, overrides: Sequence[str] = (), *, is_dataset_here: bool = True) -> RunConfig:
    """A run from YAML, if any, and overrides, checked as far as can be without computing. Raises ValueError.

    is_dataset_here: False where another machine reads it, and it need not be in reach of this one.
    """
    run = configuration.load_config(RunConfig, path, overrides)
    for name, variant in [(MAIN, run), *run.variant_runs.items()]:
        try:
            _check(variant, is_dataset_here)
        except ValueError as error:
            raise ConfigError(str(error) if name == MAIN else f"variant {name}: {error}") from error
    return run


def build(run: RunConfig) -> list[Node]:
    """All nodes, each after those it reads from."""
    nodes: dict[str, Node] = {}
    ids_by_identity: dict[str, str] = {}
    identities: dict[str, str] = {}
    own_identities: dict[DatasetConfig, Any] = {}

    def add(stage: Stage, variant: str, config: Any, inputs: Mapping[str, str]) -> str:
        """The id of a node; an earlier one's where it would make the same. A second one of a stage is told apart by a number."""
        if stage is dataset.STAGE and config not in own_identities:
            own_identities[config] = configuration.identity(config)
        own = own_identities[config] if stage is dataset.STAGE else configuration.identity(config)
        identity = digest_of({"stage": stage.name, "config": own, "inputs": {k: identities[v] for k, v in inputs.items()}})
        if identity not in ids_by_identity:
            id = base = stage.name if variant == MAIN else f"{stage.name}@{variant}"
            id = next(id for id in chain([base], (f"{base}-{n}" for n in count(2))) if id not in nodes)
            nodes[id], identities[id] = Node(id, stage, config, dict(inputs), own), identity
            ids_by_identity[identity] = id
        return ids_by_identity[identity]

    report_inputs: dict[str, str] = {}
    for name, variant in {MAIN: run, **run.variant_runs}.items():
        ids = _add_model_stages(name, variant, add)
        kept = ids if name == MAIN else {f"{key}@{name}": ids[key] for key in ("model", "samples", "evaluation")}
        report_inputs |= kept
    page = replace(run.report, name=run.name, variants=tuple(run.variants))
    add(report.STAGE, MAIN, page, report_inputs)
    return _needed(nodes, run.targets)


def _add_model_stages(name: str, run: RunConfig, add: Any) -> dict[str, str]:
    """Nodes of one variant up to its evaluation; input name -> node id."""
    filled = {
        section: completed(getattr(run, section), run)
        for section in ("tokenizer", "token_map", "captions", "reference", "train", "generate", "evaluate")
    }
    resolution = run.tokenizer.architecture().resolution

    def dataset_of(section: str) -> dict[str, str]:
        return {"dataset": add(dataset.STAGE, name, filled[section].dataset, {})}

    ids = {"tokenizer": add(tokenizer.STAGE, name, filled["tokenizer"], {} if run.tokenizer.weights else dataset_of("tokenizer"))}
    ids["token_map"] = add(token_map.STAGE, name, filled["token_map"], {**dataset_of("token_map"), "tokenizer": ids["tokenizer"]})
    features, asked_for = {}, {}
    if run.captions.encoder is not None:
        features = {"captions": add(captions.STAGE, name, filled["captions"], dataset_of("captions"))}
        if run.train.model.text:
            of_samples = replace(filled["captions"], dataset=filled["generate"].dataset)
            asked_for = {"captions": add(captions.STAGE, name, of_samples, dataset_of("generate"))}
    given = {} if run.reference.npz else dataset_of("reference")
    ids["reference"] = add(reference.STAGE, name, at_resolution(filled["reference"], resolution), given)
    if run.reconstruction is not None:
        kept = {key: ids[key] for key in ("tokenizer", "token_map", "reference")} | dataset_of("token_map")
        measured = replace(run.reconstruction, dataset=filled["token_map"].dataset)
        ids["reconstruction"] = add(reconstruction.STAGE, name, measured, kept)
    learned_from = {} if run.train.weights else {"token_map": ids["token_map"]}
    learned_from |= features if run.train.model.text else {}
    ids["model"] = add(train.STAGE, name, filled["train"], {**learned_from, "tokenizer": ids["tokenizer"]})
    asked_for |= {"token_map": ids["token_map"]} if run.generate.mask_ratio is not None else {}
    ids["samples"] = add(generate.STAGE, name, filled["generate"], {"model": ids["model"], **asked_for})
    scored = {key: ids[key] for key in ("samples", "tokenizer", "reference", "model")}
    scored |= dataset_of("evaluate") if run.evaluate.judge else {}
    ids["evaluation"] = add(evaluate.STAGE, name, filled["evaluate"], scored)
    return ids | ({"captions": asked_for["captions"]} if "captions" in asked_for else {})


def build_evaluation(run: RunConfig, images: ImageSetConfig, resolution: int | None = None) -> list[Node]:
    """The nodes that score images of another generator as a run scores its own samples. resolution: of the reference, where it
    does not say it; None takes that of the run's own samples."""
    filled = {section: completed(getattr(run, section), run) for section in ("reference", "evaluate")}
    source = replace(images, s3=images.s3 or run.s3)
    nodes = [Node("images", image_set.STAGE, source)]
    given = {}
    if not run.reference.npz:
        nodes.append(Node("dataset", dataset.STAGE, filled["reference"].dataset))
        given = {"dataset": "dataset"}
    of_reference = resolution or run.tokenizer.architecture().resolution
    nodes.append(Node("reference", reference.STAGE, at_resolution(filled["reference"], of_reference), given))
    scored = replace(filled["evaluate"], images=source, judge=None)  # which class was asked for is not known
    nodes.append(Node("evaluate", evaluate.STAGE, scored, {"samples": "images", "reference": "reference"}))
    return nodes


def at_resolution(config: reference.ReferenceConfig, resolution: int) -> reference.ReferenceConfig:
    return config if config.resolution is not None else replace(config, resolution=resolution)


def completed(section: Any, run: RunConfig) -> Any:
    """A stage's config with the run's dataset and seed where it has none of its own."""
    given = {name: getattr(run, name) for name in ("dataset", "seed") if getattr(section, name, ...) is None}
    filled = replace(section, **given)
    if getattr(filled, "dataset", None) is not None and filled.dataset.s3 is None:
        filled = replace(filled, dataset=replace(filled.dataset, s3=run.s3))
    return replace(filled, s3=run.s3) if getattr(filled, "s3", ...) is None else filled


def _needed(nodes: dict[str, Node], targets: Sequence[str]) -> list[Node]:
    """The targets and what they read from, in order."""
    stages = list(dict.fromkeys(node.stage.name for node in nodes.values()))
    for target in targets:
        if target not in stages:
            raise ConfigError(f"targets names {target!r}; the stages of this run are {', '.join(stages)}")
    needed = {id for id, node in nodes.items() if not targets or node.stage.name in targets}
    for id in reversed(nodes):
        needed |= set(nodes[id].inputs.values()) if id in needed else set()
    return [node for id, node in nodes.items() if id in needed]


def _check(run: RunConfig, is_dataset_here: bool) -> None:
    """What would fail in a late stage and can be seen now: the model against the token map that the tokenizer will make."""
    architecture = run.tokenizer.architecture()
    given = completed(run.token_map, run).dataset
    classes = open_source(given).known_classes() if is_dataset_here else None
    num_classes = len(classes) if classes is not None else given.num_classes
    info = TokenMapInfo(
        dataset=run.dataset.title,
        resolution=architecture.resolution,
        grid_size=architecture.grid_size,
        codebook_size=architecture.codebook_size,
        num_classes=num_classes if num_classes is not None else run.train.model.num_classes or 1,
        tokenizer_digest="",
    )
    is_trained = run.train.weights is None and (not run.targets or not _WITHOUT_MODEL.issuperset(run.targets))
    if not is_trained:
        return
    if run.train.model.text and run.captions.encoder is None:
        raise ValueError("train.model.text needs the features of captions; give captions.encoder")
    run.train.model.architecture(info, _ANY_CAPTIONS)
    sampler = run.generate.sampler
    if sampler.reuse and run.train.model.reuse is False:
        raise ValueError("generate.sampler.reuse needs a model with train.model.reuse; set one of them to match the other")
