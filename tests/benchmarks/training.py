"""How fast a step of training is, what Ray and DeepSpeed add to it, what it waits for, and what it takes: ratios within one run.

    make bench                                        with tokenization (about 20 minutes on two cores)
    .venv/bin/python tests/benchmarks/training.py --num-steps 2       quicker, and less sure

Each run is a process of its own. The loops that the pipeline is compared with are in training_loops.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import in_process, run_script, show, where
from rich.console import Console

_GROUP_SIZE = 4
_TURNS = 3
_GROUP_SIZE_OF_SCALING = 16  # what workers exchange in a step does not grow with it; the published groups have 128


@click.command()
@click.option("--num-steps", default=6, help="Steps that are timed of each run.")
@click.option("--preset", default="enat-s", help="Size of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(num_steps: int, preset: str, as_json: bool) -> None:
    device, precision = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        place = Path(folder)
        os.environ["ENAT_CACHE"] = str(place / "cache")
        loops = in_process(__file__, "loops", place, preset, device, precision, num_steps)
        figures = {
            **where(),
            "device": device,
            "precision": precision,
            "model": preset,
            **loops,
            **overhead(place, preset, num_steps),
        }
        figures |= memory(place, preset) | scaling(place, preset, num_steps)
    show("training", figures, as_json)


def loops(_: Path, preset: str, device: str, precision: str, num_steps: int) -> dict[str, Any]:
    """A step of the obvious loop over one of ours; on a GPU compiled, too, with the share of the measured matrix products."""
    import training_loops

    from pipelines.train_metrics import matmul_peak

    is_gpu = device == "cuda"
    if not is_gpu:
        torch.set_num_threads(os.cpu_count() or 1)
    peak = matmul_peak(torch.device(device), training_loops.DTYPES[precision]) / 1e12
    measured = training_loops.compare(
        preset,
        group_size=128 if is_gpu else _GROUP_SIZE,
        device=device,
        precision=precision,
        num_steps=num_steps + num_steps % 2,  # fresh and reusing steps alternate
        compiled=is_gpu,
    )
    shares = {name.replace("tflops", "share_of_matmul_peak"): value / peak for name, value in measured.items() if "tflops" in name}
    return {"matmul_tflops": peak, **measured, **shares}


def overhead(place: Path, preset: str, num_steps: int, turns: int = _TURNS) -> dict[str, float]:
    """Seconds of a step in the pipeline over those of the bare loop on the same groups, all cores each; what it waited for.

    The two take turns, and the fastest run of each counts: what else a shared machine does only ever makes a run slower.
    """
    recipe = _recipe(preset, num_steps, num_workers=1, cpus_per_worker=os.cpu_count() or 1)
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


def memory(place: Path, preset: str) -> dict[str, float]:
    """Most memory of the first of two workers, by ZeRO stage."""
    figures = {}
    for stage in range(4):
        recipe = _recipe(preset, 2, num_workers=2, cpus_per_worker=1, zero_stage=stage)
        figures[f"memory_gb_of_a_worker_at_zero_{stage}"] = in_process(__file__, "pipeline", place / f"zero-{stage}", recipe)[
            "memory_gb"
        ]
    return figures


def scaling(place: Path, preset: str, num_steps: int) -> dict[str, float]:
    """Images a second of two workers over one, a core each."""
    speeds = []
    for num_workers in (1, 2):
        recipe = _recipe(preset, max(1, num_steps // 3), _GROUP_SIZE_OF_SCALING, num_workers=num_workers, cpus_per_worker=1)
        trained = in_process(__file__, "pipeline", place / f"workers-{num_workers}", recipe)
        speeds.append(trained["images_per_second"])
    return {"one_worker_images_per_second": speeds[0], "two_workers_over_one": speeds[1] / speeds[0]}


# Runs ------------------------------------------------------------------------------------------------------------------------


def _recipe(preset: str, num_steps: int, group_size: int = _GROUP_SIZE, **execution: Any) -> dict[str, Any]:
    """Two groups a step; num_steps steps are warming up, as many are timed."""
    return {
        "model": {"preset": preset},
        "num_steps": 2 * num_steps,
        "batch_size": 2 * group_size,
        "num_groups": 2,
        "warm_up_steps": 2,
        "seed": 0,
        "execution": {"log_every": num_steps, "checkpoint_every": 10_000, **execution},
    }


def pipeline(place: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Figures of the second half of a run on Ray."""
    from pipelines import cluster

    cluster.prepare_environment()
    from pipelines.artifacts import LocalStore
    from pipelines.stages import train
    from pipelines.tracking import RunHandle
    from pipelines.workflow import StageContext

    store = LocalStore(place)
    context = StageContext(
        stage="train",
        key="0" * 64,
        store=store,
        run=RunHandle("", None),
        console=Console(stderr=True, quiet=True),
        connect=lambda: cluster.connect(cluster.ClusterConfig(num_cpus=os.cpu_count())),
    )
    result = train.run(_config(recipe), _inputs(store), context)
    history: list[dict[str, float]] = json.loads(store.fetch_file("train", context.key, result.records[0]).read_text())
    return history[-1]


def bare(place: Path, recipe: dict[str, Any]) -> float:
    """Seconds of a step of the bare loop on the groups of the second half of a run."""
    from training_loops import BareLoop

    from enat.loss import objective, token_accuracy
    from pipelines.artifacts import LocalStore
    from pipelines.batches import draw_group
    from pipelines.token_map import TokenMap
    from pipelines.train_loop import initial_model

    config, store = _config(recipe), LocalStore(place)
    torch.set_num_threads(config.execution.num_threads)
    token_map = TokenMap.open(store, _inputs(store)["token_map"])
    loop = BareLoop(initial_model(config.model.architecture(token_map.info), 0), "fp32")
    for step in range(config.num_steps):
        if step == config.num_steps // 2:
            started = time.perf_counter()
        for group in range(config.num_groups):
            ((codes, condition, masked, dropout_mask),) = draw_group(config, token_map, None, step, group).parts(1, loop.ema)
            loss, output = objective(loop.model, loop.ema, codes, condition, masked, dropout_mask=dropout_mask)
            token_accuracy(output, codes)
            (loss / config.num_groups).backward()
        loop.update()
    return (time.perf_counter() - started) / (config.num_steps // 2)


def _config(recipe: dict[str, Any]) -> Any:
    from pipelines.train_config import ModelConfig, TrainConfig, TrainExecution

    execution = TrainExecution(**recipe["execution"])
    return TrainConfig(**{**recipe, "model": ModelConfig(**recipe["model"]), "execution": execution})


def _inputs(store: Any) -> dict[str, Any]:
    """A token map of random codes, 16 x 16 out of 1,024, and a tokenizer that decodes them to as many pixels."""
    from enat import VQGAN, VQGANConfig
    from enat.checkpoint import save_weights
    from pipelines.artifacts import FileRecord, Manifest
    from pipelines.token_map import TokenMapInfo, TokenRows, write_part

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
        {"config": dataclasses.asdict(tokenizer_config)},
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
    summary = {"info": dataclasses.asdict(info), "rows": count}
    token_map = commit("token_map", "part-00000.parquet", lambda path: write_part(path, info, rows), summary)
    return {"tokenizer": tokenizer, "token_map": token_map}


if __name__ == "__main__":
    run_script(globals(), main)
