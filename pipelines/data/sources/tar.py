"""Tar shards named as WebDataset does: `<key>.jpg` beside `<key>.cls`, which holds the class number in digits.

Scanning reads the headers and records where each image begins, so that single images can be read later.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pipelines.data.sources.base import MAX_LABEL, Entry, Findings, RangeSource, content_digest, is_image
from pipelines.storage.base import Folder, StorageError, StoredFile

_MAX_HEADER = 1 << 20  # bytes that one header may request; a hostile header could exhaust the memory
_MAX_LABEL_SIZE = 32


@dataclass
class _Sample:
    """The members of a shard with one key. image: (position, size)."""

    image: tuple[int, int] | None = None
    label: int | None = None


class TarSource(RangeSource):
    reads_to_scan = True

    def __init__(self, folder: Folder, file_name: str | None = None) -> None:
        """`file_name`: read only this shard."""
        super().__init__(folder)
        self._file_name = file_name

    def _shards(self) -> Iterator[StoredFile]:
        for file in self.folder.list():
            if self._file_name in (None, file.name) and file.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst")):
                if not file.name.endswith(".tar"):
                    raise ValueError(
                        f"{file.name} in {self.folder.uri} is compressed, so single images cannot be read from it; decompress it"
                    )
                yield file

    def known_classes(self) -> None:
        return None

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
                elif not member.isdir():  # for example a link, whose bytes are elsewhere
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
        stem, _, extension = name.partition(".")  # as in WebDataset, the key ends at the first dot of the name
        key = folder + slash + stem
        if stem and is_image(name):
            sample = samples.setdefault(key, _Sample())
            if sample.image is not None:
                raise ValueError(f"{unit} in {self.folder.uri} has several images with key {key}; keys must be unique")
            sample.image = (member.offset_data, member.size)
        elif stem and extension.lower() == "cls":
            file.seek(member.offset_data)
            text = file.read(min(member.size, _MAX_LABEL_SIZE)).decode("ascii", "replace").strip()
            if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > MAX_LABEL:
                raise ValueError(f"{member.name} of {unit} in {self.folder.uri} holds {text!r}, not a class number")
            sample = samples.setdefault(key, _Sample())
            if sample.label is not None:
                raise ValueError(f"{unit} in {self.folder.uri} has several labels with key {key}; keys must be unique")
            sample.label = int(text)
        else:
            findings.add("other files", f"{unit}: {member.name}")


def _members(file: BinaryIO, place: str) -> Iterator[tarfile.TarInfo]:
    """All members of a tar file. Raises ValueError if the file is damaged, truncated or hostile."""
    try:
        with tarfile.open(fileobj=_Limited(file), mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                if member.size < 0:  # would lead back to an earlier header and loop forever
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                member.name.encode()
                archive.members.clear()  # tarfile would keep them all
                yield member
            # tarfile takes a damaged header for the end of the file and silently drops the members after it.
            file.seek(archive.offset)
            end = file.read(_MAX_HEADER)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise tarfile.ReadError(f"damaged, truncated or followed by other data at byte {archive.offset}")
    except StorageError:
        raise
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {error.object!r} in {place} is not UTF-8; rename it") from error
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:  # bad headers raise all of these
        raise ValueError(f"{place} is not a complete tar file ({error}); create it again") from error


class _Limited:
    """A file that limits each read to the size of a header. tarfile seeks over the data between headers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._file.read(size)
