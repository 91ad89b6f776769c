"""A file over reads of ranges."""

from __future__ import annotations

from collections.abc import Callable

from fsspec.spec import AbstractBufferedFile

_READ_AHEAD = 4 << 20


class RangeFile(AbstractBufferedFile):  # type: ignore[misc]
    """A seekable file over reads of ranges, which reads ahead. read_range: bytes start..stop-1."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._fetch_range = read_range
        super().__init__(None, "", block_size=_READ_AHEAD, size=size)
