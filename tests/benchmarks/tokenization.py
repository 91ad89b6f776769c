"""Speed and memory of tokenizing a dataset, and speed of reading the codes: ratios within one run.

    make bench                                             all benchmarks (this one takes about 10 minutes on two cores)
    .venv/bin/python tests/benchmarks/tokenization.py --scale 0.1     a tenth of the images

The pipeline is compared with plain loops on the same machine twice: if the encoder is the bottleneck (plain loop: encoding of
decoded images), and if decoding is (plain loop: decoding). The difference between a long and a short run excludes starting Ray's
workers. Each run is a separate process.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from common import in_process, run_script, show, where
from rich.console import Console

if TYPE_CHECKING:
    from pipelines.data.token_map import TokenMapInfo


@dataclass(frozen=True)
class Workload:
    """config: of the tokenizer.   size: pixels of the source images, width and height.   counts: images of a short and a long run.

    batch_size: images that travel together.
    """

    config: dict[str, Any]
    size: tuple[int, int]
    counts: tuple[int, int]
    batch_size: int

    def scaled(self, scale: float) -> tuple[int, int]:
        short = max(8, int(self.counts[0] * scale))
        return short, max(2 * short, int(self.counts[1] * scale))


_TINY = {"resolution": 16, "base_channels": 32, "channel_multipliers": [1, 1, 2], "num_res_blocks": 1}
_ENCODER_BOUND = Workload({"resolution": 128, "base_channels": 64, "num_res_blocks": 1}, (160, 140), (48, 192), 64)
_DECODER_BOUND = Workload(_TINY, (500, 375), (400, 3000), 256)
_MEMORY = Workload({**_TINY, "resolution": 64, "channel_multipliers": [1, 1, 1]}, (80, 64), (1000, 10_000), 256)
_IMAGENET_ROWS = 1_281_167
_ROWS_PER_SHARD = 65_536


@click.command()
@click.option("--scale", default=1.0, help="Factor on the numbers of images and rows.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(scale: float, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as place:
        os.environ["ENAT_CACHE"] = str(Path(place) / "cache")
        figures = {
            **where(),
            **rate("encoder", _ENCODER_BOUND, "_plain_encoder", Path(place), scale),
            **rate("decoder", _DECODER_BOUND, "_plain_decoder", Path(place), scale),
            **memory(Path(place), scale),
            **bytes_per_image(Path(place)),
            **reader(Path(place), int(_IMAGENET_ROWS * scale)),
        }
    show("tokenization", figures, as_json)


def rate(name: str, workload: Workload, plain_loop: str, place: Path, scale: float) -> dict[str, float]:
    """Images per second of the pipeline and of a plain loop, and their ratio. Start-up cancels between the two runs."""
    place, (short, long) = place / name, workload.scaled(scale)
    seconds = [run_pipeline(place, workload, count)["seconds"] for count in (short, long)]
    pipeline = (long - short) / (seconds[1] - seconds[0])
    plain = in_process(__file__, plain_loop, place, workload.config, short)
    return {
        f"{name}_bound_pipeline_images_per_second": pipeline,
        f"{name}_alone_images_per_second": plain,
        f"{name}_bound_ratio": pipeline / plain,
    }


def memory(place: Path, scale: float) -> dict[str, float]:
    """Peak of private and shared memory of all processes of a run, in MB."""
    short, long = _MEMORY.scaled(scale)
    peaks = [run_pipeline(place / "memory", _MEMORY, count)["peak_bytes"] / 1e6 for count in (short, long)]
    return {
        f"peak_memory_mb_of_{short}_images": peaks[0],
        f"peak_memory_mb_of_{long}_images": peaks[1],
        "peak_memory_ratio": peaks[1] / peaks[0],
    }


def bytes_per_image(place: Path) -> dict[str, float]:
    """Bytes per image of a map with 256 uniform codes out of 1,024 for image and mirror image: 640 bytes of entropy."""
    path, rows = place / "part.parquet", 2048
    _random_shard(path, rows)
    return {"bytes_per_image_on_disk_at_most": path.stat().st_size / rows}


def reader(place: Path, num_rows: int) -> dict[str, float]:
    """Rows per second of one process in batches of 2,048, in the order of an epoch, and the seconds that opening the map takes.

    From a map of ImageNet's size that is opened in a store. Its shards have the same content.
    """
    from pipelines.artifacts.manifest import Manifest
    from pipelines.artifacts.open import open_store
    from pipelines.data.token_map import TokenMap

    store, path = open_store(str(place / "reader")), place / "shard.parquet"
    num_shards = -(-num_rows // _ROWS_PER_SHARD)
    num_rows = num_shards * _ROWS_PER_SHARD
    info = _random_shard(path, _ROWS_PER_SHARD)
    files = tuple(store.put_file("token_map", "1" * 64, f"part-{shard:05d}.parquet", path) for shard in range(num_shards))
    summary = {"info": asdict(info), "rows": num_rows, "class_names": []}
    made = Manifest(stage="token_map", key="1" * 64, stage_version=1, config={}, inputs={}, files=files, summary=summary)
    started = time.perf_counter()
    token_map = TokenMap.open(store, store.commit(made))
    opened = time.perf_counter()
    batch_size, num_steps = 2048, max(1, num_rows // 2048)
    for step in range(num_steps):
        batch = token_map.batch_rows(0, step, batch_size)
        token_map.take(batch.rows, batch.flipped)
    seconds = time.perf_counter() - opened
    return {
        "reader_rows": num_rows,
        "opening_seconds": opened - started,
        "reader_rows_per_second": num_steps * batch_size / seconds,
        "reading_an_epoch_over_opening": seconds / (opened - started),
    }


def _random_shard(path: Path, num_rows: int) -> TokenMapInfo:
    """Write a shard of uniform codes with labels, keys and digests like those of ImageNet."""
    from pipelines.data.token_map import TokenMapInfo, TokenRows, write_shard

    rng = np.random.default_rng(0)
    info = TokenMapInfo(
        dataset="bench", resolution=256, grid_size=16, codebook_size=1024, num_classes=1000, tokenizer_digest="0" * 64
    )
    codes = rng.integers(0, 1024, (2, num_rows, 256))
    keys = [f"n{row // 1300:08d}/n{row // 1300:08d}_{row}.JPEG" for row in range(num_rows)]
    digests = [rng.bytes(32) for _ in range(num_rows)]
    rows = TokenRows(codes=codes[0], codes_flipped=codes[1], keys=keys, labels=[0] * num_rows, source_sha256=digests)
    write_shard(path, info, rows)
    return info


# The pipeline ------------------------------------------------------------------------------------------------------------------


def run_pipeline(place: Path, workload: Workload, count: int) -> dict[str, float]:
    images = write_images(place / f"images-{count}", workload.size, count)
    tokenizer = [f"tokenizer.{name}={json.dumps(value)}" for name, value in workload.config.items()]
    values = [
        f"dataset={{kind: images, path: {images}}}",
        "tokenizer.preset=vqgan-256",
        *tokenizer,
        f"tokenizer.weights={write_tokenizer(place, workload.config)}",
        "token_map={shard_size: 512, forward_batch_size: 8}",
        f"token_map.execution={{num_workers: 1, worker_batch_size: {workload.batch_size}}}",
    ]
    return in_process(__file__, "_token_map", place / f"run-{count}", values, count)


def _token_map(place: Path, values: list[str], count: int) -> dict[str, float]:
    """From images to a committed token map, with one CPU for the encoder and one for decoding."""
    from pipelines.cluster import connection

    connection.prepare_environment()
    from pipelines.artifacts.open import open_store
    from pipelines.run import graph
    from pipelines.run.loading import load_run
    from pipelines.tracking.run import TrackingConfig, start_run
    from pipelines.workflow import driver, node_run

    off = TrackingConfig(enabled=False)
    session = node_run.Session(
        store=open_store(str(place)),
        run=start_run("", off, "bench", {}),
        tracking=off,
        console=Console(stderr=True, quiet=True),
        connect=lambda: connection.connect(connection.ClusterConfig(num_cpus=2)),
    )
    nodes = graph.build(load_run(None, ["name=bench", "targets=[token_map]", *values]))
    session.connect()
    with _PeakMemory() as peak:
        started = time.perf_counter()
        done = driver.execute(nodes, session)[-1]
        seconds = time.perf_counter() - started
    assert done.manifest.summary["rows"] == count
    return {"seconds": seconds, "peak_bytes": peak.bytes}


class _PeakMemory:
    """Peak memory of this process and its children, sampled ten times a second: private memory, and shared memory once. Other users
    of shared memory disturb it."""

    def __enter__(self) -> _PeakMemory:
        self.bytes, self._stop = 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        import psutil

        shared_before = psutil.disk_usage("/dev/shm").used  # of Ray's object store
        while not self._stop.wait(0.1):
            held = psutil.disk_usage("/dev/shm").used - shared_before
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    held += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, held)


# Plain loops -------------------------------------------------------------------------------------------------------------------


def _plain_encoder(place: Path, config: dict[str, Any], count: int) -> float:
    """Images per second of the encoder alone: one thread, passes of eight, image and mirror image, pixels in memory."""
    import torch

    from enat.checkpoint import load_vqgan
    from enat.images import to_float

    torch.set_num_threads(1)
    vqgan = load_vqgan(write_tokenizer(place, config))
    size = config["resolution"]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    vqgan.encode(to_float(pixels[:8]))
    started = time.perf_counter()
    for some in pixels.split(8):
        images = to_float(some)
        vqgan.encode(images)
        vqgan.encode(images.flip(-1))
    return count / (time.perf_counter() - started)


def _plain_decoder(place: Path, config: dict[str, Any], count: int) -> float:
    """Images per second of reading, decoding and cropping alone, in one thread."""
    from enat.images import center_crop, decode_image, to_array

    files = sorted((place / f"images-{count}").glob("*.jpg"))
    started = time.perf_counter()
    for file in files:
        to_array(center_crop(decode_image(file.read_bytes()), config["resolution"]))
    return len(files) / (time.perf_counter() - started)


# Means -------------------------------------------------------------------------------------------------------------------------


def write_tokenizer(place: Path, config: dict[str, Any]) -> Path:
    import torch

    from enat.checkpoint import save_weights
    from enat.tokenizer import VQGAN, VQGANConfig

    path = place / "vqgan.safetensors"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        save_weights(path, VQGAN(VQGANConfig(**config)))
    return path


def write_images(folder: Path, size: tuple[int, int], count: int) -> Path:
    """JPEGs of crops of a photograph that ships with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    if not folder.exists():
        folder.mkdir(parents=True)
        photograph, rng = load_sample_image("china.jpg"), np.random.default_rng(0)  # 640 x 427
        for index in range(count):
            left, top = (int(rng.integers(0, limit - side + 1)) for limit, side in zip((640, 427), size, strict=True))
            crop = photograph[top : top + size[1], left : left + size[0]]
            Image.fromarray(crop).save(folder / f"{index:06d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    run_script(globals(), main)
