"""One YAML file as dataclasses. loading.py reads and checks one.

A section without `dataset` or `seed` takes those of the run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pipelines.cluster.connection import ClusterConfig
from pipelines.data.sources.config import DatasetConfig
from pipelines.sampling.presets import with_preset
from pipelines.search.config import SearchConfig
from pipelines.stages.audit import AuditConfig
from pipelines.stages.captions import CaptionsConfig
from pipelines.stages.evaluate import EvaluateConfig
from pipelines.stages.generate import GenerateConfig
from pipelines.stages.memorization import MemorizationConfig
from pipelines.stages.reconstruction import ReconstructionConfig
from pipelines.stages.reference import ReferenceConfig
from pipelines.stages.report import ReportConfig
from pipelines.stages.token_map import TokenMapConfig
from pipelines.stages.tokenizer import TokenizerConfig
from pipelines.storage.s3_client import S3Config
from pipelines.tracking.run import TrackingConfig
from pipelines.training.config import TrainConfig
from pipelines.workflow import config as configuration
from pipelines.workflow.config import ConfigError
from pipelines.workflow.stage import MAIN
from pipelines.workflow.work import Prices

_SHARED_BY_VARIANTS = {"name", "workspace", "store", "targets", "report", "cluster", "tracking", "prices", "variants"}
_SHARED_BY_VARIANTS |= {"protocols", "search"}
_OF_PROTOCOLS = ("reference", "evaluate")
_OF_BATCHES = ("token_map", "captions", "reference", "reconstruction", "generate", "evaluate")
# Former names of keys -> their names today. Configs that use one are refused with the new name; configs of records are read by it.
RENAMED = {
    "train.warm_up_steps": "train.warmup_steps",
    "train.gradient_clip": "train.max_grad_norm",
    "train.label_dropout": "train.cond_drop_prob",
    "tokenizer.recipe.warm_up_share": "tokenizer.recipe.warmup_share",
    "token_map.dtype": "token_map.precision",
    "captions.captions_per_file": "captions.shard_size",
    **{f"{name}.images_per_pass": f"{name}.forward_batch_size" for name in ("token_map", "reference", "generate")},
    **{f"{name}.execution.batch_size": f"{name}.execution.worker_batch_size" for name in _OF_BATCHES},
}


def with_new_names(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a recorded config, by name, with the names that keys have today."""
    renamed: dict[str, Any] = copy.deepcopy(dict(sections))
    for old, new in RENAMED.items():
        *parents, name = old.split(".")
        place: Any = renamed
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            place[new.rpartition(".")[2]] = place.pop(name)
    return renamed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One YAML file: what a run makes, from which data, and where."""

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED
    PRESETS: ClassVar[Mapping[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]]] = {"generate.sampler": with_preset}

    name: str
    """Name of the run, in its reports, logs and in MLflow. Letters, digits, '.', '_' and '-', starting with a letter or digit."""
    seed: int = 0
    """Seed of every stage that does not give its own, in [0, 2**63)."""
    workspace: str = "runs"
    """Folder for the store, the tracking database and logs."""
    store: str | None = None
    """Where artifacts are kept: a folder or s3://bucket/prefix. Null takes <workspace>/store."""
    s3: S3Config = field(default_factory=S3Config)
    """How buckets are accessed. Null values take the usual AWS variables and configuration files."""
    buckets: dict[str, S3Config] = field(default_factory=dict)
    """Access to single buckets that differ from `s3`, by bucket name, such as {public-images: {anonymous: true}}. The store uses
    `s3`."""
    targets: tuple[str, ...] = ()
    """Stages to make, with the stages that they read from. Empty makes all of them, up to the report."""
    dataset: DatasetConfig | None = None
    """Images to train on, to compare with, and to take captions from. Null is refused if a stage of the run reads a dataset."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The VQGAN that turns images into codes."""
    token_map: TokenMapConfig = field(default_factory=TokenMapConfig)
    """Codes of every image of the dataset."""
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    """Features of captions, for models that are conditioned on text."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Images and features that samples are compared with."""
    reconstruction: ReconstructionConfig | None = None
    """How well the tokenizer keeps the images of the token map. Null leaves this stage out."""
    audit: AuditConfig | None = None
    """Duplicates in the token map. Null leaves this stage out, unless `memorization` needs it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The generator and its training."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Samples of the generator."""
    memorization: MemorizationConfig | None = None
    """Samples that are copies of images of the token map. Null leaves this stage out."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Scores of the samples."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The page on the run."""
    search: SearchConfig | None = None
    """The search for a better sampler, which `enat search` runs. `enat run` does not use it."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    prices: Prices | None = None
    """Prices of hours, to report costs as money. Null reports hours only."""
    protocols: dict[str, Any] = field(default_factory=dict)
    """Name -> values that replace those of `reference` and `evaluate`. The same samples are scored by each protocol, too, such as
    {val: {reference: {dataset: {kind: images, path: /data/val}}}}. A null protocol drops one of the base."""
    variants: dict[str, Any] = field(default_factory=dict)
    """Name -> values that replace those of the run, such as {untrained: {train: {num_steps: 0}}}. A null variant drops one of the
    base."""

    def __post_init__(self) -> None:
        for field_name in ("variants", "protocols"):  # null drops one of the base
            kept = {name: values for name, values in getattr(self, field_name).items() if values is not None}
            object.__setattr__(self, field_name, kept)
        for name in (self.name, *self.variants, *self.protocols):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"the name {name!r} must begin with a letter or digit and contain only those, '.', '_' and '-'")
        for kind, found in (("variant", self.variants), ("protocol", self.protocols)):
            for name, values in found.items():
                if not isinstance(values, Mapping):
                    raise ValueError(
                        f"{kind} {name} is {values!r}; it must be a mapping of keys to the values that replace the run's"
                    )
        sections = {each.name: getattr(self, each.name) for each in fields(self)}
        seeds = {"seed": self.seed, **{f"{name}.seed": getattr(section, "seed", None) for name, section in sections.items()}}
        for key, seed in seeds.items():
            if seed is not None and not 0 <= seed < 2**63:
                raise ValueError(f"{key} is {seed}; it must be at least 0 and below 2**63")
        if MAIN in self.variants:
            raise ValueError(f"a variant cannot be called {MAIN!r}: that is the run's own model")

    @cached_property
    def protocol_runs(self) -> dict[str, RunConfig]:
        """The run with the values of each protocol, by its name. Raises ConfigError."""
        for name, values in self.protocols.items():
            if ignored := [key for key in values if key not in _OF_PROTOCOLS]:
                raise ConfigError(
                    f"protocols.{name}.{ignored[0]} would be ignored, because a protocol scores the same samples; give only "
                    f"{' and '.join(_OF_PROTOCOLS)}, or use variants"
                )
        base = replace(self, variants={}, protocols={})
        return {name: configuration.with_overrides(base, values, f"protocol {name}") for name, values in self.protocols.items()}

    def every_run(self) -> dict[str, RunConfig]:
        """The run, its variants and the protocols of each, by what a message calls them: "", "variant a", "protocol b"."""
        found = {"": self, **{f"variant {name}": run for name, run in self.variant_runs.items()}}
        for where, run in list(found.items()):
            found |= {f"{where}{', ' if where else ''}protocol {name}": each for name, each in run.protocol_runs.items()}
        return found

    @cached_property
    def variant_runs(self) -> dict[str, RunConfig]:
        """The run of each variant, by name. Raises ConfigError."""
        for name, values in self.variants.items():
            if ignored := _SHARED_BY_VARIANTS.intersection(values):
                key = min(ignored)
                raise ConfigError(
                    f"variants.{name}.{key} would be ignored, because variants share it; give {key} outside of variants"
                )
        base = replace(self, variants={})
        return {name: configuration.with_overrides(base, values, f"variant {name}") for name, values in self.variants.items()}

    def s3_of(self, *places: str | None) -> S3Config:
        """How to access the bucket of the first of some paths and URIs that is in one."""
        in_buckets = [place.removeprefix("s3://").partition("/")[0] for place in places if place and place.startswith("s3://")]
        return self.buckets.get(in_buckets[0], self.s3) if in_buckets else self.s3

    @property
    def store_uri(self) -> str:
        return self.store or str(Path(self.workspace) / "store")
