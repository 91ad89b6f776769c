"""How fast samples are made and scored end to end, over the sum of the bare parts: sampling, decoding, features, the distance.

    make bench                                          with the others
    .venv/bin/python tests/benchmarks/evaluation.py --scale 0.5      fewer images, and less sure

Stages generate and evaluate run on Ray with one worker that has all cores. Starting Ray's workers and loading weights is left out
by taking the difference between a long and a short run. Each run is a process of its own.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import in_process, run_script, show, where
from random_weights import inception_state
from rich.console import Console

_RESOLUTION = 256
_IMAGES_PER_PASS = 4
_COUNTS = (8, 32)  # images of a short and a long run
_TOKENIZER = {"resolution": _RESOLUTION, "base_channels": 32, "num_res_blocks": 1}  # the published one is 15 times as dear


@click.command()
@click.option("--scale", default=1.0, help="Of the numbers of images.")
@click.option("--preset", default="enat-s", help="Size of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(scale: float, preset: str, as_json: bool) -> None:
    short = max(_IMAGES_PER_PASS, int(_COUNTS[0] * scale))
    long = max(2 * short, int(_COUNTS[1] * scale))
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        os.environ["ENAT_CACHE"] = str(Path(folder) / "cache")
        figures = {**where(), "model": preset, "images": long - short, **ratio(Path(folder), preset, short, long)}
    show("generation and evaluation", figures, as_json)


def ratio(place: Path, preset: str, short: int, long: int) -> dict[str, float]:
    """Images a second of the stages and of the bare parts one after the other, and their ratio."""
    staged = [in_process(__file__, "stages", place / f"run-{count}", preset, count) for count in (short, long)]
    bare = in_process(__file__, "bare", place / "bare", preset, short)
    seconds = {name: (staged[1][name] - staged[0][name]) / (long - short) for name in staged[0]}
    whole = sum(seconds.values())
    return {
        **{f"{name}_seconds_per_image": value for name, value in seconds.items()},
        **{f"bare_{name}_seconds_per_image": value for name, value in bare.items()},
        "end_to_end_images_per_second": 1 / whole,
        "bare_parts_images_per_second": 1 / sum(bare.values()),
        "end_to_end_over_bare_parts": sum(bare.values()) / whole,
    }


def stages(place: Path, preset: str, count: int) -> dict[str, float]:
    """Seconds of stage generate and of stage evaluate, with Ray running already."""
    from pipelines import cluster

    cluster.prepare_environment()
    from pipelines.artifacts import LocalStore
    from pipelines.stages import evaluate, generate
    from pipelines.tracking import RunHandle
    from pipelines.workflow import Execution, StageContext

    store, cpus = LocalStore(place), os.cpu_count() or 1
    inputs = _inputs(store, preset)
    cluster.connect(cluster.ClusterConfig(num_cpus=cpus))
    execution = {"num_workers": 1, "cpus_per_worker": cpus, "batch_size": _IMAGES_PER_PASS * cpus}

    def context(stage: str) -> StageContext:
        console = Console(stderr=True, quiet=True)
        return StageContext(stage=stage, key="0" * 64, store=store, run=RunHandle("", None), console=console, connect=lambda: None)

    sampled = generate.GenerateConfig(
        num_samples=count,
        images_per_pass=_IMAGES_PER_PASS,
        seed=0,
        execution=generate.GenerateExecution(**execution),
    )
    started = time.perf_counter()
    made = generate.run(sampled, {"model": inputs["model"]}, context("generate"))
    generated = time.perf_counter() - started
    inputs["samples"] = _commit(store, "generate", made.files, made.summary, dict(made.metrics))
    scored = evaluate.EvaluateConfig(metrics=("frechet_distance",), execution=Execution(**execution))
    started = time.perf_counter()
    evaluate.run(scored, inputs, context("evaluate"))
    return {"generate": generated, "evaluate": time.perf_counter() - started}


def bare(place: Path, preset: str, count: int) -> dict[str, float]:
    """Seconds an image of plain loops over the same passes; the distance, which does not grow with images, is no part of it."""
    from enat import ENAT, VQGAN, ENATConfig, SamplerConfig, VQGANConfig, sample
    from enat.features import InceptionExtractor
    from enat.images import to_uint8

    model, vqgan = ENAT(ENATConfig.preset(preset)).eval(), VQGAN(VQGANConfig(**_TOKENIZER)).eval()
    extractor = InceptionExtractor(inception_state())
    torch.set_num_threads(os.cpu_count() or 1)
    passes = -(-count // _IMAGES_PER_PASS)
    labels = torch.arange(_IMAGES_PER_PASS)
    seconds = dict.fromkeys(("generate", "evaluate"), 0.0)
    with torch.inference_mode():
        for number in range(passes + 1):
            started = time.perf_counter()
            codes = sample(model, labels, SamplerConfig(), seeds=[number * _IMAGES_PER_PASS + i for i in range(_IMAGES_PER_PASS)])
            between = time.perf_counter()
            extractor(to_uint8(vqgan.decode(codes.view(-1, 16, 16))))
            if number:  # the first pass warms up
                seconds["generate"] += between - started
                seconds["evaluate"] += time.perf_counter() - between
    return {name: value / (passes * _IMAGES_PER_PASS) for name, value in seconds.items()}


def _inputs(store: Any, preset: str) -> dict[str, Any]:
    """A model, a tokenizer and a reference with weights that were drawn."""
    import dataclasses

    from enat import ENAT, VQGAN, ENATConfig, VQGANConfig
    from enat.checkpoint import save_weights
    from enat.features import InceptionExtractor
    from enat.metrics import FeatureMoments
    from pipelines.feature_job import FEATURES_VERSION

    def put(stage: str, name: str, write: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / name)
            return store.put_file(stage, "1" * 64, name, Path(folder) / name)

    torch.manual_seed(0)
    config, architecture = VQGANConfig(**_TOKENIZER), ENATConfig.preset(preset)
    tokenizer_file = put("tokenizer", "vqgan.safetensors", lambda path: save_weights(path, VQGAN(config)))
    tokenizer = _commit(store, "tokenizer", (tokenizer_file,), {"config": dataclasses.asdict(config)})
    model_file = put("train", "model.safetensors", lambda path: save_weights(path, ENAT(architecture)))
    trained = {"model": dataclasses.asdict(architecture), "num_steps": 0, "dataset": "bench", "parameters": 0}
    model = _commit(store, "train", (model_file,), {**trained, "tokenizer_digest": tokenizer.digest})
    extractor = InceptionExtractor(inception_state())
    moments = FeatureMoments(2048).add(np.random.default_rng(0).normal(size=(16, 2048)))
    files = (
        put("reference", "extractor.safetensors", extractor.save),
        put("reference", "moments.safetensors", moments.save),
    )
    summary = {
        "extractor": "inception",
        "extractor_digest": files[0].sha256,
        "outputs": extractor.outputs,
        "features_version": FEATURES_VERSION,
        "images_per_pass": _IMAGES_PER_PASS,
        "of": "drawn",
        "dataset": "bench",
        "resolution": _RESOLUTION,
        "num_images": 16,
        "num_kept": 0,
        "rounding": "uint8",
    }
    return {"tokenizer": tokenizer, "model": model, "reference": _commit(store, "reference", files, summary)}


def _commit(store: Any, stage: str, files: Any, summary: Any, metrics: dict[str, float] | None = None) -> Any:
    from pipelines.artifacts import Manifest

    key = "0" * 64 if stage == "generate" else "1" * 64
    made = Manifest(
        stage=stage,
        key=key,
        stage_version=1,
        config={},
        inputs={},
        files=tuple(files),
        summary=dict(summary),
        metrics=metrics or {},
    )
    return store.commit(made)


if __name__ == "__main__":
    run_script(globals(), main)
