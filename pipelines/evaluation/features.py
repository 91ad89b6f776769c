"""Features of many images, computed on Ray: moments of all of them, and rows that are kept.

Images travel in blocks of fixed size, by index. Tasks on CPUs load a block; a pool of actors decodes it and computes its features.
The index also fixes which `images_per_pass` images a network computes together, because floating-point sums depend on the rest of
the batch. Blocks return in any order. The driver joins them into parts of bounded size and adds these to the moments in the order
of their index, a few blocks at a time. Features and moments therefore have the same bits for any number of workers, any batch size
and after any crash, and the memory of the driver does not grow with the number of images.

Shape legend: R images of a block, P images of a pass, F features.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from pipelines.artifacts.manifest import WORK, DamagedFileError, FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.data_stream import feeding_tasks, map_by_workers, stream_records, with_memory_limit
from pipelines.cluster.device import wait_for
from pipelines.cluster.resources import Execution
from pipelines.evaluation.extractors import ExtractorSource
from pipelines.evaluation.readers import BlockReader, Decoder, passes_of, run_pass
from pipelines.workflow.stage import StageContext
from pipelines.workflow.work import Work

if TYPE_CHECKING:
    import ray.data
    import torch

    from enat.metrics.extractors import FeatureExtractor
    from enat.metrics.moments import FeatureMoments, Moments

_log = logging.getLogger(__name__)
BLOCK_SIZE = 256  # images that travel together
_BLOCKS_PER_PART = 4  # at least; a crash loses up to one part
_MAX_BLOCKS_PER_PART = 32  # 8,192 images or 170 MB of Inception's outputs; the driver holds a few parts at once
_USUAL_PARTS = 32  # at most, unless parts would be too large: each commits the moments so far, 33 MB for 2048 features
_BLOCKS_PER_SUM = 16  # added to the moments at once: 4,096 images share one sum of squares
_UNKNOWN_EXTRACTOR_SECONDS = 0.02  # of one image, by an extractor whose MACs are not known
_OBJECT_STORE_BYTES = 1 << 30  # of blocks in transit
MOMENTS_FILES = {"features": "moments.safetensors", "spatial": "spatial_moments.safetensors"}  # by output
_KEPT = ("features", "logits")  # outputs whose rows are kept; "spatial" is needed as moments only


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What is computed. How it is distributed is in Execution.

    images_per_pass: P.   kept: ascending indices of the images whose "features" and "logits" are stored, or None for all. An index
    counts readable images within its block.   prefix: of the names of files, for several sets of images under one key.
    num_shown: of the first images, whose pixels are returned, at most BLOCK_SIZE.
    """

    num_images: int
    images_per_pass: int
    kept: np.ndarray | None = None
    prefix: str = ""
    num_shown: int = 0

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError("features need at least one image; num_images is 0")


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """count: images that could be read.   num_kept: images whose rows are kept.   moments: by output.

    files: safetensors with the kept rows, in order, for read_rows.
    worker_seconds: summed over workers.   device_seconds: of the actors that hold the network.   decoding_seconds: the share of
    these actors' time that was spent on decoding images.   changes: by number formats other than fp32, on the first images.
    shown: uint8 (R, 3, H, W), the first images as they were decoded here; None if an earlier call decoded them.
    """

    count: int
    num_kept: int
    moments: Mapping[str, Moments]
    files: tuple[FileRecord, ...]
    worker_seconds: float
    device_seconds: float
    decoding_seconds: float
    changes: dict[str, float] = field(default_factory=dict)
    shown: np.ndarray | None = None


def drawn_evenly(num_images: int, count: int, seed: int) -> np.ndarray:
    """Draw one index from each of `count` equal intervals of range(num_images). Returns at most `count` ascending int64 indices."""
    if count >= num_images:
        return np.arange(num_images)
    edges = np.arange(count + 1, dtype=np.int64) * num_images // max(1, count)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def read_rows(store: ArtifactStore, stage: str, key: str, files: Sequence[FileRecord], name: str) -> np.ndarray:
    """Rows of one output in the order of their images: (R, F), or (R,) for a measure. Raises ValueError if none were kept."""
    parts = [load_file(store.fetch_file(stage, key, file)) for file in files]
    found = [part[name] for part in parts if name in part]
    if not found:
        raise ValueError(f"artifact {stage}/{key[:12]} keeps no {name} of its images")
    return np.concatenate(found)


def stored_moments(store: ArtifactStore, manifest: Manifest, prefix: str = "") -> dict[str, Moments]:
    """Moments of a committed artifact, by output. prefix: of FeatureSpec."""
    from enat.metrics.moments import load_moments

    names = {file.name for file in manifest.files}
    found = {output: prefix + name for output, name in MOMENTS_FILES.items() if prefix + name in names}
    return {output: load_moments(store.fetch(manifest, name)) for output, name in found.items()}


def feature_files(manifest: Manifest, prefix: str = "") -> tuple[FileRecord, ...]:
    """Files of a committed artifact that compute_features wrote. prefix: of FeatureSpec."""
    return tuple(file for file in manifest.files if file.name.startswith(prefix + _PART_PREFIX))


def compute_features(
    reader: BlockReader,
    spec: FeatureSpec,
    extractor: ExtractorSource,
    execution: Execution,
    context: StageContext,
    *,
    beside: Sequence[tuple[ExtractorSource, StageContext]] = (),
) -> FeatureSet:
    """Compute features of the reader's images 0..num_images-1. Resumes after the parts that are committed under the key.

    beside: other extractors with the contexts of their artifacts. They get the same images, which are decoded once, and leave their
    parts under their own keys, from which their own call resumes.
    Raises ValueError if no image can be read, or if an extractor returns values that are not finite or widths other than it
    declares.
    """
    size = _part_size(spec.num_images)
    parts = [range(start, min(start + size, spec.num_images)) for start in range(0, spec.num_images, size)]
    own = _PartWriter(parts, spec.prefix, context)
    first_part = len(own.records)
    shown: list[np.ndarray] = []
    with context.bar(spec.num_images, "images") as bar:
        bar.update(sum(len(part) for part in parts[:first_part]))
        if first_part < len(parts):
            others = [(source, _PartWriter(parts, spec.prefix, each)) for source, each in beside]
            others = [(source, writer) for source, writer in others if first_part <= len(writer.records) < len(parts)]
            sources, writers = [extractor, *(source for source, _ in others)], [own, *(writer for _, writer in others)]
            job = _job(reader, spec, sources, execution, context)
            here = partial(_in_process, reader, spec, sources, execution)
            with closing(stream_records(_blocks(parts, first_part), job, id="block", in_process=here)) as computed:
                _write_all(writers, parts, first_part, _without_pixels(computed, shown), bar.advance)
    records, moments = own.records, own.moments
    count = sum(record["rows"] for record in records)
    if not count:
        raise ValueError(f"none of the {spec.num_images} images can be read")
    return FeatureSet(
        count=count,
        num_kept=sum(record["kept"] for record in records),
        moments=moments,
        files=tuple(FileRecord(**record["file"]) for record in records if record["file"]),
        worker_seconds=sum(record["seconds"] + record["loading_seconds"] for record in records),
        device_seconds=execution.device_seconds(sum(record["seconds"] for record in records)),
        decoding_seconds=sum(record["decoding_seconds"] for record in records),
        changes=records[0].get("changes", {}),
        shown=shown[0] if shown else None,
    )


def feature_work(num_images: int, macs: float, execution: Execution, images_per_pass: int, precision: str) -> Work:
    """The work of compute_features. macs: of making one image and of its features."""
    return Work(
        name="features",
        count=num_images,
        macs=macs,
        cpu_seconds=0.0 if macs else _UNKNOWN_EXTRACTOR_SECONDS,
        workers=execution,
        num_pieces=-(-num_images // BLOCK_SIZE),
        precision=precision,
        batch_size=images_per_pass,
    )


def num_feature_parts(num_images: int) -> int:
    return -(-num_images // _part_size(num_images))


def _part_size(num_images: int) -> int:
    """Images per part: whole blocks. Depends on num_images only."""
    blocks = -(-num_images // BLOCK_SIZE)
    return BLOCK_SIZE * max(_BLOCKS_PER_PART, min(_MAX_BLOCKS_PER_PART, -(-blocks // _USUAL_PARTS)))


def _blocks(parts: Sequence[range], first_part: int) -> list[dict[str, int]]:
    rows: list[dict[str, int]] = []
    for number in range(first_part, len(parts)):
        for start in range(parts[number].start, parts[number].stop, BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, parts[number].stop)
            rows.append({"block": start // BLOCK_SIZE, "part": number, "start": start, "stop": stop})
    return rows


def _job(
    reader: BlockReader, spec: FeatureSpec, sources: Sequence[ExtractorSource], execution: Execution, context: StageContext
) -> Callable[[list[dict[str, int]]], ray.data.Dataset]:
    """The job that computes the records of blocks."""

    def job(rows: list[dict[str, int]]) -> ray.data.Dataset:
        import ray.data

        num_loading = len(rows) if len(rows) < execution.count else None  # Ray Data warns if there are more tasks than blocks
        feeding = feeding_tasks(execution, num_loading, context.spare_cpus)
        planned = ray.data.from_items(rows, override_num_blocks=len(rows))
        loaded = planned.map_batches(_load, fn_args=(reader,), **feeding)
        arguments = (reader, spec, sources, execution)
        computed = map_by_workers(loaded, _Extract, arguments, execution, len(rows), is_alone=context.is_alone)
        return with_memory_limit(computed, _OBJECT_STORE_BYTES)

    return job


def _in_process(
    reader: BlockReader, spec: FeatureSpec, sources: Sequence[ExtractorSource], execution: Execution
) -> Callable[[dict[str, Any]], Any]:
    extract = _Extract(reader, spec, sources, execution)
    return lambda batch: extract(_load(batch, reader))  # type: ignore[arg-type]  # a list in place of a column


# On workers ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """Rows of a block as the reader loads them. A class, because Ray turns dictionaries of arrays into columns."""

    block: dict[str, int]
    rows: dict[str, np.ndarray]
    seconds: float


@dataclass(frozen=True)
class _Outputs:
    """Outputs of a block by one extractor. num_rows: R.   num_kept: rows that are kept.

    for_moments, kept: output or measure -> its rows.
    """

    num_rows: int
    num_kept: int = 0
    for_moments: dict[str, np.ndarray] = field(default_factory=dict)
    kept: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pass:
    """Outputs and measures of the images of one pass by extractor, its duration, and the parts of it that decoding and each
    extractor took. pixels: of the images, if they are shown."""

    outputs: list[dict[str, np.ndarray]]
    seconds: float
    decoding_seconds: float
    extracting_seconds: list[float]
    pixels: np.ndarray | None


def _load(batch: dict[str, np.ndarray], reader: BlockReader) -> dict[str, list[_Loaded]]:
    """Load the rows of a block, on a CPU."""
    started = time.monotonic()
    block = {name: int(values[0]) for name, values in batch.items()}
    rows = reader.load(block["start"], block["stop"])
    return {"block": [_Loaded(block, rows, time.monotonic() - started)]}


def _exact(source: Any) -> Any:
    """The same reader or source of an extractor in fp32; itself if it is."""
    return source.exact() if hasattr(source, "exact") else source


class _Extract:
    """Compute the outputs of a loaded block. One actor holds all extractors."""

    def __init__(self, reader: BlockReader, spec: FeatureSpec, sources: Sequence[ExtractorSource], execution: Execution) -> None:
        from pipelines.sampling.fixed_batches import fix_numerics, pass_pool, passes_at_once

        fix_numerics(execution.device)
        self.spec, self.device = spec, execution.device
        self.reader, self.sources = reader, sources
        self.extractors = [source.load().to(execution.device) for source in sources]
        self.decoder: Decoder = reader.decoder(execution.device)
        is_thread_safe = all(getattr(extractor, "is_thread_safe", False) for extractor in self.extractors)
        sizes = {"batch_size": execution.worker_batch_size, "images_per_pass": spec.images_per_pass}
        num_at_once = passes_at_once(execution.device, **sizes, num_threads=execution.num_threads)
        self.pool = pass_pool(num_at_once if is_thread_safe else 1)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        started = time.monotonic()
        loaded: _Loaded = batch["block"][0]
        num_rows = len(next(iter(loaded.rows.values())))
        passes = passes_of(loaded.rows, self.spec.images_per_pass)
        num_shown = -(-self.spec.num_shown // self.spec.images_per_pass) if loaded.block["start"] == 0 else 0
        results = list(self.pool.map(self._pass, passes, [number < num_shown for number in range(len(passes))]))
        selected = []
        for number, extractor in enumerate(self.extractors):
            outputs = {
                name: np.concatenate([result.outputs[number][name] for result in results])
                for name in (results[0].outputs[number] if results else ())
            }
            self._check(extractor, outputs, loaded.block)
            selected.append(self._selected(extractor, outputs, num_rows, loaded.block))
        seconds = time.monotonic() - started
        in_passes = sum(result.seconds for result in results) or 1.0  # more than `seconds` if passes ran in parallel
        extracting = [sum(result.extracting_seconds[n] for result in results) / in_passes for n in range(len(selected))]
        shared = (1 - sum(extracting)) / len(selected)
        record: dict[str, Any] = {
            **{name: loaded.block[name] for name in ("block", "part", "start")},
            "images": loaded.block["stop"] - loaded.block["start"],
            "outputs": selected,
            "seconds": [seconds * (own + shared) for own in extracting],
            "decoding_seconds": seconds * sum(result.decoding_seconds for result in results) / in_passes,
            "loading_seconds": loaded.seconds / len(selected),
        }
        if loaded.block["start"] == 0 and num_rows and any(_exact(each) is not each for each in (self.reader, *self.sources)):
            record["changes"] = self._changes(loaded)
        pixels = [result.pixels for result in results if result.pixels is not None]
        if loaded.block["start"] == 0 and pixels:
            record["pixels"] = np.concatenate(pixels)[: self.spec.num_shown]
        return {"record": [record]}

    def _changes(self, loaded: _Loaded) -> list[dict[str, float]]:
        """What number formats other than fp32 change in the first pass, for each extractor.

        pixel_change: mean absolute difference of a value in 0..255.   feature_change: mean length of the difference of an image's
        features, as a share of the length of its features in fp32.
        """
        exact_reader, exact_sources = _exact(self.reader), [_exact(source) for source in self.sources]
        is_decoded_otherwise = exact_reader is not self.reader

        def outputs(padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            images = exact_reader.decoder(self.device)(padded).images
            found = {}
            if is_decoded_otherwise:
                found["pixel_change"] = (self.decoder(padded).images.float() - images.float()).abs().flatten(1).mean(dim=1)
            for number, (extractor, source, exact) in enumerate(zip(self.extractors, self.sources, exact_sources, strict=True)):
                if exact is not source:
                    wanted = exact.load().to(self.device)(images)["features"]
                    found[f"{number}/feature_change"] = (extractor(images)["features"] - wanted).norm(dim=1) / wanted.norm(dim=1)
            return found

        size = self.spec.images_per_pass
        changed = run_pass(outputs, passes_of(loaded.rows, size)[0], size, self.device)
        of_all = {name: float(values.mean()) for name, values in changed.items() if "/" not in name}
        own = [changed.get(f"{number}/feature_change") for number in range(len(self.sources))]
        return [of_all | ({"feature_change": float(values.mean())} if values is not None else {}) for values in own]

    def _pass(self, rows: Mapping[str, np.ndarray], is_shown: bool) -> _Pass:
        times: list[float] = []

        def outputs(padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            times.append(time.perf_counter())
            decoded = self.decoder(padded)
            wait_for(self.device)
            times.append(time.perf_counter())
            levels = decoded.images
            found: dict[str, torch.Tensor] = (
                {"pixels": (levels + 0.5).byte() if levels.is_floating_point() else levels} if is_shown else {}
            )
            for number, extractor in enumerate(self.extractors):
                if decoded.images.is_floating_point() and not getattr(extractor, "takes_float", False):
                    raise ValueError(f"{type(extractor).__name__} takes 8-bit images only; set evaluate.rounding to uint8")
                outputs = {**extractor(decoded.images), **decoded.measures}
                found |= {f"{number}/{name}": values for name, values in outputs.items()}
                wait_for(self.device)
                times.append(time.perf_counter())
            return found

        started = time.perf_counter()
        found = run_pass(outputs, rows, self.spec.images_per_pass, self.device)
        pixels = found.pop("pixels", None)
        by_extractor: list[dict[str, np.ndarray]] = [{} for _ in self.extractors]
        for place, values in found.items():
            number, _, name = place.partition("/")
            by_extractor[int(number)][name] = values
        decoding, *extracting = np.diff(times).tolist()
        return _Pass(by_extractor, time.perf_counter() - started, decoding, extracting, pixels)

    def _check(self, extractor: FeatureExtractor, outputs: Mapping[str, np.ndarray], block: Mapping[str, int]) -> None:
        where = f"images {block['start']} to {block['stop'] - 1}"
        for name, width in extractor.outputs.items() if outputs else ():
            values = outputs.get(name)
            if values is None or values.shape[1:] != (width,):
                shape = "nothing" if values is None else f"shape {values.shape}"
                raise ValueError(f"the feature extractor declares width {width} for {name}, but returned {shape} for {where}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} of {where} contain values that are not finite; the extractor or its weights are broken")

    def _selected(
        self, extractor: FeatureExtractor, outputs: Mapping[str, np.ndarray], num_rows: int, block: Mapping[str, int]
    ) -> _Outputs:
        kept = np.arange(num_rows)
        if self.spec.kept is not None:
            first, last = np.searchsorted(self.spec.kept, [block["start"], block["stop"]])
            kept = self.spec.kept[first:last] - block["start"]
            kept = kept[kept < num_rows]
        known = extractor.outputs
        rows = {name: values[kept] for name, values in outputs.items() if name in _KEPT and name in known and len(kept)}
        measures = {name: values for name, values in outputs.items() if name not in known}
        moments = {name: values for name, values in outputs.items() if name in MOMENTS_FILES and name in known}
        return _Outputs(num_rows, len(kept), moments, {**rows, **measures})


# On the driver -------------------------------------------------------------------------------------------------------------

_PART_PREFIX = "features-"


def _part_name(part: int, prefix: str) -> str:
    return f"{prefix}{_PART_PREFIX}{part:05d}.safetensors"


def _without_pixels(records: Iterable[dict[str, Any]], shown: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """The records; pixels go to `shown`."""
    for record in records:
        if "pixels" in record:
            shown.append(record.pop("pixels"))
        yield record


def _write_all(
    writers: Sequence[_PartWriter],
    parts: Sequence[range],
    first_part: int,
    computed: Iterator[dict[str, Any]],
    advance: Callable[[int], object],
) -> None:
    """Join blocks into parts, and let each writer commit what its extractor gave, in order. writers: in the order of extractors."""
    num_blocks = Counter({number: -(-len(part) // BLOCK_SIZE) for number, part in enumerate(parts)})
    following, waiting = first_part, dict[int, list[dict[str, Any]]]()
    writing: list[Future[None]] = []

    def write(part: int, blocks: list[dict[str, Any]]) -> None:
        for number, writer in enumerate(writers):
            writer.write(part, blocks, number)

    with ThreadPoolExecutor(1) as thread:  # it alone changes records and moments
        for record in computed:
            waiting.setdefault(record["part"], []).append(record)
            advance(record["images"])
            while len(waiting.get(following, ())) == num_blocks[following] > 0:
                whole = sorted(waiting.pop(following), key=lambda block: int(block["start"]))
                writing.append(thread.submit(write, following, whole))
                following += 1
            while len(writing) > 2 or (writing and writing[0].done()):  # the rows of a part stay in memory until it is written
                writing.pop(0).result()
        for future in writing:
            future.result()
    assert all(len(writer.records) == len(parts) for writer in writers), "a planned part was not computed"


class _PartWriter:
    """Commits the parts of one artifact in order, each with the moments of all images up to its end.

    It begins with the parts that are committed already.
    """

    def __init__(self, parts: Sequence[range], prefix: str, context: StageContext) -> None:
        self.prefix, self.context = prefix, context
        committed = context.store.resume_parts(context.stage, context.key)
        records: list[dict[str, Any]] = []  # only parts without a gap before them: a part's moments include all earlier parts
        while len(records) < len(parts) and _part_name(len(records), prefix) in committed:
            records.append(committed[_part_name(len(records), prefix)])
        self.records, self.moments = _resume_moments(records, prefix, context)

    def write(self, part: int, blocks: Sequence[dict[str, Any]], number: int) -> None:
        """number: of the extractor."""
        if part != len(self.records):
            return  # it has the part; or the one before it failed, which is raised, and moments build on the one before
        outputs = [block["outputs"][number] for block in blocks]
        for first in range(0, len(outputs), _BLOCKS_PER_SUM):
            self._add([each.for_moments for each in outputs[first : first + _BLOCKS_PER_SUM] if each.for_moments])
        kept_names = dict.fromkeys(name for each in outputs for name in each.kept)
        kept = {name: np.concatenate([each.kept[name] for each in outputs if name in each.kept]) for name in kept_names}
        record = {
            "rows": sum(each.num_rows for each in outputs),
            "kept": sum(each.num_kept for each in outputs),
            "file": asdict(self._put(_part_name(part, self.prefix), lambda path: save_file(kept, path))) if kept else None,
            "moments": {
                name: asdict(self._put(f"{WORK}/{self.prefix}{name}-{part:05d}.safetensors", m.save))
                for name, m in self.moments.items()
            },
            "seconds": sum(block["seconds"][number] for block in blocks),
            **{name: sum(block[name] for block in blocks) for name in ("decoding_seconds", "loading_seconds")},
            "changes": blocks[0]["changes"][number] if "changes" in blocks[0] else {},
        }
        self.context.store.put_part(self.context.stage, self.context.key, _part_name(part, self.prefix), record)
        if len(self.records) > 1:  # a run resumes from the newest moments, a concurrent run from the ones before
            outdated = [FileRecord(**file) for file in self.records[-2]["moments"].values()]
            self.context.store.discard_files(self.context.stage, self.context.key, outdated)
        self.records.append(record)

    def _add(self, blocks: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Add consecutive blocks to the moments. All have the same outputs."""
        from enat.metrics.moments import FeatureMoments

        for name in blocks[0] if blocks else ():
            rows = np.concatenate([block[name] for block in blocks])
            self.moments.setdefault(name, FeatureMoments(rows.shape[1])).add(rows)

    def _put(self, name: str, write: Callable[[Path], object]) -> FileRecord:
        with tempfile.TemporaryDirectory(prefix=f"enat-{self.context.stage}-") as folder:
            path = Path(folder) / "file.safetensors"
            write(path)
            return self.context.store.put_file(self.context.stage, self.context.key, name, path)


def _resume_moments(
    records: list[dict[str, Any]], prefix: str, context: StageContext
) -> tuple[list[dict[str, Any]], dict[str, FeatureMoments]]:
    """The parts up to the newest one whose moments can be read, and these. Parts after it are discarded and computed again."""
    while records:
        try:
            return records, _load_moments(records[-1], context)
        except DamagedFileError as error:
            _log.warning("%s; its part is computed again", error.what)
            records = records[:-1]
            context.store.discard_part(context.stage, context.key, _part_name(len(records), prefix))
    return [], {}


def _load_moments(record: Mapping[str, Any], context: StageContext) -> dict[str, FeatureMoments]:
    from enat.metrics.moments import FeatureMoments

    return {
        name: FeatureMoments.load(context.store.fetch_file(context.stage, context.key, FileRecord(**file)))
        for name, file in record["moments"].items()
    }
