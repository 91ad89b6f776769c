"""Proposals and their scores, in Optuna's storage: an SQLite file that outlives the process.

Why Optuna and not Ray Tune: a trial is two stages of this project's own driver. The driver already places work on the cluster, runs
stages side by side and continues what was interrupted, and the artifact store is the cache of all results. Tune would bring a
scheduler, a checkpoint format and a store of results of its own, beside those. What is missing is what to try next, which Optuna
proposes (TPE, Bergstra et al. 2011) one call at a time.

Each arm of the space is a study of Optuna. Its name has a digest of everything that the scores depend on, so that results of
another model, space or seed never mix. A proposal depends only on the seed, its number, and the trials before it: a search that was
killed and continued proposes what an uninterrupted one does.

A trial of Optuna is RUNNING until its batch is done. Then it is COMPLETE, with the score of all samples, or PRUNED, with its scores
of fewer samples; for TPE more samples count more. A sampler beyond the budget is PRUNED without scores, and is not a trial of the
search.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enat.sampler_config import SamplerConfig
from pipelines.search.space import Arm
from pipelines.storage.base import digest_of

if TYPE_CHECKING:
    import optuna

_STARTUP = 3  # trials of an arm, given ones included, before proposals follow their scores
_REFUSED = 100  # proposals beyond the budget, one after the other
_GIVEN, _SAMPLER, _BATCH, _ORDER, _RESULTS = "given", "sampler", "batch", "order", "results"  # attributes of a trial


@dataclass(frozen=True, kw_only=True)
class Result:
    """One score of a sampler. error: its standard error, None if it has none.   gmacs, seconds: of an image.

    evaluation: key of the artifact of stage evaluate.
    """

    num_samples: int
    score: float
    error: float | None
    gmacs: float
    seconds: float
    evaluation: str


@dataclass(eq=False)
class Trial:
    """A sampler that is tried. given: what it is called if it was not proposed, such as "hand-set".   results: by num_samples."""

    arm: Arm
    number: int
    batch: int
    sampler: SamplerConfig
    given: str | None = None
    is_done: bool = False
    results: dict[int, Result] = field(default_factory=dict)
    name: str = ""

    @property
    def last(self) -> Result | None:
        """The score of the most samples."""
        return self.results[max(self.results)] if self.results else None


class Study:
    """The trials of a search, in the order in which they were proposed."""

    def __init__(self, path: Path, arms: Sequence[Arm], identity: Mapping[str, Any], *, seed: int, is_lower_better: bool) -> None:
        """identity: what the scores depend on. Reads the trials of earlier processes."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": 60}})
        self.arms, self._seed = [*arms], seed
        self._is_single = len(arms) == 1
        digest = digest_of(dict(identity))[:16]
        self._studies: dict[str, optuna.Study] = {
            arm.name: optuna.create_study(
                storage=storage,
                study_name=f"{digest}/{arm.name}",
                direction="minimize" if is_lower_better else "maximize",
                load_if_exists=True,
            )
            for arm in arms
        }
        known = [(arm, frozen) for arm in arms for frozen in self._studies[arm.name].get_trials(deepcopy=False)]
        # The others were beyond the budget, or their process died while they were proposed.
        known = [(arm, frozen) for arm, frozen in known if _BATCH in frozen.user_attrs]
        known.sort(key=lambda each: each[1].user_attrs[_ORDER])
        self.trials = [self._read(arm, frozen) for arm, frozen in known]

    def _read(self, arm: Arm, frozen: optuna.trial.FrozenTrial) -> Trial:
        attributes = frozen.user_attrs
        results = [Result(**each) for each in attributes.get(_RESULTS, {}).values()]
        return Trial(
            arm=arm,
            number=frozen.number,
            batch=attributes[_BATCH],
            sampler=SamplerConfig(**attributes[_SAMPLER]),
            given=attributes.get(_GIVEN),
            is_done=frozen.state.is_finished(),
            results={each.num_samples: each for each in results},
            name=self._name(arm, frozen.number),
        )

    def _name(self, arm: Arm, number: int) -> str:
        return f"trial{number}" if self._is_single else f"trial{number}-{arm.name}"

    def give(self, arm: Arm, name: str, sampler: SamplerConfig, batch: int) -> Trial:
        """Add a sampler that is not proposed. Optuna learns the nearest numbers of the arm with its score."""
        import optuna

        study, numbers = self._studies[arm.name], arm.nearest(sampler)
        attributes = {_GIVEN: name, _SAMPLER: _plain(sampler), _ORDER: len(self.trials), _BATCH: batch}
        distributions = _distributions(arm)
        running = optuna.trial.TrialState.RUNNING
        study.add_trial(optuna.create_trial(state=running, params=numbers, distributions=distributions, user_attrs=attributes))
        return self._added(Trial(arm, study.get_trials(deepcopy=False)[-1].number, batch, sampler, name))

    def propose(self, arm: Arm, batch: int, is_allowed: Callable[[SamplerConfig], bool]) -> Trial:
        """A new sampler. is_allowed: whether a sampler may be tried. Raises ValueError if no allowed one was found."""
        import optuna

        study = self._studies[arm.name]
        self._clear(study)
        for _ in range(_REFUSED):
            trials = study.get_trials(deepcopy=False)
            number = sum(each.state != optuna.trial.TrialState.FAIL for each in trials)
            own = int(digest_of({"seed": self._seed, "arm": arm.name, "number": number})[:8], 16)
            study.sampler = optuna.samplers.TPESampler(seed=own, n_startup_trials=_STARTUP, multivariate=True)
            asked = study.ask(_distributions(arm))
            sampler = arm.sampler(asked.params)
            if not is_allowed(sampler):
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                continue
            asked.set_user_attr(_SAMPLER, _plain(sampler))
            asked.set_user_attr(_ORDER, len(self.trials))
            asked.set_user_attr(_BATCH, batch)  # the last: a trial that has it is complete
            return self._added(Trial(arm, asked.number, batch, sampler))
        raise ValueError(
            f"{_REFUSED} samplers in turn that were proposed at {arm.num_steps} steps were beyond search.max_gmacs; raise it"
        )

    def _added(self, trial: Trial) -> Trial:
        trial.name = self._name(trial.arm, trial.number)
        self.trials.append(trial)
        return trial

    def _clear(self, study: optuna.Study) -> None:
        """End what a killed process was about to propose: it was not tried."""
        import optuna

        for frozen in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if _BATCH not in frozen.user_attrs:
                study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)

    def record(self, trial: Trial, result: Result) -> None:
        """Store a score before the batch is done."""
        trial.results[result.num_samples] = result
        self._optuna_trial(trial).set_user_attr(_RESULTS, {str(size): asdict(each) for size, each in trial.results.items()})

    def finish(self, trial: Trial, num_samples: int) -> None:
        """Tell Optuna the scores of a trial. num_samples: of a complete score."""
        import optuna

        if trial.is_done:
            return
        study, asked = self._studies[trial.arm.name], self._optuna_trial(trial)
        if num_samples in trial.results:
            study.tell(trial.number, trial.results[num_samples].score)
        else:
            for size, result in trial.results.items():
                asked.report(result.score, step=size)
            study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
        trial.is_done = True

    def refuse(self, trial: Trial) -> None:
        """Tell Optuna that a sampler took longer than the budget: as bad as any."""
        import optuna

        if not trial.is_done:
            self._studies[trial.arm.name].tell(trial.number, state=optuna.trial.TrialState.PRUNED)
            trial.is_done = True

    def _optuna_trial(self, trial: Trial) -> optuna.Trial:
        import optuna

        study = self._studies[trial.arm.name]
        (frozen,) = (each for each in study.get_trials(deepcopy=False) if each.number == trial.number)
        return optuna.trial.Trial(study, frozen._trial_id)


def _distributions(arm: Arm) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution

    return {name: FloatDistribution(each.low, each.high, log=each.is_log) for name, each in arm.ranges.items()}


def _plain(sampler: SamplerConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(sampler)))


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep the study to this process. Raises ValueError if another one has it. The system ends it with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another `enat search` is using {path}; wait for it, or give another workspace") from error
        yield
