"""What a search found, as JSON and as a closing summary of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table

from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.formatting import show_count, show_duration
from pipelines.registry.influences import Evaluated, half_interval, margin_of_difference, with_interval
from pipelines.search.config import SearchConfig, is_lower_better
from pipelines.search.study import Result, Trial
from pipelines.storage.redaction import without_credentials
from pipelines.tracking.run import RunHandle

HAND_SET, BEST = "hand-set", "best"
_Z_95 = 1.959964


@dataclass(frozen=True, eq=False)
class Judged:
    """A sampler with its scores of held-out samples. trial: None if it was not one.   evaluation: of the held-out samples."""

    name: str
    sampler: SamplerConfig
    trial: Trial | None
    evaluation: Manifest
    held_out: Evaluated

    @property
    def gmacs(self) -> float:
        return self.evaluation.metrics["gmacs_total"]

    @property
    def seconds(self) -> float:
        return self.evaluation.metrics["worker_seconds_per_image"]


@dataclass(frozen=True)
class Difference:
    """value: positive if the first is better.   margin: half of its 95% interval."""

    value: float
    margin: float

    @property
    def num_errors(self) -> float:
        """The difference in standard errors."""
        return self.value / (self.margin / _Z_95) if self.margin else 0.0

    def __str__(self) -> str:
        """Both with as many decimals as give the margin two digits."""
        decimals = max(0, 1 - math.floor(math.log10(self.margin))) if self.margin else 2
        return f"{self.value:.{decimals}f} ± {self.margin:.{decimals}f}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """judged: hand-set and best first.   searched: scores of judged samplers with the samples of the search, by name.

    fronts: trials by the cost "gmacs" or "seconds", the cheapest first.   seeds: of the samples of the search, and held-out.
    """

    name: str
    metric: str
    rungs: tuple[int, ...]
    search: SearchConfig
    trials: tuple[Trial, ...]
    judged: tuple[Judged, ...]
    searched: Mapping[str, Evaluated]
    fronts: Mapping[str, tuple[Trial, ...]]
    seeds: tuple[int, int]
    model: str
    store: str
    tracked: RunHandle
    files: Mapping[str, str]

    @cached_property
    def by_name(self) -> dict[str, Judged]:
        return {each.name: each for each in self.judged}

    @property
    def is_lower_better(self) -> bool:
        return is_lower_better(self.metric)

    @property
    def gain(self) -> Difference:
        """Of the best sampler over the hand-set one, with held-out samples."""
        return self.gain_of(BEST)

    def gain_of(self, name: str) -> Difference:
        return self._difference(self.by_name[name].held_out, self.by_name[HAND_SET].held_out)

    def optimism(self, name: str) -> Difference | None:
        """How much better a sampler was with the samples of the search than with held-out ones. None if it was no trial."""
        if name not in self.searched:
            return None
        return self._difference(self.searched[name], self.by_name[name].held_out)

    def _difference(self, first: Evaluated, second: Evaluated) -> Difference:
        value = second.scores[self.metric] - first.scores[self.metric]
        return Difference(value if self.is_lower_better else -value, margin_of_difference(first, second, self.metric) or 0.0)

    @property
    def is_hand_set_best(self) -> bool:
        return self.by_name[BEST].sampler == self.by_name[HAND_SET].sampler

    @property
    def verdict(self) -> str:
        """A sentence on the best sampler, and one on the best of each other number of steps that beats the hand-set one."""
        if self.is_hand_set_best:
            found = ["No sampler of the search is better than the hand-set one."]
        elif self.is_better(BEST):
            found = [f"The best sampler is better than the hand-set one by {self._gain_in_words(BEST)}."]
        else:
            words = self._gain_in_words(BEST)
            found = [f"The best sampler cannot be told from the hand-set one with held-out samples: its gain is {words}."]
        others = [each.name for each in self.judged if each.name.startswith(f"{BEST}-") and self.is_better(each.name)]
        return " ".join([*found, *(f"{name} is better by {self._gain_in_words(name)}." for name in others)])

    def is_better(self, name: str) -> bool:
        """Whether a sampler is better than the hand-set one by more than the 95% interval of the difference."""
        return self.gain_of(name).value > self.gain_of(name).margin

    def _gain_in_words(self, name: str) -> str:
        gain = self.gain_of(name)
        return f"{gain} ({abs(gain.num_errors):.1f} standard errors)"


def score_text(result: Result) -> str:
    """A score of the search and half of its 95% interval."""
    return with_interval({"score": result.score, **({} if result.error is None else {"score_se": result.error})}, "score")


def to_json(outcome: Outcome, *, seconds: float) -> dict[str, Any]:
    """The answer of `enat search --json`."""
    names = {trial: trial.name for trial in outcome.trials}

    def difference(found: Difference | None) -> dict[str, float] | None:
        return None if found is None else {"value": found.value, "half_interval": found.margin, "standard_errors": found.num_errors}

    return {
        "name": outcome.name,
        "metric": outcome.metric,
        "is_lower_better": outcome.is_lower_better,
        "seconds": seconds,
        "model": outcome.model,
        "store": outcome.store,
        "num_samples": list(outcome.rungs),
        "seeds": {"search": outcome.seeds[0], "held_out": outcome.seeds[1]},
        "verdict": outcome.verdict,
        "gain": difference(outcome.gain),
        "judged": {
            each.name: {
                "trial": None if each.trial is None else names[each.trial],
                "sampler": asdict(each.sampler),
                "evaluation": f"evaluate/{each.evaluation.key}",
                "metrics": dict(each.evaluation.metrics),
                "gain": difference(outcome.gain_of(each.name)),
                "optimism": difference(outcome.optimism(each.name)),
            }
            for each in outcome.judged
        },
        "fronts": {cost: [names[trial] for trial in front] for cost, front in outcome.fronts.items()},
        "trials": [
            {
                "name": trial.name,
                "batch": trial.batch,
                "given": trial.given,
                "sampler": asdict(trial.sampler),
                "results": [asdict(each) for each in trial.results.values()],
            }
            for trial in outcome.trials
        ],
        "files": dict(outcome.files),
        "tracking": {"uri": without_credentials(outcome.tracked.uri), "run_id": outcome.tracked.run_id}
        if outcome.tracked.run_id
        else None,
    }


def show(outcome: Outcome, seconds: float, console: Console) -> None:
    """The closing summary."""
    full = sum(outcome.rungs[-1] in trial.results for trial in outcome.trials)
    sets = f"{outcome.search.heldout_replicates} x " if outcome.search.heldout_replicates > 1 else ""
    title = f"With {sets}{outcome.rungs[-1]:,} held-out samples"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in ("", outcome.metric, "gain", "optimism", "steps", "GMACs", "seconds"):
        table.add_column(column, overflow="fold", justify="left" if not column else "right")
    for each in outcome.judged:
        table.add_row(
            each.name,
            with_interval(each.evaluation.metrics, outcome.metric),
            "–" if each.name == HAND_SET else str(outcome.gain_of(each.name)),
            str(outcome.optimism(each.name) or "–"),
            str(each.sampler.num_steps),
            f"{each.gmacs:.4g}",
            f"{each.seconds:.3g}",
        )
    console.print()
    console.print(table, highlight=False)
    console.print(f"\n{outcome.verdict}", highlight=False)
    console.print(
        f"{show_count(len(outcome.trials), 'trial')}, {full} with all {outcome.rungs[-1]:,} samples, {show_duration(seconds)}",
        highlight=False,
    )
    for what, place in (*outcome.files.items(), ("compare", f"enat compare {outcome.name}")):
        console.print(f"{what:<9} {place}", highlight=False, soft_wrap=True)


def interval_of(each: Judged, metric: str) -> float:
    """Half of the 95% interval of a held-out score, 0 if it has no error."""
    return half_interval(each.evaluation.metrics, metric) or 0.0
