"""`enat search`: trials as stages of the driver, proposals from Optuna, and the winners judged with held-out seeds.

A batch of trials is one graph: generate and evaluate of each, beside the same model and reference. What a trial makes is an
artifact like any other: shared, resumable, and never computed twice, also by a later search or by `enat run`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from enat.config import ENATConfig, VQGANConfig
from enat.cost import generation_cost
from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.samples import num_masked_of
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.evaluation.scores import published_name
from pipelines.registry.influences import Evaluated, evaluated, margin_of_difference
from pipelines.run import graph, kept_log, runner, tracked
from pipelines.run.config import RunConfig
from pipelines.sampling.presets import presets
from pipelines.search import page, summary
from pipelines.search.config import METRICS, SearchConfig, is_lower_better
from pipelines.search.front import distinct, pareto_front
from pipelines.search.halving import passed_on, rung_sizes
from pipelines.search.space import Arm, arms_of
from pipelines.search.study import Result, Study, Trial, held
from pipelines.search.summary import BEST, HAND_SET, Judged, Outcome
from pipelines.stages import evaluate, generate
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle
from pipelines.workflow import config as configuration
from pipelines.workflow import driver
from pipelines.workflow.config import ConfigError
from pipelines.workflow.model_runs import MODEL_KIND, ModelRuns
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.node_run import Session
from pipelines.workflow.progress import Bar
from pipelines.workflow.stage import FinishedStage, Node

_log = logging.getLogger(__name__)
_FILE = {BEST: "sampler"}  # what the file of a judged sampler is called, if not by its name
_DRAWN = 400  # samplers that show whether any meets a budget
_OF_SAMPLES = (generate.STAGE.name, evaluate.STAGE.name)
_NOT_IN_IDENTITY = ("num_trials", "heldout_seed", "heldout_replicates", "max_winners")
_SIDES = {"class_agreement": "judge", "clip_score": "clip_score"}  # scores that a section of `evaluate` makes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search does, checked as far as its config tells. rungs: numbers of samples, rising."""

    run: RunConfig
    search: SearchConfig
    metric: str
    arms: tuple[Arm, ...]
    rungs: tuple[int, ...]
    sample_seed: int
    heldout_seed: int

    @property
    def is_lower_better(self) -> bool:
        return is_lower_better(self.metric)

    def trial_run(self, sampler: SamplerConfig, num_samples: int) -> RunConfig:
        """The run that scores a sampler by the metric alone, with the first samples of the search."""
        made = replace(
            self.run.generate,
            sampler=sampler,
            num_samples=num_samples,
            replicates=1,
            seed=self.sample_seed,
            shard_size=min(self.run.generate.shard_size, self.rungs[0]),
        )
        internal = METRICS[self.metric]
        scored = replace(
            self.run.evaluate,
            metrics=("frechet_distance",) if internal is None else (internal,),
            judge=self.run.evaluate.judge if self.metric == "class_agreement" else None,
            clip_score=self.run.evaluate.clip_score if self.metric == "clip_score" else None,
            num_samples=None,
        )
        return replace(self._alone, generate=made, evaluate=scored)

    def heldout_run(self, sampler: SamplerConfig) -> RunConfig:
        """The run that judges a sampler, by all metrics of the config."""
        made = replace(
            self.run.generate,
            sampler=sampler,
            num_samples=self.rungs[-1],
            replicates=self.search.heldout_replicates,
            seed=self.heldout_seed,
        )
        return replace(self._alone, generate=made, evaluate=replace(self.run.evaluate, num_samples=None))

    @property
    def _alone(self) -> RunConfig:
        """The run's own model, without stages that no score needs."""
        return replace(self.run, targets=("evaluate",), variants={}, protocols={}, memorization=None, reconstruction=None)


def plan(run: RunConfig) -> Plan:
    """Raises ConfigError for a search that cannot work, without looking at the store."""
    if run.search is None:
        raise ConfigError(
            "the config has no section `search`; `enat config search` lists its keys, and configs/digits-search.yaml is one"
        )
    search = run.search
    try:
        metric = _metric(run, search)
        rungs = rung_sizes(search.num_samples or run.generate.num_samples, search.num_rungs, search.reduction)
        arms = arms_of(search.space, run.generate.sampler)
        if wrong := [arm for arm in arms if not arm.ranges]:
            raise ValueError(f"space leaves nothing to search at {wrong[0].num_steps} steps; give at least one range")
        sample_seed = _first(search.sample_seed, run.generate.seed, run.seed)
        heldout_seed = _first(search.heldout_seed, sample_seed + 1)
        if sample_seed == heldout_seed:
            raise ValueError(f"heldout_seed is {heldout_seed}, as is sample_seed; held-out samples need a seed of their own")
        found = Plan(
            run=run,
            search=search,
            metric=metric,
            arms=tuple(arms),
            rungs=tuple(rungs),
            sample_seed=sample_seed,
            heldout_seed=heldout_seed,
        )
        first = found.trial_run(run.generate.sampler, rungs[0])
        evaluate.check_metrics(first.evaluate, run.reference.extractor, rungs[0], run.reference.num_kept)
    except ValueError as error:
        raise ConfigError(configuration.with_key("search", SearchConfig, str(error))) from error
    return found


def _metric(run: RunConfig, search: SearchConfig) -> str:
    extractor = run.reference.extractor
    metric = search.metric or published_name("frechet_distance", extractor)
    if (section := _SIDES.get(metric)) is not None and getattr(run.evaluate, section) is None:
        raise ValueError(f"metric is {metric}, which needs evaluate.{section}; set it, or choose another metric")
    internal = METRICS[metric]
    if internal is not None and (internal.endswith("_distance")) and (known := published_name(internal, extractor)) != metric:
        raise ValueError(f"metric is {metric}, which features of {extractor} do not give; give {known}")
    return metric


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def search(
    run: RunConfig, source: str, console: Console, num_jobs: int | None = None, *, overrides: Sequence[str] = ()
) -> tuple[Outcome, float]:
    """Search the sampler that a config asks for. source, num_jobs, overrides: as for runner.run.

    Returns what was found, and the seconds that it took. Raises ValueError, before anything is computed, for a config that cannot
    work and a model that is not there.
    """
    started, planned = time.monotonic(), plan(run)
    store = open_store(run.store_uri, run.s3)
    store.check_writable()
    with console.status("reading the dataset and the store"):
        nodes = graph.build(planned.trial_run(run.generate.sampler, planned.rungs[0]))
        known = {each.node.id: each.manifest for each in driver.plan(nodes, store)}
        budget = _Budget.of(planned, known, store)
    path = Path(run.workspace) / "search" / f"{run.name}.db"
    log = Path(run.workspace) / "logs" / f"{run.name}-search-{datetime.now():%Y%m%d-%H%M%S}.log"
    with held(path):
        runner.log_to(log)
        with kept_log.keeping(store, log, console) as kept:
            jobs = num_jobs or runner.default_jobs(run.cluster)
            work = _Search(planned, budget, store, console, source=source, overrides=overrides, num_jobs=jobs)
            outcome = work.run(path, nodes)
            kept.run = outcome.tracked
    return outcome, time.monotonic() - started


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """What samplers of a model may cost, as a search limits it."""

    search: SearchConfig
    model: ENATConfig
    tokenizer: VQGANConfig
    num_given: int

    @classmethod
    def of(cls, plan: Plan, known: Mapping[str, Manifest | None], store: ArtifactStore) -> _Budget:
        """known: manifests by the ids of nodes, None for those that do not exist.

        Raises ValueError if the model does not exist, and if no sampler meets the budget.
        """
        if (trained := known.get("train")) is None:
            raise ValueError(
                f"the model of this config is not in {store.uri}, and a search does not train; make it with `enat run CONFIG "
                "targets=[train]`, or fix store"
            )
        tokenizer = store.read_input(trained, "tokenizer") or known.get("tokenizer")
        if tokenizer is None:
            raise ValueError(f"the tokenizer of train/{trained.key[:12]} is not in {store.uri}; make it with `enat run CONFIG`")
        model = ModelSummary.read(trained).model
        ratio = plan.run.generate.mask_ratio
        given = 0 if ratio is None else model.num_tokens - num_masked_of(ratio, model.num_tokens)
        found = cls(search=plan.search, model=model, tokenizer=TokenizerSummary.read(tokenizer).config, num_given=given)
        for arm in plan.arms:
            arm.base.check_model(model)
        found._check(plan)
        return found

    def gmacs(self, sampler: SamplerConfig) -> float:
        return generation_cost(self.model, sampler, self.tokenizer, num_given=self.num_given).total_macs / 1e9

    def is_met(self, sampler: SamplerConfig) -> bool:
        return self.search.max_gmacs is None or self.gmacs(sampler) <= self.search.max_gmacs

    def is_met_by(self, result: Result) -> bool:
        most = self.search.max_gmacs, self.search.max_seconds
        return all(limit is None or cost <= limit for limit, cost in zip(most, (result.gmacs, result.seconds), strict=True))

    def _check(self, plan: Plan) -> None:
        """Of each arm some samplers are drawn, and the one with the smallest numbers, whose guidance is the lowest."""
        import numpy as np

        if self.search.max_gmacs is None:
            return
        for arm in plan.arms:
            rng, ranges = np.random.default_rng(0), arm.ranges
            drawn = [{name: each.low for name, each in ranges.items()}, arm.nearest(arm.base)]
            for _ in range(_DRAWN):
                numbers = {name: each.clipped(rng.uniform(each.low, each.high)) for name, each in ranges.items()}
                lowest = {name: each.low for name, each in ranges.items() if name.startswith("guidance")}
                drawn += [{**numbers, **lowest}]
            cheapest = min(self.gmacs(arm.sampler(numbers)) for numbers in drawn)
            if cheapest > self.search.max_gmacs:
                raise ValueError(
                    f"search.max_gmacs is {self.search.max_gmacs:g}, but samplers of {arm.num_steps} steps take at least "
                    f"{cheapest:.4g} GMACs an image; give a larger budget, or fewer steps in search.space.num_steps"
                )


def _logged_only(node: Node) -> Node:
    """A search does not record scores with the registered model: that of a run's own sampler is there, or is still to come."""
    if node.stage.name != evaluate.STAGE.name:
        return node
    return replace(node, stage=replace(node.stage, publish=evaluation_protocol.log_evaluation))


class _Search:
    """One call of `enat search`, once its config and its model are known to work."""

    def __init__(
        self,
        plan: Plan,
        budget: _Budget,
        store: ArtifactStore,
        console: Console,
        *,
        source: str,
        overrides: Sequence[str],
        num_jobs: int | None,
    ) -> None:
        self.plan, self.budget, self.store, self.console = plan, budget, store, console
        self.source, self.overrides, self.num_jobs = source, overrides, num_jobs
        self.uri = runner.tracking_uri(plan.run)
        self.connect = runner.Connector(plan.run, console)
        self.made: dict[str, Manifest] = {}
        self._scored: dict[tuple[str, int], Evaluated] = {}

    def run(self, path: Path, nodes: Sequence[Node]) -> Outcome:
        run = self.plan.run
        tracking.prepare(self.uri, run.tracking)
        with tracked.start_search(run, self.uri, self.source, self.overrides, "trials") as parent:
            runner.pin_code(parent)
            self._make_inputs(nodes, parent)
            identity = self._identity()
            self.study = Study(
                path, self.plan.arms, identity, seed=self.plan.search.seed, is_lower_better=self.plan.is_lower_better
            )
            self._run_trials(parent)
            parent.finish()
        winners = self._winners()
        with tracked.start_search(run, self.uri, self.source, self.overrides, None, beside=parent) as judging:
            judged = self._judge(winners, judging)
            outcome = self._outcome(judged, judging)
            page.write(outcome, Path(run.workspace), self.store)
            for file in outcome.files.values():
                judging.log_file(Path(file))
            judging.finish()
        return outcome

    # Trials --------------------------------------------------------------------------------------------------------------------

    def _make_inputs(self, nodes: Sequence[Node], parent: RunHandle) -> None:
        """What all trials read: mostly it exists already."""
        before = [node for node in nodes if node.stage.name not in _OF_SAMPLES]
        done = self._execute(before, parent, ModelRuns(parent, lambda name: parent, (), before), is_quiet=False)
        by_id = {each.node.id: each.manifest for each in done}
        for node in nodes:
            if node.stage.name in _OF_SAMPLES:
                self.made |= {name: by_id[id] for name, id in node.inputs.items() if id in by_id}

    def _identity(self) -> dict[str, Any]:
        """What scores and proposals depend on: a search with any of it changed is another one."""
        search = {name: value for name, value in asdict(self.plan.search).items() if name not in _NOT_IN_IDENTITY}
        first = self.plan.trial_run(self.plan.run.generate.sampler, self.plan.rungs[-1])
        versions = {stage.name: stage.version for stage in (generate.STAGE, evaluate.STAGE)}
        configs = {name: configuration.identity(graph.section(graph.stages()[name], first)) for name in _OF_SAMPLES}
        inputs = {name: manifest.digest for name, manifest in sorted(self.made.items())}
        return {"search": search, "stages": configs, "versions": versions, "inputs": inputs}

    def _run_trials(self, parent: RunHandle) -> None:
        total = self.plan.search.num_trials
        with self._stopping(), Bar(self.console, "search", total, "trials") as bar:
            while batch := self._next_batch():
                bar.update(sum(trial.is_done for trial in self.study.trials), self._best_in_words())
                self._score(batch, parent, bar)
                self.console.print(self._progress(), highlight=False, soft_wrap=True)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if self.study.trials:
                self.console.print(f"stopped: {self._progress()}", highlight=False, soft_wrap=True)
            raise

    def _next_batch(self) -> list[Trial]:
        """The batch that is not done, or a new one. Empty if there are enough trials."""
        trials, search = self.study.trials, self.plan.search
        last = trials[-1].batch if trials else 0
        batch = [trial for trial in trials if trial.batch == last]
        given = self._given() if last == 0 else []
        size = max(search.batch_size, len(given))
        if len(batch) >= size and all(trial.is_done for trial in batch):
            last, batch, given, size = last + 1, [], [], search.batch_size
        for arm, name, sampler in given:
            if not any(trial.given == name and trial.arm == arm for trial in batch):
                batch.append(self.study.give(arm, name, sampler, last))
        while len(batch) < size and len(self.study.trials) < search.num_trials:
            arm = min(self.plan.arms, key=lambda each: sum(trial.arm == each for trial in self.study.trials))
            batch.append(self.study.propose(arm, last, self.budget.is_met))
        return batch if any(not trial.is_done for trial in batch) else []

    def _given(self) -> list[tuple[Arm, str, SamplerConfig]]:
        """The hand-set sampler first, at every number of steps, then presets that are in the space and in the budget."""
        found = [(arm, HAND_SET, arm.base) for arm in self.plan.arms]
        if self.plan.search.presets:
            base = self.plan.run.generate.sampler
            named = {name: replace(sampler, reuse=base.reuse) for name, sampler in presets().items()}
            found += [
                (arm, name, sampler)
                for arm in self.plan.arms
                for name, sampler in named.items()
                if arm.holds(sampler) and self.budget.is_met(sampler)
            ]
        return found

    def _score(self, batch: Sequence[Trial], parent: RunHandle, bar: Bar) -> None:
        """Score a batch rung by rung, and tell Optuna."""
        rungs, candidates = self.plan.rungs, [*batch]
        for size, following in zip(rungs, (*rungs[1:], None), strict=True):
            self._evaluate([trial for trial in candidates if size not in trial.results], size, parent)
            if following is None:
                break
            candidates = self._passed_on(candidates, size, batch[0].batch)
        for trial in batch:
            if (last := trial.last) is not None and trial.given is None and not self.budget.is_met_by(last):
                self.study.refuse(trial)
            self.study.finish(trial, rungs[-1])
        bar.update(sum(trial.is_done for trial in self.study.trials), self._best_in_words())
        if batch[0].batch == 0 and self.plan.search.max_seconds is not None and not self._eligible(rungs[0]):
            slow = [trial.last.seconds for trial in batch if trial.last is not None]
            raise ValueError(
                f"search.max_seconds is {self.plan.search.max_seconds:g}, but the fastest of the first {len(batch)} samplers took "
                f"{min(slow):.3g} s an image; give a larger budget, or fewer steps"
            )

    def _passed_on(self, candidates: Sequence[Trial], size: int, batch: int) -> list[Trial]:
        """The trials of a rung that are worth more samples, among those of equal numbers of steps: more steps mostly score better.
        The hand-set sampler always is: everything is compared with it."""
        passed: list[Trial] = []
        for num_steps in dict.fromkeys(arm.num_steps for arm in self.plan.arms):
            so_far = [trial for trial in self.study.trials if trial.batch <= batch and trial.arm.num_steps == num_steps]
            found = {trial: trial.results[size] for trial in so_far if size in trial.results}
            passed += passed_on(
                {trial: result.score for trial, result in found.items() if self.budget.is_met_by(result)},
                candidates,
                reduction=self.plan.search.reduction,
                is_lower_better=self.plan.is_lower_better,
                is_worse=lambda first, second: self._is_better(second, first, size),
            )
        return [*passed, *(trial for trial in candidates if trial.given == HAND_SET and trial not in passed)]

    def _evaluate(self, trials: Sequence[Trial], size: int, parent: RunHandle) -> None:
        """Score trials with the first samples. Every score is stored as soon as it is known."""
        by_label = {f"{trial.name}-{size}": trial for trial in trials}

        def record(node: Node, made: Manifest) -> None:
            if node.stage.name == evaluate.STAGE.name:
                self.study.record(by_label[node.id.partition("@")[2]], self._result(made, size))

        def start(label: str) -> RunHandle:
            trial = by_label[label]
            title = f"{trial.given or trial.name}, {size:,} samples"
            return tracked.start_trial(self.plan.run, parent, title, label, trial.sampler, kind=tracked.TRIAL_KIND)

        runs = {label: self.plan.trial_run(trial.sampler, size) for label, trial in by_label.items()}
        if not runs:
            return
        nodes, given = graph.build_samples(runs, self.made)
        given |= {f"fewer-{label}": samples for label, trial in by_label.items() if (samples := self._fewer(trial)) is not None}
        self._execute(nodes, parent, ModelRuns(parent, start, runs, nodes), given=given, check=record)
        for label, trial in by_label.items():  # the same sampler twice is one node
            if size not in trial.results:
                same = next(each for each in by_label.values() if size in each.results and each.sampler == trial.sampler)
                self.study.record(trial, same.results[size])
                _log.info("%s is the sampler of %s", label, same.name)

    def _fewer(self, trial: Trial) -> Manifest | None:
        """The samples of an earlier rung, which stage generate takes over."""
        made = self.store.read_manifest(evaluate.STAGE.name, trial.last.evaluation) if trial.last is not None else None
        return None if made is None else self.store.read_input(made, "samples")

    def _result(self, made: Manifest, size: int) -> Result:
        return Result(
            num_samples=size,
            score=made.metrics[self.plan.metric],
            error=made.metrics.get(f"{self.plan.metric}_se"),
            gmacs=made.metrics["gmacs_total"],
            seconds=made.metrics["worker_seconds_per_image"],
            evaluation=made.key,
        )

    def _execute(
        self,
        nodes: Sequence[Node],
        parent: RunHandle,
        models: ModelRuns,
        *,
        given: Mapping[str, Manifest] | None = None,
        check: Callable[[Node, Manifest], None] | None = None,
        is_quiet: bool = True,
    ) -> list[FinishedStage]:
        console = Console(quiet=True) if is_quiet else self.console
        session: Session = replace(runner.open_session(self.plan.run, self.store, parent, console, self.connect), models=models)
        with models.failing():
            checked = check or partial(runner.check_made, self.plan.run)
            return driver.execute([*map(_logged_only, nodes)], session, given, checked, self.num_jobs)

    # What is best ----------------------------------------------------------------------------------------------------------------

    def _eligible(self, size: int) -> list[Trial]:
        """Trials with a score of so many samples, within the budget, the best first."""
        found = [trial for trial in self.study.trials if size in trial.results and self.budget.is_met_by(trial.results[size])]
        return sorted(found, key=lambda trial: self._rank(trial.results[size].score))

    def _rank(self, score: float) -> float:
        return score if self.plan.is_lower_better else -score

    def _is_better(self, first: Trial, second: Trial, size: int) -> bool:
        """By more than the 95% interval of the difference, in pairs."""
        gain = self._rank(second.results[size].score) - self._rank(first.results[size].score)
        return gain > 0 and gain > (
            margin_of_difference(self._read(first, size), self._read(second, size), self.plan.metric) or 0.0
        )

    def _read(self, trial: Trial, size: int) -> Evaluated:
        key = (trial.results[size].evaluation, size)
        if key not in self._scored:
            made = self.store.read_manifest(evaluate.STAGE.name, key[0])
            if made is None:  # removed meanwhile: only the score is known
                result = trial.results[size]
                error = {} if result.error is None else {f"{self.plan.metric}_se": result.error}
                return Evaluated({self.plan.metric: result.score, **error})
            self._scored[key] = evaluated(self.store, made)
        return self._scored[key]

    def _best_in_words(self) -> str:
        for size in reversed(self.plan.rungs):
            if eligible := self._eligible(size):
                best = eligible[0]
                return f"best {summary.score_text(best.results[size])} ({best.given or best.name}, {size:,} samples)"
        return ""

    def _progress(self) -> str:
        trials, full = self.study.trials, self.plan.rungs[-1]
        done = sum(trial.is_done for trial in trials)
        num_full = sum(full in trial.results for trial in trials)
        return (
            f"{done} of {self.plan.search.num_trials} trials, {num_full} with all {full:,} samples; {self.plan.metric} "
            f"{self._best_in_words() or 'not known yet'}"
        )

    # Judging -------------------------------------------------------------------------------------------------------------------

    def _winners(self) -> dict[str, Trial]:
        """The best trial, the best one of each number of steps, and those on the fronts over MACs and over seconds whose
        differences are larger than their errors, by name."""
        full = self.plan.rungs[-1]
        eligible = self._eligible(full)
        if not eligible:
            raise ValueError("no sampler within the budget was scored with all samples; give a larger budget, or more trials")
        found = {BEST: eligible[0]}
        for trial in eligible:
            if all(trial.arm.num_steps != other.arm.num_steps for other in found.values()):
                found[f"{BEST}-{trial.arm.num_steps}"] = trial
        for cost in ("gmacs", "seconds"):
            front = distinct(self.front(cost), lambda a, b: self._is_better(a, b, full), self.plan.search.max_winners)
            for trial in front:
                if trial not in found.values():
                    found[f"front-{len(found)}"] = trial
        return dict([*found.items()][: self.plan.search.max_winners])

    def front(self, cost: str) -> list[Trial]:
        full = self.plan.rungs[-1]
        eligible = self._eligible(full)
        costs = {trial: getattr(trial.results[full], cost) for trial in eligible}
        scores = {trial: trial.results[full].score for trial in eligible}
        return pareto_front(costs, scores, is_lower_better=self.plan.is_lower_better)

    def _judge(self, winners: Mapping[str, Trial], parent: RunHandle) -> list[Judged]:
        """Score the hand-set sampler and the winners with held-out seeds."""
        named: dict[str, tuple[SamplerConfig, Trial | None]] = {HAND_SET: (self.plan.run.generate.sampler, self._hand_set())}
        named |= {name: (trial.sampler, trial) for name, trial in winners.items()}
        runs = {name: self.plan.heldout_run(sampler) for name, (sampler, _) in named.items()}
        nodes, given = graph.build_samples(runs, self.made)

        def start(name: str) -> RunHandle:
            return tracked.start_trial(self.plan.run, parent, name, name, named[name][0], kind=MODEL_KIND)

        with self.console.status("scoring the winners with held-out seeds"):
            done = self._execute(nodes, parent, ModelRuns(parent, start, runs, nodes), given=given)
        made = {each.node.id.partition("@")[2]: each.manifest for each in done if each.node.stage.name == evaluate.STAGE.name}
        judged = []
        for name, (sampler, of) in named.items():  # the same sampler twice is one node
            manifest = made.get(name) or next(made[each] for each, (same, _) in named.items() if each in made and same == sampler)
            scores = evaluated(self.store, manifest)
            judged.append(Judged(name=name, sampler=sampler, trial=of, evaluation=manifest, held_out=scores))
        return judged

    def _hand_set(self) -> Trial | None:
        """The trial of the sampler of the config, if its number of steps is in the space."""
        own = self.plan.run.generate.sampler
        return next((trial for trial in self.study.trials if trial.given == HAND_SET and trial.sampler == own), None)

    def _outcome(self, judged: Sequence[Judged], run: RunHandle) -> Outcome:
        full, place = self.plan.rungs[-1], Path(self.plan.run.workspace) / self.plan.run.name
        searched = {
            each.name: self._read(each.trial, full) for each in judged if each.trial is not None and full in each.trial.results
        }
        return Outcome(
            name=self.plan.run.name,
            metric=self.plan.metric,
            rungs=self.plan.rungs,
            search=self.plan.search,
            trials=tuple(self.study.trials),
            judged=tuple(judged),
            searched=searched,
            fronts={cost: tuple(self.front(cost)) for cost in ("gmacs", "seconds")},
            seeds=(self.plan.sample_seed, self.plan.heldout_seed),
            model=f"train/{self.made['model'].key}",
            store=self.store.uri,
            tracked=run,
            files={
                **{each.name: f"{place}.{_FILE.get(each.name, each.name)}.yaml" for each in judged if each.name != HAND_SET},
                "report": f"{place}.html",
            },
        )
