"""Proposals and scores in Optuna's storage: the same after any interruption, and kept apart from those of other searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enat.sampler_config import SamplerConfig
from pipelines.search.config import SpaceConfig
from pipelines.search.space import Arm, arms_of
from pipelines.search.study import Result, Study, Trial, held

HAND_SET = SamplerConfig(num_steps=4, guidance_scale=2.0, sampling_temperature=4.0, remask_temperature=6.0)
SMALL, LARGE = 20, 60


@pytest.fixture
def arms() -> list[Arm]:
    return arms_of(SpaceConfig(num_steps=(4, 8)), HAND_SET)


def _open(path: Path, arms: list[Arm], **identity: Any) -> Study:
    return Study(path, arms, {"model": "m", **identity}, seed=0, is_lower_better=True)


def _loss(sampler: SamplerConfig) -> float:
    """The best sampler has guidance 3 and temperature 1 at each step."""
    guidance = sum((sampler.guidance_at(step) - 3) ** 2 for step in range(sampler.num_steps))
    return (
        guidance + sum((sampler.sampling_temperature_at(step) - 1) ** 2 for step in range(sampler.num_steps))
    ) / sampler.num_steps


def _result(trial: Trial, size: int) -> Result:
    loss = _loss(trial.sampler)
    return Result(num_samples=size, score=loss, error=0.1, gmacs=float(trial.arm.num_steps), seconds=0.1, evaluation="e")


class _StopError(Exception):
    pass


def _search(reopen: Callable[[], Study], num_trials: int, stop_after: int | None = None) -> Study:
    """What `enat search` does, with a formula as the score. stop_after: calls of the study."""
    study, calls = reopen(), 0

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise _StopError
        return function(*arguments)

    while True:
        last = study.trials[-1].batch if study.trials else 0
        batch = [trial for trial in study.trials if trial.batch == last]
        if len(batch) == 4 and all(trial.is_done for trial in batch):
            last, batch = last + 1, []
        if last == 0 and not batch:
            batch.append(call(study.give, study.arms[0], "hand-set", HAND_SET, 0))
        while len(batch) < 4 and len(study.trials) < num_trials:
            arm = min(study.arms, key=lambda each: sum(trial.arm == each for trial in study.trials))
            batch.append(call(study.propose, arm, last, lambda sampler: True))
        if not any(not trial.is_done for trial in batch):
            return study
        for trial in batch:
            if SMALL not in trial.results:
                call(study.record, trial, _result(trial, SMALL))
        for trial in sorted(batch, key=lambda trial: trial.results[SMALL].score)[:2]:
            if LARGE not in trial.results:
                call(study.record, trial, _result(trial, LARGE))
        for trial in [trial for trial in batch if not trial.is_done]:
            call(study.finish, trial, LARGE)


def _facts(study: Study) -> list[tuple[Any, ...]]:
    return [(trial.name, trial.batch, trial.given, trial.sampler, trial.results, trial.is_done) for trial in study.trials]


@pytest.mark.faults
def test_a_search_that_is_interrupted_anywhere_is_the_same(tmp_path: Path, arms: list[Arm]) -> None:
    whole = _facts(_search(lambda: _open(tmp_path / "whole.db", arms), 12))
    assert len(whole) == 12 and all(fact[-1] for fact in whole)
    for stop_after in (1, 6):
        path = tmp_path / f"{stop_after}.db"
        for _ in range(100):
            try:
                study = _search(lambda path=path: _open(path, arms), 12, stop_after)  # type: ignore[misc]
                break
            except _StopError:
                continue
        assert _facts(study) == whole, f"interrupted every {stop_after} calls"
        assert _facts(_open(path, arms)) == whole, "as it was stored"


def test_more_trials_continue_a_search(tmp_path: Path, arms: list[Arm]) -> None:
    few = _facts(_search(lambda: _open(tmp_path / "s.db", arms), 8))
    more = _facts(_search(lambda: _open(tmp_path / "s.db", arms), 12))
    assert more[:8] == few and len(more) == 12


@pytest.mark.slow
def test_a_proposal_that_was_lost_is_made_again(tmp_path: Path, arms: list[Arm]) -> None:
    """A process that is killed while it proposes leaves a trial of Optuna without a sampler."""
    study, other = _open(tmp_path / "a.db", arms), _open(tmp_path / "b.db", arms)
    study._studies[arms[0].name].ask()
    again = _open(tmp_path / "a.db", arms)
    assert not again.trials
    proposed = [each.propose(arms[0], 0, lambda sampler: True).sampler for each in (again, other)]
    assert proposed[0] == proposed[1]


@pytest.mark.slow
def test_proposals_become_better(tmp_path: Path, arms: list[Arm]) -> None:
    """TPE learns from scores: the last proposals are better than the first, random ones."""
    study = _search(lambda: _open(tmp_path / "s.db", arms), 80)
    losses = [_loss(trial.sampler) for trial in study.trials if trial.given is None]
    assert sorted(losses[-20:])[10] < 0.7 * sorted(losses[:12])[6]


def test_another_identity_is_another_search(tmp_path: Path, arms: list[Arm]) -> None:
    _search(lambda: _open(tmp_path / "s.db", arms), 4)
    assert not _open(tmp_path / "s.db", arms, model="another").trials
    assert len(_open(tmp_path / "s.db", arms).trials) == 4


@pytest.mark.slow
def test_samplers_beyond_the_budget_are_not_trials(tmp_path: Path, arms: list[Arm]) -> None:
    study = _open(tmp_path / "s.db", arms)

    def is_cheap(sampler: SamplerConfig) -> bool:
        return sampler.guidance_at(0) < 2.0

    for number in range(8):
        trial = study.propose(arms[0], 0, is_cheap)
        assert is_cheap(trial.sampler)
        study.record(trial, _result(trial, LARGE))
        study.finish(trial, LARGE)
        assert len(study.trials) == number + 1
    assert len(study._studies[arms[0].name].trials) > 8, "some proposals were refused"
    with pytest.raises(ValueError, match=r"100 samplers in turn that were proposed at 4 steps were beyond search\.max_gmacs"):
        study.propose(arms[0], 1, lambda sampler: False)


def test_optuna_learns_scores_of_more_samples_first(tmp_path: Path, arms: list[Arm]) -> None:
    study = _search(lambda: _open(tmp_path / "s.db", arms), 4)
    for trial in study.trials:
        (frozen,) = (each for each in study._studies[trial.arm.name].trials if each.number == trial.number)
        if LARGE in trial.results:
            assert frozen.state.name == "COMPLETE" and frozen.value == trial.results[LARGE].score
        else:
            assert frozen.state.name == "PRUNED" and frozen.intermediate_values == {SMALL: trial.results[SMALL].score}
    slow = study.propose(arms[0], 1, lambda sampler: True)
    study.record(slow, _result(slow, SMALL))
    study.refuse(slow)
    study.finish(slow, LARGE)
    frozen = study._studies[slow.arm.name].trials[slow.number]
    assert frozen.state.name == "PRUNED" and not frozen.intermediate_values


def test_two_processes_do_not_share_a_study(tmp_path: Path) -> None:
    with held(tmp_path / "s.db"):
        with pytest.raises(ValueError, match="another `enat search` is using"), held(tmp_path / "s.db"):
            pass
        with held(tmp_path / "other.db"):
            pass
    with held(tmp_path / "s.db"):
        pass  # the first one has ended
