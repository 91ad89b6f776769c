"""Parquet files in the layout of dataset hubs: column `image` (a struct of bytes and path, or bytes) and column `label`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sources.base import MAX_LABEL, Entry, Findings, Source, content_digest
from pipelines.storage.base import Folder, StorageError, StoredFile

_ROWS_SCANNED_AT_ONCE = 1 << 14
_ROWS_READ_AT_ONCE = 16


class ParquetSource(Source):
    reads_to_scan = True

    def __init__(self, folder: Folder, file_name: str | None = None) -> None:
        """`file_name`: read only this file."""
        self.folder, self._file_name = folder, file_name

    def _files(self) -> Iterator[StoredFile]:
        return (f for f in self.folder.list() if self._file_name in (None, f.name) and f.name.endswith(".parquet"))

    def fingerprint(self) -> str:
        return content_digest(self.folder, self._files())

    def units(self) -> Sequence[str]:
        names = [file.name for file in self._files()]
        if not names:
            raise ValueError(f"dataset.path {self.folder.uri} has no {self._file_name or '.parquet files'}")
        return names

    def known_classes(self) -> Sequence[str] | None:
        """Class names from the schema metadata of Hugging Face's datasets library, if present."""
        with self._open(self.units()[0]) as file:
            metadata = file.schema_arrow.metadata or {}
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return tuple(map(str, names)) if isinstance(names, list) else None

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        with self._open(unit) as file:
            columns = []
            if pa.types.is_struct(_image_type(file, unit)) and _image_type(file, unit).get_field_index("path") >= 0:
                columns.append("image.path")
            if "label" in file.schema_arrow.names:
                if not pa.types.is_integer(file.schema_arrow.field("label").type):
                    raise ValueError(f"column label of {unit} is {file.schema_arrow.field('label').type}, not an integer")
                columns.append("label")
            row = 0
            for batch in file.iter_batches(_ROWS_SCANNED_AT_ONCE, columns=columns):
                paths = batch["image"].field("path").to_pylist() if "image.path" in columns else [None] * len(batch)
                labels = batch["label"].to_pylist() if "label" in columns else [None] * len(batch)
                for path, label in zip(paths, labels, strict=True):
                    key = path or f"{unit}/{row:08d}"
                    if label is not None and label > MAX_LABEL:
                        raise ValueError(f"row {row} of {unit} in {self.folder.uri} has label {label}, more than {MAX_LABEL:,}")
                    if "label" in columns and (label is None or label < 0):
                        findings.add("images without a label", key)
                    yield Entry(key, unit, row, 0, -1 if label is None else max(int(label), -1))
                    row += 1

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        for unit, group in groupby(entries, key=lambda entry: entry.file):
            yield from self._read_rows(unit, [entry.position for entry in group])

    def _read_rows(self, unit: str, rows: Sequence[int]) -> Iterator[bytes]:
        """Bytes of rows, given in ascending order. Reads only their row groups, a few rows at a time."""
        with self._open(unit) as file:
            is_struct = pa.types.is_struct(_image_type(file, unit))
            ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)], dtype=np.int64)
            if rows[-1] >= file.metadata.num_rows:
                raise StorageError(f"{unit} in {self.folder.uri} has no row {rows[-1]}; the file has changed since it was scanned")
            wanted = iter(rows)
            row = next(wanted, None)
            for group in np.unique(np.searchsorted(ends, rows, side="right")).tolist():
                position = int(ends[group - 1]) if group else 0
                for batch in file.iter_batches(_ROWS_READ_AT_ONCE, [group], ["image.bytes" if is_struct else "image"]):
                    images = batch["image"].field("bytes") if is_struct else batch["image"]
                    while row is not None and row < position + len(images):
                        yield images[row - position].as_py() or b""
                        row = next(wanted, None)
                    position += len(images)

    @contextmanager
    def _open(self, unit: str) -> Iterator[pq.ParquetFile]:
        try:
            with self.folder.open(unit) as raw, pq.ParquetFile(raw) as file:
                yield file
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:  # Arrow raises OSError for damaged pages
            reason = str(error).partition("\n")[0]
            raise StorageError(f"{unit} in {self.folder.uri} is not a readable Parquet file ({reason})") from error


def _image_type(file: pq.ParquetFile, unit: str) -> pa.DataType:
    """The type of column image. Raises ValueError if the column does not hold bytes."""
    index = file.schema_arrow.get_field_index("image")
    kind = file.schema_arrow.field(index).type if index >= 0 else None
    inner = kind.field("bytes").type if kind and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if inner is None or not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        columns = ", ".join(file.schema_arrow.names)
        raise ValueError(f"{unit} has no column `image` of bytes or of structs with bytes and path; its columns are {columns}")
    return kind
