"""A dataset read through its index.

The index has one row per image. Its order is the order of token maps, references and shards. It is a Parquet file of the stage
`dataset` with the columns key, file, position, size, label, captions, and first_caption: the number of the row's first caption
among all captions of the dataset. Workers read only the rows that they need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from enat.images import ImageError, center_crop, decode_image, to_array
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.sources.base import Entry, Source, row_key
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.workflow.summary import Summary

INDEX = "index.parquet"
_ROWS_PER_GROUP = 4096
_NAMED_AT_MOST = 5
MAX_FILE_BYTES = 1 << 28  # of one image; larger files are not read
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("first_caption", pa.int64()),
        ("captions", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class ImageRow:
    """One image of a dataset, undecoded. `first_caption`: number of captions[0] among all captions of the dataset."""

    key: str
    data: bytes
    label: int
    captions: tuple[str, ...] = ()
    first_caption: int = 0
    size: int = 0

    def pixels(self, resolution: int) -> np.ndarray:
        """The ADM centre crop, uint8 (3, H, W). Raises ImageError."""
        size = max(self.size, len(self.data))  # the index does not know the size of an image in a Parquet file
        if size > MAX_FILE_BYTES:
            raise ImageError(f"the file has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        return to_array(center_crop(decode_image(self.data), resolution))


@dataclass(frozen=True, kw_only=True)
class DatasetSummary(Summary):
    """What the index of a dataset holds. class_names: by label.   findings: how many images are odd, by what is odd about them."""

    name: str
    num_images: int
    class_names: tuple[str, ...]
    num_captions: int = 0
    findings: Mapping[str, int] = field(default_factory=dict)

    @property
    def dataset_name(self) -> str:
        return self.name


@dataclass(frozen=True)
class Dataset:
    """The dataset indexed by an artifact of stage `dataset`, read from the place in its config. Can be pickled for workers."""

    config: DatasetConfig
    store: ArtifactStore
    manifest: Manifest

    @cached_property
    def summary(self) -> DatasetSummary:
        return DatasetSummary.read(self.manifest)

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def num_images(self) -> int:
        return self.summary.num_images

    @property
    def num_captions(self) -> int:
        return self.summary.num_captions

    @property
    def class_names(self) -> Sequence[str]:
        return self.summary.class_names

    def index(self, start: int, stop: int) -> pa.Table:
        """Rows start..stop-1 of the index."""
        file = _open_index(self.store.fetch(self.manifest, INDEX))
        stop = min(stop, file.metadata.num_rows)
        groups = range(start // _ROWS_PER_GROUP, -(-stop // _ROWS_PER_GROUP))
        if start >= stop:
            return _SCHEMA.empty_table()
        return file.read_row_groups(list(groups)).slice(start - groups[0] * _ROWS_PER_GROUP, stop - start)

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Rows start..stop-1 with the bytes of their images. Images larger than MAX_FILE_BYTES have no bytes."""
        rows = self.index(start, stop).to_pylist()
        readable = [row for row in rows if row["size"] <= MAX_FILE_BYTES]
        entries = [Entry(row["key"], row["file"], row["position"], row["size"]) for row in readable]
        contents = _opened(self.config).read(entries)
        for row in rows:
            content = next(contents) if row["size"] <= MAX_FILE_BYTES else b""
            yield ImageRow(row["key"], content, row["label"], tuple(row["captions"]), row["first_caption"], row["size"])

    def decode(self, resolution: int, start: int, stop: int) -> Iterator[tuple[ImageRow, np.ndarray | ImageError]]:
        """The same with the pixels of each image, or the reason why it cannot be decoded although it was read again."""
        for number, row in enumerate(self.read(start, stop), start):
            try:
                yield row, row.pixels(resolution)
            except ImageError:
                (again,) = self.read(number, number + 1)
                try:
                    yield again, again.pixels(resolution)
                except ImageError as error:
                    yield again, error

    def load_images(self, resolution: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Load and crop the readable images of rows start..stop-1: uint8 (R, 3, H, W), labels int64 (R,).

        Unreadable images are skipped; the token map's quarantine lists them.
        """
        arrays, labels = [], []
        for row, pixels in self.decode(resolution, start, stop):
            if not isinstance(pixels, ImageError):
                arrays.append(pixels)
                labels.append(row.label)
        return np.stack(arrays) if arrays else np.empty((0, 3, resolution, resolution), np.uint8), np.array(labels, np.int64)


@dataclass(frozen=True)
class IndexSummary:
    """renamed: keys that several rows of files had, which are now known by file and row."""

    num_images: int
    num_captions: int
    images_per_label: dict[int, int]
    renamed: tuple[str, ...] = ()


def write_index(path: Path, entries: Iterable[Entry], *, keys_may_repeat: bool = False) -> IndexSummary:
    """Write the index of a dataset, a row group at a time. Raises ValueError if keys are not unique.

    keys_may_repeat: rows of files whose key is not unique get the key of file and row.
    """
    remaining = iter(entries)
    num_images, num_captions, per_label = 0, 0, dict[int, int]()
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        while some := list(islice(remaining, _ROWS_PER_GROUP)):
            columns: dict[str, list[Any]] = {
                name: [getattr(e, name) for e in some] for name in _SCHEMA.names if name != "first_caption"
            }
            counts = [len(entry.captions) for entry in some]
            columns["first_caption"] = [num_captions + before for before in np.cumsum([0, *counts[:-1]]).tolist()]
            writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=_ROWS_PER_GROUP)
            num_images, num_captions = num_images + len(some), num_captions + sum(counts)
            for entry in some:
                per_label[entry.label] = per_label.get(entry.label, 0) + 1
    renamed = _rename_repeated(path) if keys_may_repeat else []
    _check_unique(path)
    return IndexSummary(num_images, num_captions, per_label, tuple(renamed))


def _repeated_keys(index: Path) -> list[str]:
    """Keys that occur more than once, sorted."""
    keys = pq.read_table(index, columns=["key"])
    counts = keys.group_by("key").aggregate([([], "count_all")])
    return sorted(counts.filter(pc.greater(counts["count_all"], 1))["key"].to_pylist())


def _rename_repeated(index: Path) -> list[str]:
    """Returns the keys that were repeated."""
    if repeated := _repeated_keys(index):
        table, names = pq.read_table(index), set(repeated)
        rows = zip(*(table[name].to_pylist() for name in ("key", "file", "position")), strict=True)
        keys = [row_key(file, position) if key in names else key for key, file, position in rows]
        table = table.set_column(0, _SCHEMA.field("key"), pa.array(keys, pa.string()))
        pq.write_table(table, index, row_group_size=_ROWS_PER_GROUP, compression="zstd", write_page_checksum=True)
    return repeated


def _check_unique(index: Path) -> None:
    """Raise ValueError if a key occurs more than once, naming some of these keys and files."""
    if not (repeated := _repeated_keys(index)):
        return
    named = repeated[:_NAMED_AT_MOST]
    places = pq.read_table(index, columns=["key", "file"], filters=[("key", "in", named)]).to_pylist()
    found = "; ".join(f"{key} in {_listed([place['file'] for place in places if place['key'] == key])}" for key in named)
    more = f" and {len(repeated) - len(named):,} more" if len(repeated) > len(named) else ""
    raise ValueError(f"{len(repeated):,} keys of the dataset are not unique: {found}{more}. Rename or remove the repeated images")


def _listed(files: list[str]) -> str:
    rest = len(files) - _NAMED_AT_MOST
    return " and ".join(files[:_NAMED_AT_MOST]) + (f" and {rest:,} more" if rest > 0 else "")


@lru_cache(maxsize=4)  # workers read one block after the other
def _opened(config: DatasetConfig) -> Source:
    return open_source(config)


@lru_cache(maxsize=4)
def _open_index(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True)
