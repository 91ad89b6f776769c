"""How cost grows: sampling, metrics, token maps, and the commands that look at a store.

    .venv/bin/python tests/benchmarks/growth.py                 everything (about 40 minutes on two cores)
    .venv/bin/python tests/benchmarks/growth.py sampling store  some of sampling, metrics, maps, store
    .venv/bin/python tests/benchmarks/growth.py --scale 0.1     smaller sizes

Each figure has an exponent: the slope of log seconds over log size between the two largest sizes. 1 is proportional, 2 quadratic.
What commands take with an empty store is subtracted before.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import in_process, run_script, show, where
from tokenization import Workload, run_pipeline

_STEPS, _GRIDS, _BATCHES = (4, 8, 16, 32), (8, 16, 32), (1, 2, 4, 8, 16)
_SAMPLES = (10_000, 25_000, 50_000)
_IMAGES = (500, 2000, 8000)
_ARTIFACTS = (100, 2000, 20_000)
_WIDTH = 2048  # of Inception's features
_MODEL: dict[str, Any] = {
    "encoder_layers": 4,
    "decoder_layers": 2,
    "embed_dim": 256,
    "num_heads": 4,
    "codebook_size": 1024,
    "num_classes": 1000,
}
_LIGHT = Workload(
    {"resolution": 64, "base_channels": 32, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1}, (80, 64), (1000, 8000), 256
)


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(["sampling", "metrics", "maps", "store"]))
@click.option("--scale", default=1.0, help="Factor on the numbers of samples, images and artifacts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(parts: tuple[str, ...], scale: float, as_json: bool) -> None:
    figures: dict[str, Any] = dict(where())
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        for part in parts or ("sampling", "metrics", "maps", "store"):
            figures |= globals()[part](Path(folder) / part, scale)
    show("growth", figures, as_json)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size between the two largest sizes, where start-up and overhead matter least."""
    (small, large), (less, more) = sizes[-2:], np.maximum(values[-2:], 1e-3)
    return float(np.log(more / less) / np.log(large / small))


def grown(name: str, sizes: Sequence[int], seconds: Sequence[float], unit: str = "seconds") -> dict[str, float]:
    return {f"{name}_{size}_{unit}": value for size, value in zip(sizes, seconds, strict=True)} | {
        f"{name}_exponent{'' if unit == 'seconds' else '_of_' + unit}": exponent(sizes, seconds)
    }


# Sampling ----------------------------------------------------------------------------------------------------------------------


def sampling(folder: Path, scale: float) -> dict[str, float]:
    """Of a small model, on one core: over steps, tokens and images of a batch."""
    return in_process(__file__, "measure_sampling", folder)


def measure_sampling(_: Path) -> dict[str, float]:
    from enat.config import ENATConfig
    from enat.model import ENAT
    from enat.sampler_config import SamplerConfig
    from enat.sampling.sampler import sample

    torch.set_num_threads(1)

    def seconds(num_steps: int = 8, grid_size: int = 16, batch_size: int = 4) -> float:
        model = ENAT(ENATConfig(**_MODEL, grid_size=grid_size)).eval()
        labels, seeds = torch.arange(batch_size), range(batch_size)
        return _fastest(lambda: sample(model, labels, SamplerConfig(num_steps=num_steps), seeds=seeds))

    return {
        **grown("sampling_steps", _STEPS, [seconds(num_steps=each) for each in _STEPS]),
        **grown("sampling_tokens", [each**2 for each in _GRIDS], [seconds(grid_size=each) for each in _GRIDS]),
        **grown("sampling_batch", _BATCHES, [seconds(batch_size=each) for each in _BATCHES]),
    }


# Metrics -----------------------------------------------------------------------------------------------------------------------


def metrics(folder: Path, scale: float) -> dict[str, float]:
    """Of samples and as many real images with 2,048 features each: seconds, and the peak memory of a process for one metric."""
    sizes = [max(500, int(each * scale)) for each in _SAMPLES]
    figures: dict[str, float] = {}
    for name in ("moments_and_fid", "kid", "precision_and_recall"):
        found = [in_process(__file__, "measure_metric", folder, name, size) for size in sizes]
        figures |= grown(name, sizes, [each["seconds"] for each in found])
        figures |= grown(name, sizes, [each["gigabytes"] for each in found], "gigabytes")
    return figures


def measure_metric(_: Path, name: str, count: int) -> dict[str, float]:
    from enat.metrics.moments import FeatureMoments, frechet_distance, kernel_distance
    from enat.metrics.neighbours import manifold_scores

    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    made, real = (np.abs(rng.standard_normal((count, _WIDTH), np.float32)) * each for each in (np.float32(0.5), np.float32(0.52)))
    metrics: Mapping[str, Callable[[], object]] = {
        "moments_and_fid": lambda: frechet_distance(*(FeatureMoments(_WIDTH).add(each) for each in (made, real))),
        "kid": lambda: kernel_distance(made, real),
        "precision_and_recall": lambda: manifold_scores(real, made),
    }
    started = time.perf_counter()
    metrics[name]()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


# Token maps --------------------------------------------------------------------------------------------------------------------


def maps(folder: Path, scale: float) -> dict[str, float]:
    """A token map of small photographs on two cores, over images; the smallest run without what Ray takes to start."""
    sizes = [max(64, int(each * scale)) for each in _IMAGES]
    found = [run_pipeline(folder, _LIGHT, each) for each in sizes]
    figures = grown("token_map_images", sizes, [each["seconds"] for each in found])
    return figures | grown("token_map_images", sizes, [each["peak_bytes"] / 1e9 for each in found], "gigabytes")


# Looking at a store ------------------------------------------------------------------------------------------------------------


def store(folder: Path, scale: float) -> dict[str, float]:
    """Commands on stores of many artifacts of three stages: what they take beyond what they take with an empty store."""
    sizes = [max(1, int(each * scale)) for each in _ARTIFACTS]
    figures: dict[str, float] = {}
    places = {0: folder / "0"} | {each: folder / str(each) for each in sizes}
    for count, place in places.items():
        fill(place, range(count))
    for name, arguments in _COMMANDS.items():
        empty, *found = [in_process(__file__, "measure_command", place, list(arguments)) for place in places.values()]
        figures |= {f"{name}_empty_seconds": empty} | grown(name, sizes, [each - empty for each in found])
    return figures


_COMMANDS = {
    "plan": ("plan", str(Path(__file__).parents[2] / "configs" / "digits.yaml"), "tracking.enabled=false", "store={place}"),
    "artifacts_ls": ("artifacts", "ls", "--store", "{place}"),
    "artifacts_gc": ("artifacts", "gc", "--ignore-registry", "--store", "{place}"),
}


def measure_command(place: Path, arguments: list[str]) -> float:
    """Seconds of a command in a new process, with its imports."""
    started = time.perf_counter()
    from pipelines.cli.main import commands

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        commands.main([each.format(place=place) for each in arguments], standalone_mode=False)
    return time.perf_counter() - started


def fill(place: Path, numbers: Iterable[int]) -> None:
    """Artifacts of three stages of equal shares, each made from one of the stage before, with manifests as runs write them."""
    from pipelines.artifacts.manifest import FileRecord, Manifest

    place.mkdir(parents=True, exist_ok=True)
    samples = {each.stage: each for each in _examples()}
    stages, before = ("train", "generate", "evaluate"), {"generate": "train", "evaluate": "generate"}
    content, digest = b"x", hashlib.sha256(b"x").hexdigest()
    for number in numbers:
        stage = stages[number % len(stages)]
        folder = place / stage / hashlib.sha256(f"{number}".encode()).hexdigest()
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(content)
        (folder / ".used").write_text("{}")
        inputs = {}
        if stage in before and number:
            source = hashlib.sha256(f"{number - 1}".encode()).hexdigest()
            inputs = {"input": {"stage": before[stage], "key": source, "digest": "0" * 64}}
        example = samples[stage]
        manifest = Manifest(
            stage=stage,
            key=folder.name,
            stage_version=example.stage_version,
            config=example.config,
            inputs=inputs,
            files=(FileRecord("file", "file", 1, digest),),
            summary=example.summary,
            metrics=example.metrics,
            provenance=example.provenance,
        )
        (folder / "manifest.json").write_bytes(manifest.to_json())


def _examples() -> list[Any]:
    """Manifests of real artifacts, which the tests of older manifests keep."""
    from pipelines.artifacts.manifest import Manifest

    folder = Path(__file__).parents[1] / "pipelines" / "stages" / "manifests"
    found = []
    for path in sorted(folder.glob("*.json")):
        fields = json.loads(path.read_text())
        if fields["stage"] in ("train", "generate", "evaluate"):
            found.append(Manifest.read(path.read_bytes(), path, fields["stage"], fields["key"]))
    return found


def _fastest(call: Callable[[], object], num_rounds: int = 3) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    call()
    seconds = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    run_script(globals(), main)
