"""The engine: DeepSpeed at every ZeRO stage updates as torch does, and its state moves between stages and world sizes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from enat.model import ENAT
from enat.training.loss import objective
from material.tiny_training import CONFIG, Material, changed, run_ranks
from pipelines.training.batches import draw_group
from pipelines.training.checkpoints import Fragments, own_share
from pipelines.training.config import TrainConfig
from pipelines.training.engine import Engine
from pipelines.training.task import initial_model

STAGES = (0, 1, 2, 3)
HALF, LAST = 5, 10


@dataclass(frozen=True)
class Job:
    """Steps first..last-1 on every rank. load: a folder of state; saves: those to be written, after some steps.
    factors: of the last rank's loss at some steps."""

    config: TrainConfig
    first: int = 0
    last: int = LAST
    load: Path | None = None
    saves: Mapping[int, Path] = field(default_factory=dict)
    factors: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Of every step: mean loss, gradient norm, loss scale, whether it was left out. weights: of rank 0, at the end."""

    losses: list[float]
    norms: list[float | None]
    scales: list[float]
    overflows: list[bool]
    weights: dict[str, torch.Tensor]
    num_updates: int
    dtypes: set[torch.dtype]


def run_jobs(material: Material, jobs: list[Job]) -> list[Report]:
    return [_run_job(material, job) for job in jobs]


def _run_job(material: Material, job: Job) -> Report:
    config, rank, world_size = job.config, dist.get_rank(), dist.get_world_size()
    teacher = initial_model(material.architecture(config), 0).eval().requires_grad_(False)
    model, fragments, state = copy.deepcopy(teacher).requires_grad_(), None, None
    if job.load is not None:
        model = ENAT(material.architecture(config))
        fragments = Fragments(tuple(sorted(job.load.glob("*.safetensors"))))
        state = json.loads((job.load / "state.json").read_text())
        fragments.fill("weight", model)
    groups = np.array_split(range(config.num_groups), world_size)[rank].tolist()
    engine = Engine(model, config, torch.device("cpu"), len(groups))
    if fragments is not None and state is not None:
        engine.load(fragments, state)
    losses, norms, scales, overflows = [], [], [], []
    for step in range(job.first, job.last):
        total = torch.zeros(1)
        for group in groups:
            batch = draw_group(config, material.token_map, None, step, group)
            ((codes, condition, masked, kept),) = batch.microbatches(1, teacher)
            loss, _ = objective(engine, teacher, codes, condition, masked, dropout_mask=kept)  # type: ignore[arg-type]
            factor = job.factors.get(step, 1.0) if rank == world_size - 1 else 1.0
            engine.backward(loss * factor, config.learning_rate_at(step))
            total += loss.detach() / config.num_groups
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(engine.gradient_norm())
        scales.append(engine.loss_scale)
        overflows.append(engine.is_overflow_of_scale())
        if step in job.saves:
            _save(job.saves[step], engine)
    dtypes = {parameter.dtype for parameter in engine.model.parameters()}
    return Report(losses, norms, scales, overflows, engine.weights(), engine.num_updates, dtypes)


def _save(folder: Path, engine: Engine) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in engine.fragments().items()}, folder / f"{engine.rank}.safetensors")
    if engine.rank == 0:
        (folder / "state.json").write_text(json.dumps(engine.counters()))
    dist.barrier()


def _stage(zero_stage: int, **fields: Any) -> TrainConfig:
    return changed(execution={"zero_stage": zero_stage}, **fields)


def _assert_same_weights(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], atol: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# State ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_state_of_two_ranks_is_resumed_by_other_ranks_at_another_stage(material, tmp_path):
    """As if there had been no interruption: losses to a relative 1e-5, weights to 1e-5.

    By one, two and four ranks, at the next and at the previous ZeRO stage, with weights that decay and others that do not, and with
    a clipped gradient.
    """
    fields = {"weight_decay_on": "matrices", "weight_decay": 0.3, "max_grad_norm": 0.2}
    pairs = [(saved, (saved + offset) % 4) for offset in (1, 3) for saved in STAGES]
    halves = [Job(_stage(stage, **fields), last=HALF, saves={HALF - 1: tmp_path / str(stage)}) for stage in STAGES]
    seconds = [Job(_stage(resumed, **fields), first=HALF, load=tmp_path / str(saved)) for saved, resumed in pairs]
    (whole,) = run_ranks(1, run_jobs, material, [Job(_stage(0, **fields))])[0]
    first = run_ranks(2, run_jobs, material, halves)[0]
    by_one = run_ranks(1, run_jobs, material, seconds)[0]
    by_two = run_ranks(2, run_jobs, material, seconds)[0]
    by_four = run_ranks(4, run_jobs, material, seconds, timeout=240)[0]
    assert min(whole.norms) > 0.2, "every step is clipped"
    assert np.abs(np.diff(whole.losses)).min() > 1e-4, "the comparison could fail"
    for world_size, reports in ((1, by_one), (2, by_two), (4, by_four)):
        for (saved, resumed), second in zip(pairs, reports, strict=True):
            case, half = f"stage {saved} to {resumed} by {world_size} ranks", first[saved]
            np.testing.assert_allclose([*half.losses, *second.losses], whole.losses, rtol=1e-5, err_msg=case)
            np.testing.assert_allclose([*half.norms, *second.norms], whole.norms, rtol=1e-3, err_msg=case)
            _assert_same_weights(second.weights, whole.weights, atol=1e-5)
            assert second.num_updates == LAST, case


def _shares_of_rank(material: Material) -> list[dict[str, int]]:
    """What this rank would write at every stage of weights, moments and EMA: names of fragments and how many values they have."""
    shares = []
    for stage in STAGES:
        model = initial_model(material.architecture(CONFIG), 0)
        ema = copy.deepcopy(model).eval()
        engine = Engine(model, _stage(stage), torch.device("cpu"), 1)
        batch = draw_group(CONFIG, material.token_map, None, 0, 0)
        ((codes, condition, masked, kept),) = batch.microbatches(1, ema)
        engine.backward(objective(engine, ema, codes, condition, masked, dropout_mask=kept)[0], 1e-3)  # type: ignore[arg-type]
        written = engine.fragments() | dict(own_share("ema", ema, engine.rank, engine.world_size))
        assert all(tensor.ndim == 1 and tensor.dtype == torch.float32 for tensor in written.values())
        shares.append({name: len(tensor) for name, tensor in written.items()})
    return shares


@pytest.mark.slow
def test_ranks_write_every_value_once_and_about_equally_many(material):
    shares = run_ranks(2, _shares_of_rank, material)
    values = {name: parameter.numel() for name, parameter in ENAT(material.architecture(CONFIG)).named_parameters()}
    for zero_stage in STAGES:
        of_ranks = [rank[zero_stage] for rank in shares]
        pieces: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for share in of_ranks:
            for name, length in share.items():
                kind, _, rest = name.partition("/")
                parameter, _, start = rest.rpartition("@")
                pieces.setdefault((kind, parameter), []).append((int(start), length))
        assert {kind for kind, _ in pieces} == {"weight", "exp_avg", "exp_avg_sq", "ema"} and len(pieces) == 4 * len(values)
        for (kind, parameter), found in pieces.items():
            end = 0
            for start, length in sorted(found):
                assert start == end, (kind, parameter)
                end += length
            assert end == values[parameter], (kind, parameter)
        totals = [sum(share.values()) for share in of_ranks]
        assert max(totals) < 0.6 * sum(totals)


# Precision -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overflowed:
    """fp16 by two ranks, of which the last one's gradient is too large at step 4. Reports of both ranks by stage, and folders of
    the state before and after that step."""

    reports: dict[int, list[Report]]
    folder: Path

    def state(self, when: str, zero_stage: int) -> tuple[Fragments, dict[str, float]]:
        folder = self.folder / when / str(zero_stage)
        return Fragments(tuple(sorted(folder.glob("*.safetensors")))), json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def overflowed(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    jobs = [
        Job(
            _stage(stage, precision="fp16"),
            last=8,
            factors={4: 1e38},
            saves={3: folder / "before" / str(stage), 4: folder / "after" / str(stage)},
        )
        for stage in (1, 2, 3)
    ]
    reports = run_ranks(2, run_jobs, material, jobs)
    return Overflowed({stage: [rank[index] for rank in reports] for index, stage in enumerate((1, 2, 3))}, folder)


@pytest.mark.slow
def test_step_that_overflows_on_one_rank_is_skipped_on_all_and_changes_nothing(overflowed, material):
    parameters = dict(ENAT(material.architecture(CONFIG)).named_parameters())
    for zero_stage in (1, 2, 3):
        for report in overflowed.reports[zero_stage]:
            assert report.overflows == [step == 4 for step in range(8)]
            assert report.scales == [2.0**16] * 4 + [2.0**15] * 4
            assert report.num_updates == 7 and report.dtypes == {torch.float32}
            assert np.isinf(report.norms[4]) and all(np.isfinite(norm) for step, norm in enumerate(report.norms) if step != 4)
            assert np.isfinite(report.losses).all() and report.losses[-1] < report.losses[0]
        (before, state_before), (after, state_after) = (overflowed.state(when, zero_stage) for when in ("before", "after"))
        for name, parameter in parameters.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                whole = (kind, name, 0, parameter.numel())
                assert torch.equal(before.read(*whole), after.read(*whole)), (kind, name)
        assert state_before == {"num_updates": 4, "loss_scale": 2.0**16, "updates_since_overflow": 4}
        assert state_after == {"num_updates": 4, "loss_scale": 2.0**15, "updates_since_overflow": 0}


@pytest.mark.slow
def test_overflows_at_any_scale_are_divergence(material):
    """At a scale of one, or after several overflows in a row. A successful step resets the count."""
    config, at_step_4 = _stage(1, precision="fp16"), {4: 1.0}
    to_one = Job(config, last=18, factors=dict.fromkeys(range(18), math.inf))
    again = Job(config, last=11, factors=dict.fromkeys(range(11), math.inf) | at_step_4)
    (reports,) = run_ranks(1, _run_one_job_and_one_that_gives_up_soon, material, [to_one, again])
    assert reports[0].scales[15:] == [1.0, 1.0, 1.0] and reports[0].overflows == [True] * 16 + [False] * 2
    assert reports[1].scales[-1] > 1 and reports[1].overflows == [True] * 4 + [False] + [True] * 4 + [False] * 2
    assert reports[1].num_updates == 1


def _run_one_job_and_one_that_gives_up_soon(material: Material, jobs: list[Job]) -> list[Report]:
    from pipelines.training import engine

    first = run_jobs(material, jobs[:1])
    engine._MAX_OVERFLOWS, engine._FIRST_LOSS_SCALE = 5, 2.0**20  # type: ignore[misc]
    return [*first, *run_jobs(material, jobs[1:])]


@pytest.mark.slow
def test_state_before_the_first_update_has_weights_and_no_moments(material, tmp_path):
    """Every step overflowed so far. A resumed run starts with these weights at the lowered scale."""
    jobs = []
    for stage in (1, 3):
        config, folder = _stage(stage, precision="fp16"), tmp_path / str(stage)
        jobs.append(Job(config, last=2, factors=dict.fromkeys(range(2), math.inf), saves={1: folder}))
        jobs.append(Job(config, first=2, last=4, load=folder))
    for stage, resumed in zip((1, 3), run_ranks(1, run_jobs, material, jobs)[0][1::2], strict=True):
        assert Fragments(tuple((tmp_path / str(stage)).glob("*.safetensors"))).kinds() == {"weight"}
        assert resumed.num_updates == 2 and resumed.scales == [2.0**14] * 2


def test_scale_doubles_after_long_without_overflow_also_in_a_resumed_run(material, tmp_path):
    config = _stage(1, precision="fp16")
    jobs = [Job(config, last=7), Job(config, last=5, saves={4: tmp_path}), Job(config, first=5, last=7, load=tmp_path)]
    whole, _, resumed = run_ranks(1, _run_jobs_that_double_soon, material, jobs)[0]
    assert whole.scales == [2.0**16, 2.0**16, 2.0**17, 2.0**17, 2.0**17, 2.0**18, 2.0**18]
    assert resumed.scales == [2.0**18, 2.0**18]


@pytest.mark.slow
def test_stage_0_measures_the_gradient_where_it_is_asked_to(material):
    """And where it clips: the norm is what it clips by."""
    jobs = [Job(_stage(0), last=1), Job(_stage(0, max_grad_norm=0.1), last=1)]
    unmeasured, clipping = run_ranks(1, _run_jobs_without_norms, material, jobs)[0]
    (measured,) = run_ranks(1, run_jobs, material, jobs[:1])[0]
    assert unmeasured.norms == [None] and clipping.norms == measured.norms and measured.norms[0] > 0


def _run_jobs_without_norms(material: Material, jobs: list[Job]) -> list[Report]:
    class Unasked(Engine):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.measures_norm = False

    globals()["Engine"] = Unasked
    return run_jobs(material, jobs)


def _run_jobs_that_double_soon(material: Material, jobs: list[Job]) -> list[Report]:
    from pipelines.training import engine

    engine._STEPS_TO_DOUBLE = 3  # type: ignore[attr-defined]
    return run_jobs(material, jobs)


# The update ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weight_decay_on_matrices_decays_exactly_linear_weights(material):
    """Two steps whose loss is multiplied by zero: only weight decay changes weights."""
    fields = {"weight_decay_on": "matrices", "weight_decay": 0.5, "learning_rate": 0.1, "warmup_steps": 0}
    jobs = [Job(_stage(stage, **fields), last=2, factors=dict.fromkeys(range(2), 0.0)) for stage in STAGES]
    initial = initial_model(material.architecture(CONFIG), 0)
    linear = {f"{name}.weight" for name, module in initial.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) > 10
    for report in run_ranks(1, run_jobs, material, jobs)[0]:
        for name, value in initial.named_parameters():
            expected = value.detach() * (1 - 0.1 * 0.5) ** 2 if name in linear else value.detach()
            torch.testing.assert_close(
                report.weights[name], expected, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert report.norms == [0.0, 0.0]


_REDUCTIONS = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")]  # ZeRO stage, number format


@pytest.mark.slow
def test_gradients_summed_in_bf16_train_nearly_the_same(material):
    """On two ranks, at the stages that GPUs use. Some bits differ, or the setting does nothing."""
    jobs = [Job(changed(execution={"zero_stage": stage, "reduce_in": each})) for stage, each in _REDUCTIONS]
    wanted, *found = run_ranks(2, run_jobs, material, jobs)[0]
    for report in found:
        np.testing.assert_allclose(report.losses, wanted.losses, rtol=0.01)
        assert any(not torch.equal(report.weights[name], value) for name, value in wanted.weights.items())
