"""The pipeline from a dataset to a scored model: its configuration, and the stages it consists of.

tokenizer -> token_map -> train -> generate -> evaluate -> report, and reference -> evaluate. A variant is the same pipeline with
some values replaced; what a variant shares with the run's own model is the same artifact, made once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines import config as configuration
from pipelines.artifacts import digest_of
from pipelines.cluster import ClusterConfig
from pipelines.config import ConfigError
from pipelines.sources import DatasetConfig, open_source
from pipelines.stages import evaluate, generate, reference, report, token_map, tokenizer, train
from pipelines.token_map import TokenMapInfo
from pipelines.tracking import TrackingConfig
from pipelines.train_loop import TrainConfig
from pipelines.workflow import Node, Stage


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One YAML file. A stage's `dataset` and `seed` are the run's where the stage gives none.

    workspace: folder for the store, tracking and logs.   store: of artifacts; None takes <workspace>/store.
    variants: name -> values that replace those of the run, such as {untrained: {train: {num_steps: 0}}}.
    """

    name: str
    seed: int = 0
    workspace: str = "runs"
    store: str | None = None
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: tokenizer.TokenizerConfig = field(default_factory=tokenizer.TokenizerConfig)
    token_map: token_map.TokenMapConfig = field(default_factory=token_map.TokenMapConfig)
    reference: reference.ReferenceConfig = field(default_factory=reference.ReferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: generate.GenerateConfig = field(default_factory=generate.GenerateConfig)
    evaluate: evaluate.EvaluateConfig = field(default_factory=evaluate.EvaluateConfig)
    report: report.ReportConfig = field(default_factory=report.ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    variants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.variants):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"the name {name!r} must begin with a letter or digit and go on with those, '.', '_' or '-'")
        for name, values in self.variants.items():
            if not isinstance(values, Mapping):
                raise ValueError(f"variant {name} is {values!r}; it must be a mapping of keys to the values that replace the run's")
        if report.MAIN in self.variants:
            raise ValueError(f"a variant cannot be called {report.MAIN!r}: that is the run's own model")

    @property
    def store_uri(self) -> str:
        return self.store or str(Path(self.workspace) / "store")


def load_run(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A run from YAML and overrides, checked as far as can be without computing. Raises ValueError."""
    run = configuration.load_config(RunConfig, path, overrides)
    for name, variant in [(report.MAIN, run), *_variants(run).items()]:
        try:
            _check(variant)
        except ValueError as error:
            raise ConfigError(str(error) if name == report.MAIN else f"variant {name}: {error}") from error
    return run


def build(run: RunConfig) -> list[Node]:
    """All nodes, each after those it reads from."""
    nodes: dict[str, Node] = {}
    ids_by_identity: dict[str, str] = {}
    identities: dict[str, str] = {}

    def add(stage: Stage, variant: str, config: Any, inputs: Mapping[str, str]) -> str:
        """The id of a node; an earlier one's where it would make the same."""
        content = {
            "stage": stage.name,
            "config": configuration.identity(config),
            "inputs": {k: identities[v] for k, v in inputs.items()},
        }
        identity = digest_of(content)
        id = ids_by_identity.setdefault(identity, stage.name if variant == report.MAIN else f"{stage.name}@{variant}")
        if id not in nodes:
            nodes[id], identities[id] = Node(id, stage, config, dict(inputs)), identity
        return id

    report_inputs: dict[str, str] = {}
    for name, variant in {report.MAIN: run, **_variants(run)}.items():
        ids = _add_model_stages(name, variant, add)
        kept = ids if name == report.MAIN else {f"{key}@{name}": ids[key] for key in ("model", "samples", "evaluation")}
        report_inputs |= kept
    seed = run.generate.seed if run.generate.seed is not None else run.seed
    page = replace(run.report, name=run.name, generate_seed=seed, variants=tuple(run.variants))
    add(report.STAGE, report.MAIN, page, report_inputs)
    return list(nodes.values())


def _add_model_stages(name: str, run: RunConfig, add: Any) -> dict[str, str]:
    """Nodes of one variant up to its evaluation; input name -> node id."""
    filled = {
        section: _filled(getattr(run, section), run)
        for section in ("tokenizer", "token_map", "reference", "train", "generate", "evaluate")
    }
    resolution = run.tokenizer.architecture().resolution
    ids = {"tokenizer": add(tokenizer.STAGE, name, filled["tokenizer"], {})}
    ids["token_map"] = add(token_map.STAGE, name, filled["token_map"], {"tokenizer": ids["tokenizer"]})
    ids["reference"] = add(reference.STAGE, name, replace(filled["reference"], resolution=resolution), {})
    ids["model"] = add(train.STAGE, name, filled["train"], {"token_map": ids["token_map"], "tokenizer": ids["tokenizer"]})
    ids["samples"] = add(generate.STAGE, name, filled["generate"], {"model": ids["model"]})
    scored = {key: ids[key] for key in ("samples", "tokenizer", "reference", "model")}
    ids["evaluation"] = add(evaluate.STAGE, name, filled["evaluate"], scored)
    return ids


def _filled(section: Any, run: RunConfig) -> Any:
    """A stage's config with the run's dataset and seed where it has none of its own."""
    given = {name: getattr(run, name) for name in ("dataset", "seed") if getattr(section, name, ...) is None}
    return replace(section, **given)


def _variants(run: RunConfig) -> dict[str, RunConfig]:
    base = replace(run, variants={})
    return {name: configuration.with_overrides(base, values, f"variant {name}") for name, values in run.variants.items()}


def _check(run: RunConfig) -> None:
    """What would fail in a late stage and can be seen now: the model against the token map that the tokenizer will make."""
    source = open_source(run.token_map.dataset or run.dataset)
    architecture = run.tokenizer.architecture()
    info = TokenMapInfo(
        dataset=run.dataset.title,
        resolution=architecture.resolution,
        grid_size=architecture.grid_size,
        codebook_size=architecture.codebook_size,
        num_classes=len(source.class_names),
        tokenizer_digest="",
    )
    run.train.model.architecture(info)
    sampler = run.generate.sampler
    if sampler.reuse and run.train.model.reuse is False:
        raise ValueError("generate.sampler.reuse needs a model with train.model.reuse; set one of them to match the other")
