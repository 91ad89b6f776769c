"""Speed of generating and scoring samples end to end, relative to the sum of its parts: sampling, decoding, features, distance.

    make bench                                          with the other benchmarks
    .venv/bin/python tests/benchmarks/evaluation.py     alone (about 5 minutes on two cores)
    .venv/bin/python tests/benchmarks/evaluation.py --scale 0.5 --num-rounds 1      fewer images, less accurate

Stages generate and evaluate run on Ray with one worker that has all cores. The difference between a long and a short run excludes
starting Ray's workers, loading weights and the distance. Rounds of bare parts, a short and a long run alternate, so a slow moment
of the machine affects all of them. The fastest of each counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import in_process, run_script, show, where
from rich.console import Console

from enat.metrics.inception import random_inception_weights

_RESOLUTION = 256
_IMAGES_PER_PASS = 4
_COUNTS = (8, 40)  # images of a short and a long run
_PARTS = ("generate", "evaluate")
_TOKENIZER = "vqgan-256"  # of the published cost


@click.command()
@click.option("--scale", default=1.0, help="Factor on the numbers of images.")
@click.option("--num-rounds", default=3, help="Runs of each part. The fastest counts.")
@click.option("--preset", default="enat-s", help="Size of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(scale: float, num_rounds: int, preset: str, as_json: bool) -> None:
    short = max(_IMAGES_PER_PASS, int(_COUNTS[0] * scale))
    long = max(2 * short, int(_COUNTS[1] * scale))
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        os.environ["ENAT_CACHE"] = str(Path(folder) / "cache")
        measured = in_process(__file__, "rounds", Path(folder), preset, short, long, num_rounds)
    figures = {**where(), "model": preset, "images": long - short, "rounds": num_rounds, **ratio(measured, short, long)}
    show("generation and evaluation", figures, as_json)


def ratio(measured: Sequence[Mapping[str, Mapping[str, float]]], short: int, long: int) -> dict[str, float]:
    """Images per second of the stages and of the bare parts in sequence, and their ratio. measured: from rounds()."""
    fastest = {kind: {part: min(each[kind][part] for each in measured) for part in _PARTS} for kind in ("short", "long", "bare")}
    staged = {part: (fastest["long"][part] - fastest["short"][part]) / (long - short) for part in _PARTS}
    if min(staged.values()) <= 0:
        raise click.ClickException("a long run took no longer than a short one: the machine is too busy to measure anything")
    whole, bare_whole = sum(staged.values()), sum(fastest["bare"].values())
    return {
        **{f"{part}_seconds_per_image": staged[part] for part in _PARTS},
        **{f"bare_{part}_seconds_per_image": fastest["bare"][part] for part in _PARTS},
        "end_to_end_images_per_second": 1 / whole,
        "bare_parts_images_per_second": 1 / bare_whole,
        "end_to_end_over_bare_parts": bare_whole / whole,
    }


def rounds(place: Path, preset: str, short: int, long: int, num_rounds: int) -> list[dict[str, dict[str, float]]]:
    """For each round: seconds of the stages in a "short" and a "long" run, and per image of "bare" loops, for all _PARTS."""
    from pipelines.cluster import connection

    connection.prepare_environment()
    from pipelines.artifacts.open import open_store

    store = open_store(str(place / "store"))
    inputs, parts = _inputs(store, preset), BareParts(preset)
    connection.connect(connection.ClusterConfig(num_cpus=os.cpu_count() or 1))
    measured = []
    for number in range(num_rounds):
        measured.append(
            {
                "bare": parts.seconds_per_image(short),
                "short": stages(store, dict(inputs), short, f"{2 * number:064d}"),
                "long": stages(store, dict(inputs), long, f"{2 * number + 1:064d}"),
            }
        )
    return measured


def stages(store: Any, inputs: dict[str, Any], count: int, key: str) -> dict[str, float]:
    """Seconds of stages generate and evaluate with Ray running. key: unused in the store."""
    from pipelines.cluster.resources import TokenizerExecution
    from pipelines.stages import evaluate, generate
    from pipelines.tracking.run import RunHandle
    from pipelines.workflow.stage import StageContext

    cpus = os.cpu_count() or 1
    execution: dict[str, Any] = {"num_workers": 1, "cpus_per_worker": cpus, "worker_batch_size": _IMAGES_PER_PASS * cpus}

    def context(stage: str) -> StageContext:
        console = Console(stderr=True, quiet=True)
        return StageContext(stage=stage, key=key, store=store, run=RunHandle("", None), console=console, connect=lambda: None)

    sampled = generate.GenerateConfig(
        num_samples=count,
        forward_batch_size=_IMAGES_PER_PASS,
        seed=0,
        execution=generate.GenerateExecution(**execution),
    )
    started = time.perf_counter()
    made = generate.run(sampled, {"model": inputs["model"]}, context("generate"))
    generated = time.perf_counter() - started
    assert made.summary is not None
    inputs["samples"] = _commit(store, "generate", key, made.files, made.summary.to_dict(), dict(made.metrics))
    scored = evaluate.EvaluateConfig(metrics=("frechet_distance",), execution=TokenizerExecution(**execution))
    started = time.perf_counter()
    evaluate.run(scored, inputs, context("evaluate"))
    return {"generate": generated, "evaluate": time.perf_counter() - started}


class BareParts:
    """Plain loops over the same passes, without the distance, which does not grow with the number of images."""

    def __init__(self, preset: str) -> None:
        from enat.config import ENATConfig
        from enat.metrics.inception import InceptionExtractor
        from enat.model import ENAT
        from enat.tokenizer import VQGAN, VQGANConfig

        self.model, self.vqgan = ENAT(ENATConfig.preset(preset)).eval(), VQGAN(VQGANConfig.preset(_TOKENIZER)).eval()
        self.extractor = InceptionExtractor(random_inception_weights())

    @torch.inference_mode()
    def seconds_per_image(self, count: int) -> dict[str, float]:
        """Seconds of each of _PARTS. A first pass warms up."""
        from enat.images import to_uint8
        from enat.sampler_config import SamplerConfig
        from enat.sampling.sampler import sample

        torch.set_num_threads(os.cpu_count() or 1)
        passes, labels = -(-count // _IMAGES_PER_PASS), torch.arange(_IMAGES_PER_PASS)
        seconds = dict.fromkeys(_PARTS, 0.0)
        for number in range(passes + 1):
            seeds = [number * _IMAGES_PER_PASS + i for i in range(_IMAGES_PER_PASS)]
            started = time.perf_counter()
            codes = sample(self.model, labels, SamplerConfig(), seeds=seeds)
            between = time.perf_counter()
            self.extractor(to_uint8(self.vqgan.decode(codes.view(-1, 16, 16))))
            if number:
                seconds["generate"] += between - started
                seconds["evaluate"] += time.perf_counter() - between
        return {name: value / (passes * _IMAGES_PER_PASS) for name, value in seconds.items()}


def _inputs(store: Any, preset: str) -> dict[str, Any]:
    """A model, a tokenizer and a reference with random weights."""
    import dataclasses

    from enat.checkpoint import save_weights
    from enat.config import ENATConfig
    from enat.metrics.inception import InceptionExtractor
    from enat.metrics.moments import FeatureMoments
    from enat.model import ENAT
    from enat.tokenizer import VQGAN, VQGANConfig
    from pipelines.evaluation.extractors import FEATURES_VERSION

    def put(stage: str, name: str, write: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / name)
            return store.put_file(stage, "1" * 64, name, Path(folder) / name)

    torch.manual_seed(0)
    config, architecture = VQGANConfig.preset(_TOKENIZER), ENATConfig.preset(preset)
    tokenizer_file = put("tokenizer", "vqgan.safetensors", lambda path: save_weights(path, VQGAN(config)))
    tokenizer = _commit(
        store, "tokenizer", "1" * 64, (tokenizer_file,), {"config": dataclasses.asdict(config), "is_imported": False}
    )
    model_file = put("train", "model.safetensors", lambda path: save_weights(path, ENAT(architecture)))
    trained = {"model": dataclasses.asdict(architecture), "num_steps": 0, "dataset": "bench", "parameters": 0, "is_imported": True}
    model = _commit(store, "train", "1" * 64, (model_file,), {**trained, "tokenizer_digest": tokenizer.digest})
    extractor = InceptionExtractor(random_inception_weights())
    moments = FeatureMoments(2048).add(np.random.default_rng(0).normal(size=(16, 2048)))
    files = (
        put("reference", "extractor.safetensors", extractor.save),
        put("reference", "moments.safetensors", moments.save),
    )
    summary = {
        "extractor": "inception",
        "extractor_digest": files[0].sha256,
        "outputs": dict(extractor.outputs),
        "features_version": FEATURES_VERSION,
        "images_per_pass": _IMAGES_PER_PASS,
        "of": "drawn",
        "dataset": "bench",
        "resolution": _RESOLUTION,
        "num_images": 16,
        "num_kept": 0,
        "rounding": "uint8",
    }
    return {"tokenizer": tokenizer, "model": model, "reference": _commit(store, "reference", "1" * 64, files, summary)}


def _commit(store: Any, stage: str, key: str, files: Any, summary: Any, metrics: dict[str, float] | None = None) -> Any:
    from pipelines.artifacts.manifest import Manifest

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
