"""The report of a search as one self-contained HTML page, and its best sampler as a YAML file."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from enat.sampler_config import SamplerConfig
from pipelines.artifacts.store import ArtifactStore
from pipelines.formatting import show_count
from pipelines.pages import page
from pipelines.pages.chart import Chart, Point, Series
from pipelines.registry.influences import half_interval, with_interval
from pipelines.search.space import lists_of
from pipelines.search.study import Trial
from pipelines.search.summary import BEST, HAND_SET, Judged, Outcome, interval_of, score_text
from pipelines.storage.redaction import without_credentials

GRID = "samples.png"  # of stage evaluate
_TITLES = {
    "mask_ratios": "tokens left masked",
    "guidance_scales": "guidance scale",
    "sampling_temperatures": "sampling temperature",
    "remask_temperatures": "remask temperature",
}
_COSTS = {"gmacs": "GMACs an image (both guidance passes and the decoder)", "seconds": "measured seconds an image, by one worker"}
_NUM_TRIALS = 200  # rows of the table of trials


def sampler_yaml(outcome: Outcome, name: str) -> str:
    """A judged sampler as the file that generate.sampler.preset names."""
    each = outcome.by_name[name]
    metrics, trial = each.evaluation.metrics, each.trial
    found = (
        f"{trial.name} of {show_count(len(outcome.trials), 'trial')}"
        if trial is not None and trial.given is None
        else "a given sampler"
    )
    sets = f"{outcome.search.heldout_replicates} x {outcome.rungs[-1]:,} held-out samples"
    lines = [
        f"# The {name} sampler of `enat search` for {outcome.name}: {found}.",
        f"# model  {outcome.model}",
        f"# score  {outcome.metric} {with_interval(metrics, outcome.metric)} of {sets}",
        f"# cost   {each.gmacs:.4g} GMACs an image",
        "# use    generate.sampler.preset: the path of this file",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(_given(each.sampler), sort_keys=False, default_flow_style=None, width=120)


def _given(sampler: SamplerConfig) -> dict[str, Any]:
    """The values that differ from the defaults, and the number of steps."""
    values = {each.name: getattr(sampler, each.name) for each in fields(sampler)}
    usual = {each.name: each.default for each in fields(sampler)}
    changed = {name: value for name, value in values.items() if name == "num_steps" or value != usual[name]}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in changed.items()}


def write(outcome: Outcome, workspace: Path, store: ArtifactStore) -> None:
    """Write the files that `outcome.files` names."""
    workspace.mkdir(parents=True, exist_ok=True)
    for name in outcome.by_name:
        if name in outcome.files:
            Path(outcome.files[name]).write_text(sampler_yaml(outcome, name), encoding="utf-8")
    Path(outcome.files["report"]).write_text(render(outcome, store, datetime.now(UTC)), encoding="utf-8")


def render(outcome: Outcome, store: ArtifactStore, created: datetime) -> str:
    charts = {f"front {cost}": front_chart(outcome, cost) for cost in _COSTS}
    charts["history"] = history_chart(outcome)
    charts |= {f"list {name}": _lists_chart(outcome, name) for name in _TITLES}
    grids = []
    for each in outcome.judged:
        with Image.open(store.fetch(each.evaluation, GRID)) as image:
            grids.append({"name": each.name, "picture": page.picture(image.copy())})
    trials = sorted(outcome.trials, key=lambda trial: -max(trial.results, default=0))
    return page.render(
        "pipelines.search",
        "search.html.j2",
        charts,
        title=f"search of {outcome.name}",
        created=f"{created:%Y-%m-%d %H:%M} UTC",
        outcome=outcome,
        store=without_credentials(outcome.store),
        best=outcome.by_name[BEST],
        hand_set=outcome.by_name[HAND_SET],
        with_interval=with_interval,
        score_text=score_text,
        files={each.name: sampler_yaml(outcome, each.name) for each in outcome.judged},
        lists=_TITLES,
        grids=grids,
        trials=trials[:_NUM_TRIALS],
        num_left_out=max(0, len(trials) - _NUM_TRIALS),
    )


def front_chart(outcome: Outcome, cost: str) -> Chart:
    """All trials with the samples of the search, their front, and the judged samplers with held-out ones."""
    full = outcome.rungs[-1]
    scored = [trial for trial in outcome.trials if full in trial.results]
    series = [
        Series(
            name="trials, with the samples of the search",
            points=tuple(_point(outcome, each, cost) for each in scored),
            is_quoted=True,
        ),
        Series(
            name="front of the trials",
            points=tuple(_point(outcome, each, cost) for each in outcome.fronts[cost]),
            line="solid",
        ),
    ]
    series += [Series(name=f"{each.name}, held-out", points=(_judged_point(outcome, each, cost),)) for each in outcome.judged]
    direction = "lower" if outcome.is_lower_better else "higher"
    return Chart(
        x_title=_COSTS[cost],
        y_title=f"{outcome.metric} of {full:,} samples, {direction} is better",
        series=tuple(one for one in series if one.points),
    )


def _point(outcome: Outcome, trial: Trial, cost: str) -> Point:
    result = trial.results[outcome.rungs[-1]]
    error = half_interval({"score": 0.0, "score_se": result.error}, "score") if result.error is not None else None
    text = f"{trial.given or trial.name}\n{outcome.metric} {score_text(result)}\n{_cost_text(result.gmacs, result.seconds)}"
    return Point(getattr(result, cost), result.score, text, error=error or 0.0)


def _judged_point(outcome: Outcome, each: Judged, cost: str) -> Point:
    text = f"{each.name}, held-out\n{outcome.metric} {with_interval(each.evaluation.metrics, outcome.metric)}"
    text += f"\n{_cost_text(each.gmacs, each.seconds)}"
    value = each.evaluation.metrics[outcome.metric]
    return Point(getattr(each, cost), value, text, size=11.0, error=interval_of(each, outcome.metric))


def _cost_text(gmacs: float, seconds: float) -> str:
    return f"{gmacs:.4g} GMACs, {seconds:.3g} s an image"


def history_chart(outcome: Outcome) -> Chart:
    """Scores in the order of the trials, by number of samples, and the best so far with all samples."""
    order = {trial: number for number, trial in enumerate(outcome.trials, start=1)}
    series = []
    for size in outcome.rungs:
        scored = [trial for trial in outcome.trials if size in trial.results]
        points = tuple(
            Point(order[each], each.results[size].score, f"{each.given or each.name}\n{score_text(each.results[size])}")
            for each in scored
        )
        series.append(Series(name=f"{size:,} samples", points=points))
    best: list[Point] = []
    for trial in outcome.trials:
        if (result := trial.results.get(outcome.rungs[-1])) is not None:
            scores = [*([best[-1].y] if best else []), result.score]
            best.append(Point(order[trial], min(scores) if outcome.is_lower_better else max(scores)))
    series.append(Series(name="best so far, all samples", points=tuple(best), line="solid", has_markers=False))
    return Chart(x_title="trial", y_title=outcome.metric, series=tuple(one for one in series if one.points))


def _lists_chart(outcome: Outcome, name: str) -> Chart:
    series = tuple(
        Series(
            name=each.name,
            points=tuple(Point(step, value) for step, value in enumerate(lists_of(each.sampler)[name], start=1)),
            line="solid" if each.name != HAND_SET else "dash",
        )
        for each in outcome.judged
    )
    return Chart(x_title="step", y_title=_TITLES[name], series=series)
