"""What a person sees of a plan and of a run, on terminals of several widths: it fits, and no hash is broken."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from material.digits_run import DIGITS
from pipelines.data import inspection
from pipelines.prediction import show
from pipelines.run import prediction, runner, summary
from pipelines.run.loading import load_run
from pipelines.stages import evaluate
from pipelines.workflow.stage import FinishedStage, PlannedStage


def _printed(draw: Callable[[Console], None], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    draw(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def planned(digits_run) -> list[PlannedStage]:
    return [*digits_run.planned().values()]


def _answer(digits_run, planned: list[PlannedStage], make_session: Callable[..., Any], is_reused: bool) -> dict[str, Any]:
    done = [FinishedStage(item.node, item.manifest, is_reused, 1.0) for item in planned if item.manifest is not None]
    return summary.summarize("digits", done, make_session(digits_run.store), 20.0, report=None)


@pytest.mark.parametrize("is_reused", [False, True])
def test_the_summary_fits_80_columns_with_the_scores_first_asked_for(
    digits_run, planned: list[PlannedStage], make_session: Callable[..., Any], is_reused: bool
) -> None:
    answer = _answer(digits_run, planned, make_session, is_reused)
    text = _printed(lambda console: summary.show(answer, console), 80)
    places = (line for line in text.splitlines() if not line.startswith("artifacts "))
    assert max(map(len, places)) <= 80
    rows = text.partition("What it is worth")[2].splitlines()[2:]
    names = [row.split()[0] for row in rows[: rows.index("")]]
    assert names[0] == "frechet_distance" and names[-2:] == ["gmacs_total", "images_per_second"] and "class_agreement" in names
    assert not [name for name in names if name.endswith(("_se", "_std"))] and len(names) < 15
    assert "2.0 M parameters, 20 steps, loss" in text and f"enat artifacts show evaluate/{answer['stages'][8]['key'][:12]}" in text


def test_models_that_do_not_fit_are_in_a_further_table(
    digits_run, planned: list[PlannedStage], make_session: Callable[..., Any]
) -> None:
    answer = _answer(digits_run, planned, make_session, is_reused=True)
    answer["scores"] |= {f"another_model_{number}": answer["scores"]["main"] for number in range(5)}
    text = _printed(lambda console: summary.show(answer, console), 80)
    assert all(f"another_model_{number} " in text.replace("\n", " \n") for number in range(5)), "names are whole"
    assert text.count("frechet_distance, as a multiple of that of main:") == 1 and "another_model_4 1.0" in " ".join(text.split())
    assert re.search(r"untrained [0-9.]+, another_model_0 1\.0", " ".join(text.split()))
    assert text.count("\nfrechet_distance  ") > 1 and all(len(line) <= 80 for line in text.splitlines()[:60])
    assert _printed(lambda console: summary.show(answer, console), 200).count("\nfrechet_distance  ") == 1


@pytest.mark.parametrize(("width", "num_left_out"), [(132, {0}), (80, {0, 1, 2}), (60, {3})])
def test_a_plan_leaves_out_columns_before_it_breaks_a_hash(digits_run, width: int, num_left_out: set[int]) -> None:
    run = load_run(DIGITS, (*digits_run.overrides, f"workspace={digits_run.workspace}"))
    planned = [replace(item, manifest=None) if "generate" in item.node.id else item for item in digits_run.planned().values()]
    planned = [item if item.manifest else replace(item, key=None) for item in planned]
    machines = prediction.machines_of(run, "1x8xH200", None)
    predicted = prediction.of_plan(run, planned, digits_run.store, machines, num_jobs=runner.default_jobs(run.cluster))
    text = _printed(lambda console: summary.show_plan(planned, "runs/store", console, predicted), width)
    rows = text.split("\n\n")[0].splitlines()
    left_out = [title for sentence in re.findall("no room for ([^;]+);", text) for title in sentence.split(", ")]
    assert max(map(len, rows)) <= width and left_out == [*show.LEAST[: len(left_out)]] and len(left_out) in num_left_out
    assert all((f" {title}" in rows[0]) != (title in left_out) for title in show.LEAST)
    keys = {item.key[:12] for item in planned if item.key}
    assert keys == set(re.findall(r"\b[0-9a-f]{12}\b", text)) and "after train" in text


def test_hashes_of_an_artifact_are_whole(digits_run, planned: list[PlannedStage]) -> None:
    for item in planned:
        assert item.manifest is not None
        facts = inspection.facts_table(digits_run.store, item.manifest)
        name, digest, *_ = _printed(lambda console, facts=facts: console.print(facts, soft_wrap=True), 80).splitlines()  # type: ignore[misc]
        assert name == f"{item.manifest.stage}/{item.manifest.key}" and digest == f"digest {item.manifest.digest}"
        assert len(name) <= 80


def test_the_shown_scores_are_those_of_the_stage() -> None:
    assert set(evaluate._LISTED) <= set(summary.SCORES), "what lists show is in the summary"
