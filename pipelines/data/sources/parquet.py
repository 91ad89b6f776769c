"""Parquet files in the layout of dataset hubs: column `image` (a struct of bytes and path, or bytes), and label and caption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sources.base import MAX_LABEL, Entry, Findings, Source, content_digest, row_key
from pipelines.data.sources.names import select
from pipelines.storage.base import Folder, StorageError, StoredFile

_CAPTION_COLUMNS = ("caption", "captions", "text")
_ROWS_SCANNED_AT_ONCE = 1 << 14
_ROWS_READ_AT_ONCE = 16


class ParquetSource(Source):
    reads_to_scan = True
    keys_may_repeat = True  # paths inside of files

    def __init__(
        self,
        folder: Folder,
        pattern: str | None = None,
        split: str | None = None,
        label_column: str = "label",
        caption_column: str | None = None,
    ) -> None:
        """`pattern`, `split`: read only these files (names.py)."""
        self.folder, self._pattern, self._split = folder, pattern, split
        self._label, self._caption = label_column, caption_column

    def _files(self) -> list[StoredFile]:
        return select(self.folder, (".parquet",), self._pattern, self._split)

    def fingerprint(self) -> str:
        return content_digest(self.folder, self._files())

    def units(self) -> Sequence[str]:
        return [file.name for file in self._files()]

    def known_classes(self) -> Sequence[str] | None:
        """Class names from the schema metadata of Hugging Face's datasets library, if present."""
        with self._open(self.units()[0]) as file:
            metadata = file.schema_arrow.metadata or {}
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][self._label]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return tuple(map(str, names)) if isinstance(names, list) else None

    def integer_columns(self) -> list[str]:
        """Of the first file: columns that may hold labels."""
        with self._open(self.units()[0]) as file:
            return [field.name for field in file.schema_arrow if pa.types.is_integer(field.type)]

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        findings.check_comparison(self.folder, unit)
        with self._open(unit) as file:
            has_paths = pa.types.is_struct(_image_type(file, unit)) and _image_type(file, unit).get_field_index("path") >= 0
            label, caption = self._label_column(file, unit, findings), self._caption_column(file, unit)
            columns = [name for name in ("image.path" if has_paths else None, label, caption) if name is not None]
            row = 0
            for batch in file.iter_batches(_ROWS_SCANNED_AT_ONCE, columns=columns):
                nothing = [None] * len(batch)
                paths = batch["image"].field("path").to_pylist() if has_paths else nothing
                labels = nothing if label is None else batch[label].to_pylist()
                captions = nothing if caption is None else batch[caption].to_pylist()
                for path, number, texts in zip(paths, labels, captions, strict=True):
                    key = path or row_key(unit, row)
                    if number is not None and number > MAX_LABEL:
                        raise ValueError(f"row {row} of {unit} in {self.folder.uri} has label {number}, more than {MAX_LABEL:,}")
                    if number is None or number < 0:
                        findings.add("images without a label", key)
                    own = _captions(texts)
                    if caption is not None and not own:
                        findings.add("images without captions", key)
                    yield Entry(key, unit, row, 0, -1 if number is None else max(int(number), -1), own)
                    row += 1

    def _label_column(self, file: pq.ParquetFile, unit: str, findings: Findings) -> str | None:
        """The name of the column, or None if the file does not have it, which is a finding."""
        columns = ", ".join(file.schema_arrow.names)
        if self._label not in file.schema_arrow.names:
            if self._label != "label":
                raise ValueError(f"dataset.label_column is {self._label}, but the columns of {unit} are {columns}")
            findings.add("files without a column label", f"{unit}: its columns are {columns}")
            return None
        kind = file.schema_arrow.field(self._label).type
        if not pa.types.is_integer(kind):
            raise ValueError(f"column {self._label} of {unit} is {kind}, not an integer")
        return self._label

    def _caption_column(self, file: pq.ParquetFile, unit: str) -> str | None:
        columns, wanted = file.schema_arrow.names, self._caption
        if wanted is None:  # a column that happens to be called so is not refused
            return next((name for name in _CAPTION_COLUMNS if name in columns and _is_text(file, name)), None)
        if wanted not in columns or not _is_text(file, wanted):
            what = f"the columns of {unit} are {', '.join(columns)}"
            if wanted in columns:
                what = f"it holds {file.schema_arrow.field(wanted).type} in {unit}, not a text or a list of texts"
            raise ValueError(f"dataset.caption_column is {wanted}, but {what}")
        return wanted

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


def _is_text(file: pq.ParquetFile, column: str) -> bool:
    kind = file.schema_arrow.field(column).type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def _captions(value: Any) -> tuple[str, ...]:
    """Of a row, with single spaces."""
    texts = [value] if isinstance(value, str) else value or ()
    return tuple(text for text in (" ".join((each or "").split()) for each in texts) if text)


def _image_type(file: pq.ParquetFile, unit: str) -> pa.DataType:
    """The type of column image. Raises ValueError if the column does not hold bytes."""
    index = file.schema_arrow.get_field_index("image")
    kind = file.schema_arrow.field(index).type if index >= 0 else None
    inner = kind.field("bytes").type if kind and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if inner is None or not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        columns = ", ".join(file.schema_arrow.names)
        raise ValueError(f"{unit} has no column `image` of bytes or of structs with bytes and path; its columns are {columns}")
    return kind
