"""Tar shards named as WebDataset does: `<key>.jpg` beside `<key>.cls`, which holds the class number in digits.

Captions are in `<key>.txt`, or in `<key>.json` as img2dataset writes it (key "caption"). Scanning reads the headers and records
where each image begins, so that single images can be read later.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from pipelines.data.sources.base import MAX_LABEL, Entry, Findings, RangeSource, content_digest
from pipelines.data.sources.names import FOREIGN, IMAGE_SUFFIXES, is_foreign, is_image, select
from pipelines.storage.base import Folder, StorageError, StoredFile

_MAX_HEADER = 1 << 20  # bytes that one header may request; a hostile header could exhaust the memory
_MAX_LABEL_SIZE = 32
_MAX_CAPTION_SIZE = 1 << 20  # bytes of a .txt or .json
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass
class _Sample:
    """The members of a shard with one key. image: (position, size).

    others: images with more in their names, such as a mask <key>.seg.png. The only one of a sample without <key>.png is its image.
    """

    image: tuple[int, int] | None = None
    others: dict[str, tuple[int, int]] = field(default_factory=dict)
    label: int | None = None
    captions: dict[str, str] = field(default_factory=dict)

    def complete(self, key: str, place: str) -> None:
        """Raises ValueError if it is not known which image is meant."""
        if self.image is None and len(self.others) > 1:
            raise ValueError(f"{place} has several images with key {key} ({', '.join(self.others)}); keys must be unique")
        if self.image is None and self.others:
            self.image = self.others.popitem()[1]

    @property
    def caption(self) -> tuple[str, ...]:
        """Of the .txt, else of the .json."""
        found = self.captions.get("txt") or self.captions.get("json")
        return (found,) if found else ()


class TarSource(RangeSource):
    reads_to_scan = True

    def __init__(self, folder: Folder, pattern: str | None = None, split: str | None = None) -> None:
        """`pattern`, `split`: read only these shards (names.py)."""
        super().__init__(folder)
        self._pattern, self._split = pattern, split

    def _shards(self) -> list[StoredFile]:
        shards = select(self.folder, SUFFIXES, self._pattern, self._split)
        for file in shards:
            if not file.name.endswith(".tar"):
                raise ValueError(
                    f"{file.name} in {self.folder.uri} is compressed, so single images cannot be read from it; decompress it"
                )
        return shards

    def known_classes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return content_digest(self.folder, self._shards())

    def units(self) -> Sequence[str]:
        return [file.name for file in self._shards()]

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        findings.check_comparison(self.folder, unit)
        samples: dict[str, _Sample] = {}
        with self.folder.open(unit) as file:
            for member in _members(file, f"{unit} in {self.folder.uri}"):
                if member.isfile():
                    self._add(member, file, unit, samples, findings)
                elif not member.isdir():  # for example a link, whose bytes are elsewhere
                    findings.add("other files", f"{unit}: {member.name}")
        has_captions = any(sample.caption for sample in samples.values())
        for key, sample in samples.items():
            sample.complete(key, f"{unit} in {self.folder.uri}")
            for name in sample.others:
                findings.add("other files", f"{unit}: {name}")
            if sample.image is None:
                findings.add("labels without an image", f"{unit}: {key}")
                continue
            if sample.label is None:
                findings.add("images without a label", key)
            if has_captions and not sample.caption:
                findings.add("images without captions", key)
            yield Entry(key, unit, *sample.image, -1 if sample.label is None else sample.label, sample.caption)

    def _add(self, member: tarfile.TarInfo, file: BinaryIO, unit: str, samples: dict[str, _Sample], findings: Findings) -> None:
        path = member.name.removeprefix("./")
        folder, slash, name = path.rpartition("/")
        stem, _, extension = name.partition(".")  # as in WebDataset, the key ends at the first dot of the name
        key, extension = folder + slash + stem, extension.lower()
        if is_foreign(path):
            findings.add(FOREIGN, f"{unit}: {member.name}")
        elif is_image(name):
            sample = samples.setdefault(key, _Sample())
            if f".{extension}" not in IMAGE_SUFFIXES:
                sample.others[member.name] = (member.offset_data, member.size)
                return
            if sample.image is not None:
                raise ValueError(f"{unit} in {self.folder.uri} has several images with key {key}; keys must be unique")
            sample.image = (member.offset_data, member.size)
        elif extension == "cls":
            file.seek(member.offset_data)
            text = file.read(min(member.size, _MAX_LABEL_SIZE)).decode("ascii", "replace").strip()
            if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > MAX_LABEL:
                raise ValueError(f"{member.name} of {unit} in {self.folder.uri} holds {text!r}, not a class number")
            sample = samples.setdefault(key, _Sample())
            if sample.label is not None:
                raise ValueError(f"{unit} in {self.folder.uri} has several labels with key {key}; keys must be unique")
            sample.label = int(text)
        elif (caption := _caption(member, extension, file)) is not None:
            samples.setdefault(key, _Sample()).captions[extension] = caption
        else:
            findings.add("other files", f"{unit}: {member.name}")


def _caption(member: tarfile.TarInfo, extension: str, file: BinaryIO) -> str | None:
    """The caption in a member, with single spaces; None if it has none."""
    if extension not in ("txt", "json") or member.size > _MAX_CAPTION_SIZE:
        return None
    file.seek(member.offset_data)
    content = file.read(member.size)
    try:
        text = content.decode() if extension == "txt" else json.loads(content)["caption"]
        return " ".join(text.split()) or None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None


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
