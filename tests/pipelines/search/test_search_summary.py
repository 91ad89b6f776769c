"""What a search says: gains with their errors and signs, in 80 columns, and files that give the sampler back."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.registry.influences import Evaluated, Influences
from pipelines.sampling.presets import presets, with_preset
from pipelines.search import page, summary
from pipelines.search.config import SearchConfig, SpaceConfig
from pipelines.search.space import arms_of
from pipelines.search.study import Result, Trial
from pipelines.search.summary import Judged, Outcome
from pipelines.tracking.run import RunHandle

HAND_SET = SamplerConfig(num_steps=8, guidance_scale=2.0, sampling_temperature=4.0, remask_temperature=6.0)
LABELS = np.arange(200) % 10
COST = {"gmacs_total": 0.10624, "worker_seconds_per_image": 0.018832}


def _evaluated(metric: str, score: float, seed: int, error: float) -> Evaluated:
    influence = np.random.default_rng(seed).normal(scale=error * math.sqrt(200), size=200).astype(np.float32)
    influences = Influences({metric: influence}, LABELS)
    return Evaluated({metric: score, f"{metric}_se": influences.error(metric), **COST}, influences)


def _outcome(best: float, metric: str = "frechet_distance", error: float = 0.1, sampler: SamplerConfig | None = None) -> Outcome:
    arm = arms_of(SpaceConfig(), HAND_SET)[0]
    sampler = presets()["autonat-8"] if sampler is None else sampler
    result = Result(num_samples=200, score=best - 0.3, error=error, gmacs=0.1, seconds=0.02, evaluation="e" * 64)
    trial = Trial(arm, 7, 0, sampler, results={200: result}, name="trial7")
    scores = {"hand-set": (6.0172, HAND_SET, None, 0), "best": (best, sampler, trial, 1), "best-16": (best, sampler, trial, 2)}
    judged = []
    for name, (score, own, of, seed) in scores.items():
        held_out = _evaluated(metric, score, seed, error)
        made = Manifest(
            stage="evaluate", key="e" * 64, stage_version=5, config={}, inputs={}, files=(), metrics=dict(held_out.scores)
        )
        judged.append(Judged(name=name, sampler=own, trial=of, evaluation=made, held_out=held_out))
    return Outcome(
        name="digits-search",
        metric=metric,
        rungs=(100, 200),
        search=SearchConfig(),
        trials=(trial,),
        judged=tuple(judged),
        searched={"best": _evaluated(metric, best - 0.3, 3, error)},
        fronts={"gmacs": (trial,), "seconds": (trial,)},
        seeds=(0, 1),
        model="train/" + "a" * 64,
        store="store",
        tracked=RunHandle("", None),
        files={"best": "runs/digits-search.sampler.yaml", "report": "runs/digits-search.html"},
    )


def test_a_gain_is_a_difference_of_pairs_with_its_error() -> None:
    outcome = _outcome(5.0)
    first, second = (outcome.by_name[name].held_out.influences for name in ("best", "hand-set"))
    assert first is not None and second is not None
    difference = (first.by_score["frechet_distance"] - second.by_score["frechet_distance"]).astype(np.float64)
    variance = 0.0
    for label in range(10):
        own = difference[label == LABELS]
        variance += len(own) * own.var(ddof=1) / len(difference) ** 2
    assert outcome.gain.value == pytest.approx(1.0172)
    assert outcome.gain.margin == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-4)
    assert outcome.gain.num_errors == pytest.approx(1.0172 / math.sqrt(variance), rel=1e-4)
    assert "is better than the hand-set one by 1.02 ±" in outcome.verdict and "best-16 is better by 1.02 ±" in outcome.verdict


def test_optimism_is_positive_if_the_search_was_too_good() -> None:
    lower, higher = _outcome(5.0), _outcome(0.8, "precision", 0.01)
    for outcome, sign in ((lower, 1), (higher, -1)):
        optimism = outcome.optimism("best")
        assert optimism is not None and optimism.value == pytest.approx(0.3 * sign), "a higher precision is better"
        assert outcome.optimism("hand-set") is None
    assert higher.gain.value == pytest.approx(0.8 - 6.0172)


def test_a_verdict_claims_no_more_than_the_error_allows() -> None:
    assert "cannot be told from the hand-set one" in _outcome(5.9).verdict
    assert "cannot be told from the hand-set one" in _outcome(6.5).verdict, "worse with held-out samples"
    assert _outcome(6.0, sampler=HAND_SET).verdict == "No sampler of the search is better than the hand-set one."


def test_the_summary_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    outcome = _outcome(5.7864)
    summary.show(outcome, 583.0, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert f" {outcome.metric} " in text, "headings are not folded"
    row = next(line for line in text.splitlines() if line.startswith("best "))
    assert "5.786 ± 0.18" in row and "0.1062" in row and "0.0188" in row
    assert "enat compare digits-search" in text and "9.7 min" in text


def test_the_file_of_a_sampler_gives_it_back(tmp_path: Path) -> None:
    outcome = _outcome(5.0)
    for name in ("best", "hand-set"):
        (tmp_path / "found.yaml").write_text(page.sampler_yaml(outcome, name))
        assert SamplerConfig(**with_preset({"preset": "found.yaml"}, tmp_path)) == outcome.by_name[name].sampler
    text = page.sampler_yaml(outcome, "best")
    assert text.startswith("# The best sampler of `enat search` for digits-search: trial7 of 1 trial.")
    assert "# score  frechet_distance 5 ± 0.18 of 4 x 200 held-out samples" in text
