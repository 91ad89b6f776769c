"""Stage token_map: every image of a dataset as codes, in Parquet.

The driver plans one part per output file, and blocks of images within a part. Ray Data streams the blocks through decoding
(tasks on CPUs) and encoding (a pool of actors). The driver joins the codes of a part and writes its file. Pixels never reach the
driver, and a memory limit bounds the number of blocks in transit. The plan also fixes which images the encoder computes together:
the bytes of a file do not depend on the number of workers, their batches, or crashes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from enat.config import VQGANConfig, check_choices, check_in
from enat.cost import encoder_macs
from enat.images import ImageError, to_float
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.cluster.capacity import FEEDERS_OF_GPU
from pipelines.cluster.data_stream import feeding_tasks, map_by_workers, stream_records, with_memory_limit
from pipelines.cluster.resources import TokenizerExecution
from pipelines.data import token_map
from pipelines.data.dataset import Dataset, DatasetSummary
from pipelines.data.sources.config import DatasetConfig
from pipelines.data.token_map import TokenMapInfo, TokenMapSummary, TokenRows
from pipelines.workflow.config import added, set_by
from pipelines.workflow.models import TokenizerSummary
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult, WorkerContext
from pipelines.workflow.work import Done, Foreseen, Work

if TYPE_CHECKING:
    import ray.data


CODE_COUNTS = "code_counts.json"
_DTYPES = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "bfloat16"}  # by precision, as token maps record it
_ENCODING_MEMORY = {"cpu": 1 << 30, "cuda": 16 << 30}  # limit of one pass of the encoder
_MAX_BLOCK_BYTES = 64 << 20  # of pixels: Ray Data would cut larger blocks in two
_LEAST_MEMORY = 32 << 20  # of pixels in transit
_WRITERS = 4  # parts that are written at once; a bucket answers slowly
_WRITES_WAITING = 16
_REASONS_COUNTED = 10
_DECODING_SECONDS = 4.5e-3  # of one image on one CPU at 256 pixels
_ROW_BYTES = 60  # of a row without its codes: key, digest and label


@dataclass(frozen=True, kw_only=True)
class TokenMapExecution(TokenizerExecution):
    """Workers that encode. On CPUs each worker computes as many passes side by side as it has CPUs."""

    worker_batch_size: int = 256
    """Images that are sent from decoding to encoding together, rounded to whole passes. Unit: images."""
    num_decoders: int | None = None
    """Tasks that decode images, one CPU each. Null takes all CPUs that the encoders leave."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_in(self, "[1, inf)", "num_decoders")


@dataclass(frozen=True, kw_only=True)
class TokenMapConfig:
    """Codes of every image of the run's dataset, and of its mirror image."""

    shard_size: int = 2048
    """Images per Parquet file. An interrupted stage loses at most one file per worker. Unit: images."""
    max_quarantine_share: float = 0.01
    """Share of images, in [0, 1], that may be unreadable before the stage fails."""
    precision: str = "fp32"
    """Number format of the encoder: "fp32", "tf32" (on GPUs) or "bf16". For the last two, and for a compiled encoder, the share of
    the codes that differ from those of fp32 is measured on the first images."""
    max_code_flips: float | None = added(None)
    """Largest share of codes, in [0, 1], that may differ from those of fp32 before the stage fails. Null allows any."""
    forward_batch_size: int | None = None
    """Images that the encoder computes together. Sums of floats depend on it, which matters for codes that are nearly tied. Null
    takes as many as memory allows on the kind of device. Unit: images."""
    dataset: DatasetConfig | None = set_by("dataset")
    """Images to encode."""
    execution: TokenMapExecution = field(default_factory=TokenMapExecution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "shard_size", "forward_batch_size")
        check_in(self, "[0, 1]", "max_quarantine_share", "max_code_flips")
        check_choices(self, precision=tuple(_DTYPES))

    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shard_size", "precision", "forward_batch_size")}


@dataclass(frozen=True)
class _Encoding:
    """The settings of an encoder."""

    tokenizer: Manifest
    info: TokenMapInfo
    images_per_pass: int
    execution: TokenMapExecution
    precision: str


def run(config: TokenMapConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the index of a dataset, its images, and a tokenizer.

    Writes the codes of all images and of their mirror images, one Parquet file per shard_size images, the images that could not be
    read, and how often each code occurs. Measures the numbers of rows and unreadable images, and how evenly the codes are used.
    Raises ValueError if more images are unreadable than max_quarantine_share allows.
    """
    assert config.dataset is not None
    dataset, tokenizer = Dataset(config.dataset, context.store, inputs["dataset"]), inputs["tokenizer"]
    architecture = TokenizerSummary.read(tokenizer).config
    info = _info(config, DatasetSummary.read(inputs["dataset"]), architecture, tokenizer.digest)
    per_pass = config.forward_batch_size or _images_per_pass(architecture, config.execution.device)
    encoding = _Encoding(tokenizer, info, per_pass, config.execution, config.precision)
    parts = range(-(-dataset.num_images // config.shard_size))
    done = context.store.resume_parts(context.stage, context.key)
    _check_passes(per_pass, done.values())
    todo = [part for part in parts if _part_name(part) not in done]
    if todo:
        context.connect_for(config.execution, "token_map")
        with context.bar(dataset.num_images, "images") as bar:
            bar.update(sum(record["rows"] + len(record["quarantined"]) for record in done.values()))
            quarantined = sum(len(record["quarantined"]) for record in done.values())
            blocks = _plan(todo, config.shard_size, dataset.num_images, _block_size(encoding))
            with closing(_encode_parts(blocks, dataset, encoding, context)) as encoded:
                for block in encoded:
                    bar.advance(block["images"])
                    _check_flips(block["code_flips"], config)
                    quarantined += len(block["quarantined"])
                    _check_quarantine(quarantined, dataset.num_images, config.max_quarantine_share, block["quarantined"])
    return _collect(config, dataset, info, architecture, context)


def _info(config: TokenMapConfig, dataset: DatasetSummary, architecture: VQGANConfig, tokenizer_digest: str) -> TokenMapInfo:
    return TokenMapInfo(
        dataset=dataset.name,
        resolution=architecture.resolution,
        grid_size=architecture.grid_size,
        codebook_size=architecture.codebook_size,
        num_classes=len(dataset.class_names),
        tokenizer_digest=tokenizer_digest,
        num_captions=dataset.num_captions,
        dtype=_DTYPES[config.precision],
    )


def foresee(config: TokenMapConfig, inputs: Mapping[str, Any]) -> Foreseen:
    dataset, architecture = inputs["dataset"], inputs["tokenizer"].config
    info = _info(config, dataset, architecture, "")
    return Foreseen(
        summary=TokenMapSummary(info=info, rows=dataset.num_images, class_names=dataset.class_names),
        work=_work(config, architecture, dataset.num_images),
        size=dataset.num_images * (2 * architecture.grid_size**2 * math.log2(architecture.codebook_size) / 8 + _ROW_BYTES),
        num_parts=-(-dataset.num_images // config.shard_size),
    )


def _work(config: TokenMapConfig, architecture: VQGANConfig, num_images: int) -> list[Work]:
    execution = config.execution
    per_pass = config.forward_batch_size or _images_per_pass(architecture, execution.device)
    num_decoders = execution.num_decoders or execution.count * (FEEDERS_OF_GPU if execution.gpus_per_worker else 1)
    return [
        Work(
            name="encoding",
            count=num_images,
            macs=2 * encoder_macs(architecture),
            workers=execution,
            num_pieces=-(-num_images // min(per_pass, num_images or 1)),
            precision=config.precision,
            batch_size=per_pass,
        ),
        Work(
            name="decoding",
            count=num_images,
            cpu_seconds=_DECODING_SECONDS * architecture.resolution / 256,
            workers=replace(execution, num_workers=num_decoders),
            on_cpus=True,
            is_beside=True,
        ),
    ]


def _images_per_pass(architecture: VQGANConfig, device: str) -> int:
    """The power of two, 256 at most, that fits into the memory set aside: the same on all machines with this kind of device."""
    fitting = max(1, _ENCODING_MEMORY[device] // architecture.encoding_bytes)
    return min(256 if device == "cuda" else 64, 1 << (int(fitting).bit_length() - 1))


def _check_passes(images_per_pass: int, done: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to continue parts of another kind of device: codes that are nearly tied may differ."""
    for record in done:
        if record["images_per_pass"] != images_per_pass:
            raise ValueError(
                f"this token map was started with {record['images_per_pass']} images per pass on another kind of device, "
                f"and here it would be {images_per_pass}. "
                "Continue on that kind of device, or restart with token_map.forward_batch_size"
            )


def _block_size(encoding: _Encoding) -> int:
    """Images per block: whole passes."""
    fitting = _MAX_BLOCK_BYTES // (3 * encoding.info.resolution**2)
    wanted = min(encoding.execution.worker_batch_size, fitting)
    return encoding.images_per_pass * max(1, wanted // encoding.images_per_pass)


def _plan(parts: Sequence[int], shard_size: int, num_images: int, block_size: int) -> list[dict[str, int]]:
    """Blocks of the given parts: images start..stop-1."""
    rows: list[dict[str, int]] = []
    for part in parts:
        end = min((part + 1) * shard_size, num_images)
        for start in range(part * shard_size, end, block_size):
            rows.append({"block": len(rows), "part": part, "start": start, "stop": min(start + block_size, end)})
    return rows


def _encode_parts(
    blocks: list[dict[str, int]], dataset: Dataset, encoding: _Encoding, context: StageContext
) -> Generator[dict[str, Any]]:
    """Yields blocks in the order in which they finish. A part is written when all of its blocks have finished."""
    import ray.data

    def job(rows: list[dict[str, int]]) -> ray.data.Dataset:
        arguments, execution = (context.for_workers(), encoding), encoding.execution
        feeding = feeding_tasks(execution, execution.num_decoders, context.spare_cpus)
        planned = ray.data.from_items(rows, override_num_blocks=len(rows))
        decoded = planned.map_batches(_Decode(dataset, encoding.info.resolution), **feeding)
        encoded = map_by_workers(decoded, _Encode, arguments, execution, len(rows), is_alone=context.is_alone)
        return with_memory_limit(encoded, _pixels_in_transit(encoding))

    num_blocks = Counter(row["part"] for row in blocks)
    arrived: dict[int, list[dict[str, Any]]] = defaultdict(list)
    writing: list[Future[None]] = []
    with ThreadPoolExecutor(_WRITERS) as pool, closing(stream_records(blocks, job, id="block")) as records:
        for block in records:
            part = block["part"]
            arrived[part].append(block)
            if len(arrived[part]) == num_blocks[part]:
                whole = sorted(arrived.pop(part), key=lambda block: int(block["start"]))
                writing.append(pool.submit(_write_part, part, whole, encoding, context))
            while len(writing) > _WRITES_WAITING or (writing and writing[0].done()):
                writing.pop(0).result()
            yield block
        for future in writing:
            future.result()


def _pixels_in_transit(encoding: _Encoding) -> int:
    """Bytes of decoded blocks that may wait for encoders: enough that encoders never wait for blocks."""
    import ray.data

    execution = encoding.execution
    num_decoders = execution.num_decoders or int(ray.cluster_resources().get("CPU", 1))
    block_bytes = 3 * encoding.info.resolution**2 * _block_size(encoding)
    return max(_LEAST_MEMORY, block_bytes * (4 * execution.count + 2 * num_decoders))


def _write_part(part: int, blocks: Sequence[dict[str, Any]], encoding: _Encoding, context: WorkerContext) -> None:
    info = encoding.info
    rows, name = TokenRows.concatenate([block["rows"] for block in blocks]), _part_name(part)
    file = context.write(name, lambda path: token_map.write_shard(path, info, rows))
    counts = np.bincount(np.concatenate([rows.codes, rows.codes_flipped]).ravel(), minlength=info.codebook_size)
    record = {
        "rows": len(rows),
        "file": asdict(file),
        "quarantined": [row for block in blocks for row in block["quarantined"]],
        "code_counts": counts.tolist(),
        "images_per_pass": encoding.images_per_pass,
        "seconds": sum(block["seconds"] for block in blocks),
        "decoding_seconds": sum(block["decoding_seconds"] for block in blocks),
        "code_flips": next((block["code_flips"] for block in blocks if block["code_flips"] is not None), None),
    }
    context.store.put_part(context.stage, context.key, name, record)


@dataclass(frozen=True)
class _Decoded:
    """Metadata of the images of a block. A class, because Ray turns lists of plain values into arrays.

    images: slot, key, label, sha256, captions, number of the first caption; of readable images.   quarantined: key, reason.
    """

    block: dict[str, int]
    images: list[tuple[int, str, int, bytes, tuple[str, ...], int]]
    quarantined: list[list[str]]
    seconds: float


class _Decode:
    """Block -> pixels uint8 (R, 3, H, W), zeros for unreadable images, and the metadata of each image."""

    def __init__(self, dataset: Dataset, resolution: int) -> None:
        self.dataset, self.resolution = dataset, resolution

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        started = time.monotonic()
        block = {name: int(values[0]) for name, values in batch.items()}
        shape = (block["stop"] - block["start"], 3, self.resolution, self.resolution)
        pixels = np.zeros(shape, np.uint8)
        images: list[Any] = []
        quarantined: list[list[str]] = []
        for slot, (row, decoded) in enumerate(self.dataset.decode(self.resolution, block["start"], block["stop"])):
            if isinstance(decoded, ImageError):
                quarantined.append([row.key, str(decoded)])
                continue
            pixels[slot] = decoded
            digest = hashlib.sha256(row.data).digest()
            images.append((slot, row.key, row.label, digest, row.captions, row.first_caption))
        return {"pixels": pixels[None], "block": [_Decoded(block, images, quarantined, time.monotonic() - started)]}


class _Encode:
    """Block with pixels -> rows of the token map. One actor holds one tokenizer."""

    def __init__(self, context: WorkerContext, encoding: _Encoding) -> None:
        from enat.checkpoint import load_vqgan
        from pipelines.sampling.fixed_batches import fix_numerics, pass_pool

        self.encoding, execution = encoding, encoding.execution
        self.vqgan = load_vqgan(context.store.fetch(encoding.tokenizer, "vqgan.safetensors")).on(execution.device)
        if execution.compile:
            self.vqgan.compile_networks()
        fix_numerics(execution.device)
        # One thread per pass, since a convolution's sums depend on the number of its threads.
        num_passes = execution.num_threads if execution.device == "cpu" else 1
        self.pool = pass_pool(num_passes)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        started = time.monotonic()
        block: _Decoded = batch["block"][0]
        pixels = batch["pixels"][0]
        images = block.images
        size = self.encoding.images_per_pass
        passes = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        encoded = np.concatenate(list(self.pool.map(self._encode, passes)))
        kept = np.array([image[0] for image in images], np.int64)
        _, keys, labels, digests, captions, first_captions = zip(*images, strict=True) if images else [()] * 6
        rows = TokenRows(
            codes=encoded[kept, 0],
            codes_flipped=encoded[kept, 1],
            keys=list(keys),
            labels=list(labels),
            source_sha256=list(digests),
            captions=list(captions),
            first_captions=list(first_captions),
        )
        record = {
            **{name: block.block[name] for name in ("block", "part", "start")},
            "rows": rows,
            "images": len(pixels),
            "quarantined": block.quarantined,
            "seconds": time.monotonic() - started,
            "decoding_seconds": block.seconds,
            "code_flips": self._code_flips(passes[0], encoded) if self._is_compared(block) else None,
        }
        return {"record": [record]}

    def _is_compared(self, block: _Decoded) -> bool:
        is_exact = self.encoding.precision == "fp32" and not self.encoding.execution.compile
        return not is_exact and block.block["start"] == 0 and bool(block.images)

    def _code_flips(self, pixels: np.ndarray, encoded: np.ndarray) -> float:
        """Share of the codes of a pass that differ from those of fp32, not compiled. Unreadable images count as well; both see
        zeros."""
        import torch

        with torch.compiler.set_stance("force_eager"):
            exact = self._encode(pixels, "fp32")
        return float((exact != encoded[: len(pixels)]).mean())

    def _encode(self, pixels: np.ndarray, precision: str | None = None) -> np.ndarray:
        """uint8 (R, 3, H, W) -> codes uint16 (R, 2, L), of the images and of their mirror images; R images_per_pass at most.

        precision: None is that of the config.

        The encoder always sees images_per_pass images: what a convolution computes depends on the size of its batch.
        """
        import torch

        padding = np.zeros((self.encoding.images_per_pass - len(pixels), *pixels.shape[1:]), np.uint8)
        images = to_float(torch.from_numpy(np.concatenate([pixels, padding])).to(self.encoding.execution.device))
        sides = [self.vqgan.encode(side, precision or self.encoding.precision).flatten(1) for side in (images, images.flip(-1))]
        return torch.stack(sides, dim=1)[: len(pixels)].cpu().numpy().astype(np.uint16)


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _check_quarantine(quarantined: int, num_images: int, max_share: float, examples: Sequence[Sequence[str]]) -> None:
    if examples and quarantined > max_share * num_images:
        key, reason = examples[0]
        raise ValueError(
            f"{quarantined} of {num_images} images cannot be read, more than token_map.max_quarantine_share "
            f"{max_share:g} allows; one is {key}: {reason}"
        )


def _check_flips(code_flips: float | None, config: TokenMapConfig) -> None:
    if code_flips is not None and config.max_code_flips is not None and code_flips > config.max_code_flips:
        how, remedy = f"precision {config.precision}", "token_map.precision=fp32"
        if config.execution.compile:
            how += ", compiled"
            remedy = "token_map.execution.compile=false" if config.precision == "fp32" else remedy
        raise ValueError(
            f"with {how}, {100 * code_flips:.2g}% of the first images' codes differ from those of fp32, "
            f"more than token_map.max_code_flips {config.max_code_flips:g} allows; set {remedy}, or allow more"
        )


def _accept(config: TokenMapConfig, manifest: Manifest) -> None:
    """Check an existing map, which may have been made with another limit."""
    _check_flips(manifest.metrics.get("code_flips"), config)
    summary = TokenMapSummary.read(manifest)
    examples = [[f"see {token_map.QUARANTINE} of {manifest.key[:12]}", ", ".join(summary.quarantine_reasons)]]
    _check_quarantine(summary.quarantined, summary.rows + summary.quarantined, config.max_quarantine_share, examples)


def _collect(
    config: TokenMapConfig, dataset: Dataset, info: TokenMapInfo, architecture: VQGANConfig, context: StageContext
) -> StageResult:
    records = context.store.read_parts(context.stage, context.key)
    assert len(records) == -(-dataset.num_images // config.shard_size), "a planned part has no record"
    rows = sum(record["rows"] for record in records.values())
    quarantined = [(key, reason) for record in records.values() for key, reason in record["quarantined"]]
    assert rows + len(quarantined) == dataset.num_images, "rows + quarantined = inputs"
    _check_quarantine(len(quarantined), dataset.num_images, config.max_quarantine_share, quarantined)
    quarantine = context.write(token_map.QUARANTINE, lambda path: token_map.write_quarantine(path, quarantined))
    counts = np.array([record["code_counts"] for record in records.values()], dtype=np.int64).sum(axis=0)
    probs = counts[counts > 0] / max(1, counts.sum())
    encoding_seconds = sum(record["seconds"] for record in records.values())
    decoding_seconds = sum(record["decoding_seconds"] for record in records.values())
    works = _work(config, architecture, dataset.num_images)
    flips = next((found for record in records.values() if (found := record.get("code_flips")) is not None), None)
    _check_flips(flips, config)
    reasons = Counter(reason.partition(":")[0] for _, reason in quarantined).most_common(_REASONS_COUNTED)
    return StageResult(
        files=[*(FileRecord(**record["file"]) for record in records.values()), quarantine],
        records=[context.write(CODE_COUNTS, lambda path: path.write_text(json.dumps(counts.tolist())))],
        summary=TokenMapSummary(
            info=info,
            rows=rows,
            quarantined=len(quarantined),
            quarantine_reasons=dict(reasons),
            class_names=tuple(dataset.class_names),
        ),
        metrics={
            "rows": rows,
            "quarantined": len(quarantined),
            "code_usage": float((counts > 0).mean()),
            "code_perplexity": float(np.exp(-(probs * np.log(probs)).sum())),
            **({} if flips is None else {"code_flips": flips}),
        },
        worker_seconds=encoding_seconds + decoding_seconds,
        device_seconds=config.execution.device_seconds(encoding_seconds),
        work=[Done(work, took, work.num_workers) for work, took in zip(works, (encoding_seconds, decoding_seconds), strict=True)],
    )


def _describe(manifest: Manifest) -> str:
    summary = TokenMapSummary.read(manifest)
    info, quarantined = summary.info, f", {summary.quarantined:,} quarantined" if summary.quarantined else ""
    return f"{summary.rows:,} images, {info.resolution} px, {info.grid_size} x {info.grid_size} codes{quarantined}"


STAGE = Stage(
    "token_map",
    2,
    run,
    reads={"dataset": Input(("dataset",)), "tokenizer": Input(("tokenizer",))},
    config=TokenMapConfig,
    imports=("torch", "enat.tokenizer", "pipelines.stages.token_map"),
    summary=TokenMapSummary,
    foresee=foresee,
    kind="tokenizing",
    files=("part-*.parquet", token_map.QUARANTINE, CODE_COUNTS),
    describe=_describe,
    accept=_accept,
)
