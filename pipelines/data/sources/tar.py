"""Tar shards in WebDataset's naming: `<key>.jpg` beside `<key>.cls`, which holds the class number in digits.

Scanning reads the headers and finds where each image's bytes begin, so that any image can be read later without its shard.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pipelines.data.sources.base import MAX_LABEL, Entry, Findings, RangeSource, content_digest, is_image
from pipelines.storage.base import Folder, StorageError, StoredFile

_MAX_HEADER = 1 << 20  # bytes that one header may ask for; a hostile one would take all memory
_MAX_LABEL_SIZE = 32


@dataclass
class _Sample:
    """What a shard holds under one key. image: (position, size)."""

    image: tuple[int, int] | None = None
    label: int | None = None


class TarSource(RangeSource):
    reads_to_scan = True

    def __init__(self, folder: Folder, file_name: str | None = None) -> None:
        """file_name: take this shard alone."""
        super().__init__(folder)
        self._file_name = file_name

    def _shards(self) -> Iterator[StoredFile]:
        for file in self.folder.list():
            if self._file_name in (None, file.name) and file.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst")):
                if not file.name.endswith(".tar"):
                    raise ValueError(
                        f"{file.name} in {self.folder.uri} is compressed, so its images cannot be read one by one; unpack it"
                    )
                yield file

    def fingerprint(self) -> str:
        return content_digest(self.folder, self._shards())

    def units(self) -> Sequence[str]:
        names = [file.name for file in self._shards()]
        if not names:
            raise ValueError(f"dataset.path {self.folder.uri} has no {self._file_name or '.tar files'}")
        return names

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        samples: dict[str, _Sample] = {}
        with self.folder.open(unit) as file:
            for member in _members(file, f"{unit} in {self.folder.uri}"):
                if member.isfile():
                    self._add(member, file, unit, samples, findings)
                elif not member.isdir():  # a link, say, whose bytes stand elsewhere
                    findings.add("other files", f"{unit}: {member.name}")
        for key, sample in samples.items():
            if sample.image is None:
                findings.add("labels without an image", f"{unit}: {key}")
                continue
            if sample.label is None:
                findings.add("images without a label", key)
            yield Entry(key, unit, *sample.image, -1 if sample.label is None else sample.label)

    def _add(self, member: tarfile.TarInfo, file: BinaryIO, unit: str, samples: dict[str, _Sample], findings: Findings) -> None:
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")  # WebDataset: the key ends at the first dot of the name
        key = folder + slash + stem
        if stem and is_image(name):
            sample = samples.setdefault(key, _Sample())
            if sample.image is not None:
                raise ValueError(f"{unit} in {self.folder.uri} has several images called {key}; keys must be unique")
            sample.image = (member.offset_data, member.size)
        elif stem and extension.lower() == "cls":
            file.seek(member.offset_data)
            text = file.read(min(member.size, _MAX_LABEL_SIZE)).decode("ascii", "replace").strip()
            if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > MAX_LABEL:
                raise ValueError(f"{member.name} of {unit} in {self.folder.uri} holds {text!r}, not a class number")
            sample = samples.setdefault(key, _Sample())
            if sample.label is not None:
                raise ValueError(f"{unit} in {self.folder.uri} has several labels called {key}; keys must be unique")
            sample.label = int(text)
        else:
            findings.add("other files", f"{unit}: {member.name}")


def _members(file: BinaryIO, place: str) -> Iterator[tarfile.TarInfo]:
    """What a tar file holds, to its end. Raises ValueError, naming the place, where it is damaged, cut off or hostile."""
    try:
        with tarfile.open(fileobj=_Limited(file), mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0:  # would lead back to an earlier header, for ever
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                member.name.encode()
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                yield member
            # To tarfile a damaged header is an end like any other, and what stands behind it is lost without a word.
            file.seek(archive.offset)
            end = file.read(_MAX_HEADER)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise tarfile.ReadError(f"it is damaged, cut off or goes on behind its end, at byte {archive.offset}")
    except StorageError:
        raise
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {error.object!r} in {place} is not UTF-8; rename it") from error
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:  # all these come of bad headers
        raise ValueError(f"{place} is no whole tar file ({error}); make it again") from error


class _Limited(io.BufferedIOBase):
    """A file that reads no more at once than a header needs: what is between headers is skipped, not read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._file.read(size)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
