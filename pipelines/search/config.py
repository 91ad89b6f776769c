"""The `search` section of a config: which samplers are tried, how they are scored, and how much a sampler may cost."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from enat.config import check_choices, check_in
from enat.schedule import REVEAL_ORDERS

SHAPES = ("curves", "steps")
# Scores by name -> the metric of stage evaluate that makes them (None: not a metric, but a section of its own).
_LOWER = {
    "frechet_distance": "frechet_distance",
    "fid": "frechet_distance",
    "sfid": "spatial_frechet_distance",
    "kernel_distance": "kernel_distance",
    "kid": "kernel_distance",
    "cmmd": "cmmd",
}
_HIGHER = {
    "inception_score": "inception_score",
    "precision": "precision_recall",
    "recall": "precision_recall",
    "density": "density_coverage",
    "coverage": "density_coverage",
    "class_agreement": None,
    "clip_score": None,
}
METRICS = {**_LOWER, **_HIGHER}
_RANGES = ("guidance_scale", "sampling_temperature", "remask_temperature")


def is_lower_better(metric: str) -> bool:
    return metric in _LOWER


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """The samplers that a search may choose. What is null, or not listed, stays as in generate.sampler."""

    num_steps: tuple[int, ...] = ()
    """Numbers of steps. Trials are shared among them equally. Empty takes that of generate.sampler."""
    reveal_orders: tuple[str, ...] = ()
    """Reveal orders. Trials are shared among them equally. Empty takes that of generate.sampler."""
    shape: str = "curves"
    """"curves": a list is a curve of three numbers (start, end, power), which few trials can search. "steps": every value of a list
    is searched on its own, as AutoNAT does (arXiv 2406.05478), which takes hundreds of trials."""
    mask_ratios: bool = True
    """Search mask_ratios."""
    guidance_scale: tuple[float, float] | None = (1.0, 6.0)
    """Lowest and highest value of guidance_scales. Null does not search them."""
    sampling_temperature: tuple[float, float] | None = (0.0, 8.0)
    """Lowest and highest value of sampling_temperatures. Null does not search them."""
    remask_temperature: tuple[float, float] | None = (0.0, 8.0)
    """Lowest and highest value of remask_temperatures. Null does not search them. Reveal orders that do not use confidence have
    none."""

    def __post_init__(self) -> None:
        check_choices(self, shape=SHAPES)
        for name, known in (("num_steps", None), ("reveal_orders", REVEAL_ORDERS)):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if repeated := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} lists {repeated[0]} twice; list each once")
            if known and (unknown := [value for value in values if value not in known]):
                raise ValueError(f"{name} lists {unknown[0]!r}; choose from {', '.join(known)}")
        if any(value < 1 for value in self.num_steps):
            raise ValueError(f"num_steps lists {min(self.num_steps)}; a sampler has at least 1 step")
        for name in _RANGES:
            if (bounds := getattr(self, name)) is None:
                continue
            if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
                raise ValueError(f"{name} is {[*bounds]}; it must be [lowest, highest] with 0 <= lowest < highest, or null")
            object.__setattr__(self, name, tuple(bounds))
        is_fixed = not self.mask_ratios and all(getattr(self, name) is None for name in _RANGES)
        if is_fixed and len(self.num_steps) < 2 and len(self.reveal_orders) < 2:
            raise ValueError("space is empty: it leaves every value as it is; give at least one range")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search of `enat search` for the sampler of the run's model."""

    space: SpaceConfig = field(default_factory=SpaceConfig)
    """The samplers that are tried."""
    metric: str | None = None
    """Score to improve, such as fid, frechet_distance, kernel_distance or class_agreement. Null takes the Fréchet distance of the
    reference's extractor."""
    max_gmacs: float | None = None
    """Most a sampler may take: `gmacs_total` of `enat compare`, with both guidance passes and the decoder. Unit: GMACs per image.
    """
    max_seconds: float | None = None
    """Most a sampler may take, as measured: sampling and decoding by one worker. Unit: seconds per image."""
    num_trials: int = 48
    """Samplers that are tried, with the given ones. A larger number continues a search. Unit: trials."""
    batch_size: int = 8
    """Samplers that are proposed together. They run side by side as far as the cluster has room. Unit: trials."""
    num_samples: int | None = None
    """Samples that score the best samplers. Null takes generate.num_samples. Unit: images."""
    num_rungs: int = 3
    """Numbers of samples that trials are scored with: the first has num_samples / reduction ** (num_rungs - 1). 1 scores every
    trial with all samples."""
    reduction: int = 3
    """One of so many samplers is scored with so many times more samples."""
    presets: bool = True
    """Begin with the published samplers that are in the space, too, not only with generate.sampler."""
    seed: int = 0
    """Seed of the proposals."""
    sample_seed: int | None = None
    """Seed of the samples of all trials. Null takes the seed of generate."""
    heldout_seed: int | None = None
    """Seed of the samples that the winners are judged with. Null takes sample_seed + 1."""
    heldout_replicates: int = 4
    """Independent sets of num_samples samples that the winners are judged with. Their error is smaller than that of one set."""
    max_winners: int = 4
    """Samplers that are judged with held-out seeds, beside generate.sampler: the best, the best of each number of steps, and others
    of the front."""

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS:
            close = difflib.get_close_matches(self.metric, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"scores are {', '.join(METRICS)}"
            raise ValueError(f"metric is {self.metric!r}, which is not a score; {hint}")
        check_in(self, "(0, inf)", "max_gmacs", "max_seconds")
        check_in(self, "[1, inf)", "num_trials", "batch_size", "num_rungs", "heldout_replicates", "max_winners")
        check_in(self, "[2, inf)", "num_samples", "reduction")
        for name in ("seed", "sample_seed", "heldout_seed"):
            if (seed := getattr(self, name)) is not None and not 0 <= seed < 2**63:
                raise ValueError(f"{name} is {seed}; it must be at least 0 and below 2**63")
