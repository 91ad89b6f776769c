"""Speed of a training step, the overhead of Ray and DeepSpeed, waiting times and memory: ratios within one run.

    make bench                                        all benchmarks (about 35 minutes on two cores; this one 17)
    .venv/bin/python tests/benchmarks/training.py     alone; on a GPU: ENAT-L in bfloat16, groups of 128, also compiled
    .venv/bin/python tests/benchmarks/training.py --num-steps 2       faster, less accurate

Each run is a separate process. The compared loops are in training_loops.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import in_process, run_script, show, where
from rich.console import Console

_TURNS = 3


@dataclass(frozen=True)
class Machine:
    """Settings of all runs of a benchmark. A worker has a GPU if the machine has one, else CPUs.

    scaling_group_size: of runs with several workers, whose communication in a step does not grow with it.
    """

    preset: str
    device: str
    precision: str
    num_gpus: int
    group_size: int
    scaling_group_size: int

    @classmethod
    def here(cls, preset: str | None = None) -> Machine:
        if torch.cuda.is_available():
            return cls(preset or "enat-l", "cuda", "bf16", torch.cuda.device_count(), 128, 128)  # as published
        return cls(preset or "enat-s", "cpu", "fp32", 0, 4, 16)

    def lacks(self, num_workers: int) -> str | None:
        """Why this number of workers cannot be measured, or None."""
        if self.device == "cpu" or num_workers <= self.num_gpus:
            return None
        return f"not measured: {num_workers} workers need a GPU each, and there are {self.num_gpus}"

    def recipe(self, num_steps: int, group_size: int | None = None, **execution: Any) -> dict[str, Any]:
        """Two groups per step. num_steps steps warm up, and as many are timed."""
        return {
            "model": {"preset": self.preset},
            "precision": self.precision,
            "num_steps": 2 * num_steps,
            "batch_size": 2 * (group_size or self.group_size),
            "num_groups": 2,
            "warmup_steps": 2,
            "seed": 0,
            "execution": {
                "log_every": num_steps,
                "checkpoint_every": 10_000,
                "gpus_per_worker": float(self.device == "cuda"),
                **execution,
            },
        }


@click.command()
@click.option("--num-steps", default=6, help="Timed steps of each run.")
@click.option("--preset", help="Size of the model. Default: enat-l on a GPU and enat-s on CPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(num_steps: int, preset: str | None, as_json: bool) -> None:
    machine = Machine.here(preset)
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        place = Path(folder)
        os.environ["ENAT_CACHE"] = str(place / "cache")
        figures = {
            **where(),
            "device": f"{machine.num_gpus} x {torch.cuda.get_device_name()}" if machine.num_gpus else "cpu",
            "precision": machine.precision,
            "model": machine.preset,
            **in_process(__file__, "loops", place, asdict(machine), num_steps),
            **overhead(place, machine, num_steps),
            **memory(place, machine),
            **scaling(place, machine, num_steps),
        }
    show("training", figures, as_json)


def loops(_: Path, on: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Seconds of a straightforward step relative to ours; on a GPU also compiled, with the share of the peak of matrix products."""
    import training_loops

    from enat.execution.peak import matmul_peak

    machine = Machine(**on)
    is_gpu = machine.device == "cuda"
    if not is_gpu:
        torch.set_num_threads(os.cpu_count() or 1)
    peak = matmul_peak(torch.device(machine.device), training_loops.DTYPES[machine.precision]) / 1e12
    measured = training_loops.compare(
        machine.preset,
        group_size=machine.group_size,
        device=machine.device,
        precision=machine.precision,
        num_steps=num_steps + num_steps % 2,  # fresh and reusing steps alternate
        compiled=is_gpu,
    )
    shares = {name.replace("tflops", "share_of_matmul_peak"): value / peak for name, value in measured.items() if "tflops" in name}
    return {"matmul_tflops": peak, **measured, **shares}


def overhead(place: Path, machine: Machine, num_steps: int, turns: int = _TURNS) -> dict[str, float]:
    """Seconds of a step in the pipeline relative to the bare loop on the same groups, and waiting times.

    With all cores, and on CPUs also with one core left to Ray's own processes, as on GPU nodes and nodes that reserve a core.
    """
    cores = os.cpu_count() or 1
    figures = _overhead(place / "all", machine, num_steps, turns, cores)
    if machine.device == "cpu" and cores > 1:
        spared = _overhead(place / "spared", machine, num_steps, turns, cores - 1)
        figures |= {f"{name}_with_a_core_left": value for name, value in spared.items() if name != "data_wait_share"}
    return figures


def _overhead(place: Path, machine: Machine, num_steps: int, turns: int, cores: int) -> dict[str, float]:
    """The two alternate and the fastest run of each counts: other load only ever makes a run slower."""
    recipe = machine.recipe(num_steps, num_workers=1, cpus_per_worker=cores)
    bare, trained = [], []
    for turn in range(turns):
        bare.append(in_process(__file__, "bare", place / f"bare-{turn}", recipe))
        trained.append(in_process(__file__, "pipeline", place / f"overhead-{turn}", recipe))
    fastest = min(trained, key=lambda figures: figures["step_seconds"])
    return {
        "pipeline_seconds_per_step": fastest["step_seconds"],
        "bare_seconds_per_step_on_the_same_groups": min(bare),
        "slowest_over_fastest_bare_run": max(bare) / min(bare),
        "pipeline_over_bare": fastest["step_seconds"] / min(bare),
        "data_wait_share": fastest["data_wait_share"],
    }


def memory(place: Path, machine: Machine) -> dict[str, Any]:
    """Peak memory of the first of two workers by ZeRO stage: of the process on CPUs, of the allocator on a GPU."""
    if (reason := machine.lacks(num_workers=2)) is not None:
        return {"memory_gb_of_a_worker_by_zero_stage": reason}
    figures: dict[str, Any] = {}
    for stage in range(4):
        recipe = machine.recipe(2, num_workers=2, cpus_per_worker=1, zero_stage=stage)
        figures[f"memory_gb_of_a_worker_at_zero_{stage}"] = in_process(__file__, "pipeline", place / f"zero-{stage}", recipe)[
            "memory_gb"
        ]
    return figures


def scaling(place: Path, machine: Machine, num_steps: int) -> dict[str, Any]:
    """Images per second of two workers relative to one, with a core or a GPU each."""
    if (reason := machine.lacks(num_workers=2)) is not None:
        return {"two_workers_over_one": reason}
    speeds = []
    for num_workers in (1, 2):
        steps, size = max(1, num_steps // 3), machine.scaling_group_size
        recipe = machine.recipe(steps, size, num_workers=num_workers, cpus_per_worker=1)
        trained = in_process(__file__, "pipeline", place / f"workers-{num_workers}", recipe)
        speeds.append(trained["images_per_second"])
    return {"one_worker_images_per_second": speeds[0], "two_workers_over_one": speeds[1] / speeds[0]}


# Runs ------------------------------------------------------------------------------------------------------------------------


def pipeline(place: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Figures of the second half of a run on Ray."""
    from pipelines.cluster import connection

    connection.prepare_environment()
    from pipelines.artifacts.open import open_store
    from pipelines.stages import train
    from pipelines.tracking.run import RunHandle
    from pipelines.workflow.stage import StageContext

    store = open_store(str(place))
    context = StageContext(
        stage="train",
        key="0" * 64,
        store=store,
        run=RunHandle("", None),
        console=Console(stderr=True, quiet=True),
        connect=lambda: connection.connect(connection.ClusterConfig(num_cpus=os.cpu_count())),
    )
    result = train.run(_config(recipe), _inputs(store), context)
    history: list[dict[str, float]] = json.loads(store.fetch_file("train", context.key, result.records[0]).read_text())
    return history[-1]


def bare(place: Path, recipe: dict[str, Any]) -> float:
    """Seconds of a step of the bare loop on the groups of the second half of a run."""
    from training_loops import BareLoop, autocast, synchronize

    from enat.training.loss import objective, token_accuracy
    from pipelines.artifacts.open import open_store
    from pipelines.data.token_map import TokenMap
    from pipelines.training.batches import draw_group
    from pipelines.training.task import initial_model

    config, store = _config(recipe), open_store(str(place))
    torch.set_num_threads(config.execution.num_threads)
    token_map, device = TokenMap.open(store, _inputs(store)["token_map"]), torch.device(config.execution.device)
    loop = BareLoop(initial_model(config.model.architecture(token_map.info), 0).to(device), config.precision)
    for step in range(config.num_steps):
        if step == config.num_steps // 2:
            synchronize(device.type)
            started = time.perf_counter()
        for group in range(config.num_groups):
            batch = draw_group(config, token_map, None, step, group).to(device)
            ((codes, condition, masked, dropout_mask),) = batch.microbatches(1, loop.ema)
            with autocast(device, config.precision):
                loss, output = objective(loop.model, loop.ema, codes, condition, masked, dropout_mask=dropout_mask)
            token_accuracy(output, codes)
            (loss / config.num_groups).backward()
        loop.update()
    synchronize(device.type)
    return (time.perf_counter() - started) / (config.num_steps // 2)


def _config(recipe: dict[str, Any]) -> Any:
    from enat import SamplerConfig
    from pipelines.training.config import ModelConfig, TrainConfig, TrainExecution

    execution = TrainExecution(**recipe["execution"])
    return TrainConfig(**{**recipe, "model": ModelConfig(**recipe["model"]), "sampler": SamplerConfig(), "execution": execution})


def _inputs(store: Any) -> dict[str, Any]:
    """A token map of random codes, 16 x 16 out of 1,024, and a tokenizer that decodes them to 16 x 16 pixels."""
    from enat.checkpoint import save_weights
    from enat.tokenizer import VQGAN, VQGANConfig
    from pipelines.artifacts.manifest import FileRecord, Manifest
    from pipelines.data.token_map import TokenMapInfo, TokenRows, write_shard

    def commit(stage: str, name: str, write: Any, summary: dict[str, Any]) -> Manifest:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / name)
            record: FileRecord = store.put_file(stage, "1" * 64, name, Path(folder) / name)
        made = Manifest(stage=stage, key="1" * 64, stage_version=1, config={}, inputs={}, files=(record,), summary=summary)
        return store.commit(made)

    tokenizer_config = VQGANConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, latent_dim=8, resolution=16)
    torch.manual_seed(0)
    tokenizer = commit(
        "tokenizer",
        "vqgan.safetensors",
        lambda path: save_weights(path, VQGAN(tokenizer_config)),
        {"config": dataclasses.asdict(tokenizer_config), "is_imported": False},
    )
    info = TokenMapInfo(
        dataset="bench", resolution=16, grid_size=16, codebook_size=1024, num_classes=1000, tokenizer_digest=tokenizer.digest
    )
    rng, count = np.random.default_rng(0), 4096
    rows = TokenRows(
        codes=rng.integers(0, 1024, (count, 256)),
        codes_flipped=rng.integers(0, 1024, (count, 256)),
        keys=[f"{row:06d}" for row in range(count)],
        labels=rng.integers(0, 1000, count).tolist(),
        source_sha256=[rng.bytes(32) for _ in range(count)],
    )
    summary = {"info": dataclasses.asdict(info), "rows": count, "class_names": []}
    token_map = commit("token_map", "part-00000.parquet", lambda path: write_shard(path, info, rows), summary)
    return {"tokenizer": tokenizer, "token_map": token_map}


if __name__ == "__main__":
    run_script(globals(), main)
