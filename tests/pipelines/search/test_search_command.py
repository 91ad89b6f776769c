"""`enat search`: refused before anything is computed, killed and continued, judged with held-out samples, and compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enat.sampler_config import SamplerConfig
from material.digits_run import DIGITS, TINY_DIGITS, CommandLineRun
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.comparison.query import Query
from pipelines.comparison.query import compare as read_comparison
from pipelines.registry.evaluation_record import EVALUATION
from pipelines.registry.influences import INFLUENCES, Influences
from pipelines.run import searching
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.tracking.search import versions_at
from pipelines.workflow.config import ConfigError
from services.html_page import Page

SEARCH = (
    "name=digits-search",
    "search={num_trials: 7, batch_size: 3, num_samples: 40, num_rungs: 2, reduction: 2, heldout_replicates: 2, max_winners: 2}",
    "search.space={num_steps: [2, 3], guidance_scale: [1.0, 3.0], sampling_temperature: [0.0, 6.0]}",
    "evaluate.metrics=[frechet_distance,precision_recall]",
)


def _load(*overrides: str) -> RunConfig:
    return load_run(DIGITS, [*TINY_DIGITS, *SEARCH, *overrides])


# Refused -------------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_a_search_does() -> None:
    plan = searching.plan(_load())
    assert plan.rungs == (20, 40) and plan.metric == "frechet_distance" and plan.is_lower_better
    assert [arm.name for arm in plan.arms] == ["2", "3"] and (plan.sample_seed, plan.heldout_seed) == (0, 1)
    trial = plan.trial_run(SamplerConfig(num_steps=2), 20)
    assert trial.evaluate.metrics == ("frechet_distance",) and trial.evaluate.judge is None and trial.generate.replicates == 1
    held_out = plan.heldout_run(SamplerConfig(num_steps=2))
    assert (held_out.generate.seed, held_out.generate.replicates, held_out.generate.num_samples) == (1, 2, 40)
    assert held_out.evaluate.judge == "svc", "winners have all scores of the config"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search=null"], "the config has no section `search`"),
        (
            ["search.metric=fid"],
            r"search\.metric is fid, which features of classifier do not give; give frechet_distance",
        ),
        (
            ["search.metric=class_agreement", "evaluate.judge=null"],
            r"search\.metric is class_agreement, which needs evaluate\.judge",
        ),
        (["search.heldout_seed=0"], r"search\.heldout_seed is 0, as is sample_seed"),
        (["search.num_rungs=7"], r"search\.num_rungs is 7, but 40 samples cannot be divided by 2 so often"),
        (["search.metric=precision", "search.num_samples=4"], "precision_recall"),
        (
            ["search.space={num_steps: [1], reveal_orders: [halton, random], guidance_scale: null, sampling_temperature: null}"],
            "leaves nothing to search at 1 step",
        ),
    ],
)
def test_searches_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        searching.plan(_load(*overrides))


def test_a_config_with_a_wrong_space_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"search\.space\.guidance_scale is \[3\.0, 1\.0\]; it must be \[lowest, highest\]"):
        _load("search.space.guidance_scale=[3.0,1.0]")
    with pytest.raises(ConfigError, match=r"variants\.a\.search would be ignored"):
        load_run(DIGITS, ["variants={a: {search: {num_trials: 3}}}"])


def test_a_search_without_a_model_is_refused_and_computes_nothing(tmp_path: Path, enat: Callable[..., Any]) -> None:
    ended = enat("search", DIGITS, *TINY_DIGITS, *SEARCH, f"workspace={tmp_path}")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("enat: ")]
    assert "the model of this config is not in" in line and "a search does not train" in line
    assert not [*open_store(str(tmp_path / "store")).manifests()]


# A real search -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """A search that was killed and continued, beside one that was not. made: names of artifacts when it was killed."""

    killed: dict[str, Any]
    whole: dict[str, Any]
    workspace: Path
    made: frozenset[tuple[str, str]]
    stamps: dict[tuple[str, str], tuple[int, int]]

    @property
    def store(self) -> ArtifactStore:
        return open_store(str(self.workspace / "store"))


def _copied(digits_run: CommandLineRun, folder: Path) -> Path:
    for stage in ("dataset", "tokenizer", "token_map", "reference", "train"):
        shutil.copytree(digits_run.workspace / "store" / stage, folder / "store" / stage)
    return folder


def _names(workspace: Path, *stages: str) -> set[tuple[str, str]]:
    return {
        (path.parts[-3], path.parts[-2]) for path in (workspace / "store").glob("*/*/manifest.json") if path.parts[-3] in stages
    }


def _stamps(workspace: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """When and as which file each manifest was written."""
    paths = [*(workspace / "store").glob("*/*/manifest.json")]
    return {(path.parts[-3], path.parts[-2]): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


@pytest.fixture(scope="module")
def searched(
    digits_run: CommandLineRun,
    tmp_path_factory: pytest.TempPathFactory,
    enat: Callable[..., Any],
    kill_enat_when: Callable[..., None],
) -> Searched:
    root = tmp_path_factory.mktemp("search")
    workspaces = {name: _copied(digits_run, root / name) for name in ("killed", "whole")}

    def arguments(name: str) -> tuple[object, ...]:
        return ("search", DIGITS, *TINY_DIGITS, *SEARCH, f"workspace={workspaces[name]}")

    kill_enat_when(lambda: len(_names(workspaces["killed"], "evaluate")) >= 3, *arguments("killed"))
    made, stamps = frozenset(_names(workspaces["killed"], "generate", "evaluate")), _stamps(workspaces["killed"])
    answers = {}
    for name in workspaces:
        ended = enat(*arguments(name), "--json")
        assert ended.returncode == 0, ended.stderr
        answers[name] = json.loads(ended.stdout)
    return Searched(answers["killed"], answers["whole"], workspaces["killed"], made, stamps)


def _a_killed_search_continues_where_it_stopped(searched: Searched) -> None:
    """The same trials, scores and winners as without the kill; only times differ."""

    def facts(answer: dict[str, Any]) -> Any:
        trials = [
            (each["name"], each["batch"], each["sampler"], [(one["num_samples"], one["score"]) for one in each["results"]])
            for each in answer["trials"]
        ]
        return trials, {name: each["metrics"]["frechet_distance"] for name, each in answer["judged"].items() if name != "front-1"}

    assert facts(searched.killed) == facts(searched.whole)
    assert len(searched.killed["trials"]) == 7


def _nothing_is_made_twice(searched: Searched) -> None:
    """What existed at the kill was not written again, and there is one artifact for each sampler and number of samples."""
    now = _stamps(searched.workspace)
    assert searched.made and all(now[name] == stamp for name, stamp in searched.stamps.items())
    scored = {(json.dumps(each["sampler"]), one["num_samples"]) for each in searched.killed["trials"] for one in each["results"]}
    judged = {json.dumps(each["sampler"]) for each in searched.killed["judged"].values()}
    for stage in ("generate", "evaluate"):
        assert len(_names(searched.workspace, stage)) == len(scored) + len(judged), stage


def _the_same_command_again_computes_nothing(searched: Searched, enat: Callable[..., Any]) -> None:
    before = _stamps(searched.workspace)
    ended = enat("search", DIGITS, *TINY_DIGITS, *SEARCH, f"workspace={searched.workspace}")
    assert ended.returncode == 0 and _stamps(searched.workspace) == before
    assert all(len(line) <= 132 for line in ended.stdout.splitlines())
    assert "7 trials" in ended.stdout and "optimism" in ended.stdout and "digits-search.sampler.yaml" in ended.stdout


def _halving_scores_the_best_and_the_hand_set_sampler_again(searched: Searched) -> None:
    trials = searched.killed["trials"]
    for num_steps in (2, 3):
        own = [each for each in trials if each["sampler"]["num_steps"] == num_steps]
        (hand_set,) = [each for each in own if each["given"] == "hand-set"]
        assert [one["num_samples"] for one in hand_set["results"]] == [20, 40]
        assert all(each["results"][0]["num_samples"] == 20 for each in own)
    assert any(len(each["results"]) == 1 for each in trials), "some are not worth 40 samples"


def _gain_and_optimism_are_differences_with_their_errors(searched: Searched) -> None:
    """Computed again from the artifacts, sample by sample."""
    store, judged = searched.store, searched.killed["judged"]

    def read(evaluation: str) -> tuple[float, float, np.ndarray, np.ndarray]:
        manifest = store.read_manifest("evaluate", evaluation.removeprefix("evaluate/"))
        assert manifest is not None
        influences = Influences.parse(store.fetch(manifest, INFLUENCES).read_bytes())
        assert influences.labels is not None
        score, error = (manifest.metrics[f"frechet_distance{suffix}"] for suffix in ("", "_se"))
        return score, error, influences.by_score["frechet_distance"].astype(np.float64), influences.labels

    def variance(influence: np.ndarray, labels: np.ndarray) -> float:
        """Of the mean, for samples of given labels."""
        total = 0.0
        for label in set(labels.tolist()):
            own = [influence[i] for i in range(len(labels)) if labels[i] == label]
            mean = sum(own) / len(own)
            total += len(own) * sum((value - mean) ** 2 for value in own) / (len(own) - 1) / len(labels) ** 2
        return total

    def half_interval(first: tuple[Any, ...], second: tuple[Any, ...]) -> float:
        """Half of the 95% interval: in pairs, and what the errors of several sets have beside that of their mean."""
        paired = variance(first[2] - second[2], first[3])
        beside = sum(max(0.0, side[1] ** 2 - variance(side[2], side[3])) for side in (first, second))
        return 1.959964 * math.sqrt(paired + beside)

    best, hand_set = read(judged["best"]["evaluation"]), read(judged["hand-set"]["evaluation"])
    gain = searched.killed["gain"]
    assert gain["value"] == pytest.approx(hand_set[0] - best[0])
    if judged["best"]["sampler"] != judged["hand-set"]["sampler"]:
        assert gain["half_interval"] == pytest.approx(half_interval(hand_set, best), rel=1e-3)
    trial = next(each for each in searched.killed["trials"] if each["name"] == judged["best"]["trial"])
    found = read(trial["results"][-1]["evaluation"])
    optimism = judged["best"]["optimism"]
    assert optimism["value"] == pytest.approx(best[0] - found[0]) and found[0] == trial["results"][-1]["score"]
    assert optimism["half_interval"] == pytest.approx(half_interval(best, found), rel=1e-3)


def _held_out_samples_have_other_seeds(searched: Searched) -> None:
    seeds = {}
    for manifest in searched.store.manifests():
        if manifest.stage == "generate":
            seeds.setdefault(manifest.config["seed"], set()).add(manifest.config["num_samples"] * manifest.config["replicates"])
    assert seeds == {0: {20, 40}, 1: {80}}


def _the_best_sampler_is_a_preset_of_other_configs(searched: Searched) -> None:
    """The run with it reuses the artifacts of the search."""
    path = searched.killed["files"]["best"]
    run = load_run(DIGITS, [f"generate.sampler.preset={path}"])
    best = searched.killed["judged"]["best"]["sampler"]
    assert json.loads(json.dumps(run.generate.sampler.__dict__)) == best
    text = Path(path).read_text()
    assert text.startswith("# The best sampler of `enat search` for digits-search") and "# score  frechet_distance" in text


def _the_page_stands_alone_and_shows_both_fronts(searched: Searched) -> None:
    html = Path(searched.killed["files"]["report"]).read_text()
    page = Page.parse(html)
    assert not page.open
    links = [value for _, name, value in page.attributes if name in ("src", "href") and not value.startswith("data:")]
    assert not links, "nothing comes from a network"
    assert searched.killed["verdict"] in " ".join(page.text.split())
    by_name = {each["name"]: each for each in searched.killed["trials"]}
    for cost in ("gmacs", "seconds"):
        front = [by_name[name]["results"][-1] for name in searched.killed["fronts"][cost]]
        assert page.series(f"front {cost}")["front of the trials"] == [(one[cost], one["score"]) for one in front]
        scores = [one["score"] for one in front]
        assert scores == sorted(scores, reverse=True), "more cost, lower distance"
    best = searched.killed["judged"]["best"]["sampler"]
    drawn = [value for _, value in page.series("list mask_ratios")["best"]]
    assert len(drawn) == best["num_steps"] and drawn[-1] == 0
    assert set(page.images) == {f"samples of {name}" for name in searched.killed["judged"]}


def _comparisons_show_the_winners_and_trials_apart(searched: Searched) -> None:
    uri = f"sqlite:///{(searched.workspace / 'mlflow.db').absolute()}"
    winners = read_comparison(uri, Query(runs=("digits-search",)), "none")
    assert {row.samples for row in winners.rows} == _samples(searched.store, searched.killed["judged"].values())
    trials = read_comparison(uri, Query(runs=("digits-search-trials",)), "none")
    assert {row.num_samples for row in trials.rows} == {20, 40}
    (registered,) = versions_at(uri, "newest")
    assert "enat.key" in registered.tags and EVALUATION not in registered.tags, "trials are no evaluations of the model"


def _samples(store: ArtifactStore, judged: Any) -> set[str]:
    found = set()
    for each in judged:
        manifest = store.read_manifest("evaluate", each["evaluation"].removeprefix("evaluate/"))
        assert manifest is not None
        found.add(f"generate/{manifest.inputs['samples']['key']}")
    return found


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_and_continued(searched: Searched, enat: Callable[..., Any]) -> None:
    """One test, because each process of tests that takes a part of it would make the searches."""
    _a_killed_search_continues_where_it_stopped(searched)
    _nothing_is_made_twice(searched)
    _the_same_command_again_computes_nothing(searched, enat)
    _halving_scores_the_best_and_the_hand_set_sampler_again(searched)
    _gain_and_optimism_are_differences_with_their_errors(searched)
    _held_out_samples_have_other_seeds(searched)
    _the_best_sampler_is_a_preset_of_other_configs(searched)
    _the_page_stands_alone_and_shows_both_fronts(searched)
    _comparisons_show_the_winners_and_trials_apart(searched)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_search_that_is_asked_to_end_says_how_it_continues(
    digits_run: CommandLineRun, tmp_path: Path, end_enat_when: Callable[..., tuple[int, str]]
) -> None:
    workspace = _copied(digits_run, tmp_path / "ended")
    arguments = ("search", DIGITS, *TINY_DIGITS, *SEARCH, f"workspace={workspace}")
    code, output = end_enat_when(lambda: len(_names(workspace, "evaluate")) >= 1, *arguments)
    assert code == 130 and "run the same command to continue" in output and "Traceback" not in output
    assert "stopped:" in output and "of 7 trials" in output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "search.max_gmacs=0.001",
            r"search.max_gmacs is 0.001, but samples of 2 steps take at least|samplers of 2 steps take at least",
        ),
        ("generate.checkpoint=15", "keep_every"),
    ],
)
def test_budgets_that_no_sampler_meets_are_refused(
    override: str, message: str, digits_run: CommandLineRun, tmp_path: Path, enat: Callable[..., Any]
) -> None:
    workspace = _copied(digits_run, tmp_path / "refused")
    ended = enat("search", DIGITS, *TINY_DIGITS, *SEARCH, f"workspace={workspace}", override)
    assert ended.returncode == 2
    assert any(part in ended.stderr for part in message.split("|")), ended.stderr
    assert not _names(workspace, "generate", "evaluate")
