"""Whether the files of artifacts still hold the bytes that their manifests promise: every byte is read where it lies, past caches.

Nothing is repaired. What is wrong is named; the artifact is removed by whoever owns it and made again by running again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.artifacts import ArtifactStore, DamagedManifestError, FileRecord, Manifest
from pipelines.inventory import size_of

_THREADS = 4  # sha256 lets other threads run; of a bucket each reads ahead by itself


@dataclass(frozen=True)
class Verdict:
    """problems: one sentence for each file that is not what it should be; none where all is well.   size: bytes that were to be
    read."""

    stage: str
    key: str
    num_files: int
    size: int
    problems: tuple[str, ...]


def verify(
    store: ArtifactStore, found: Iterable[Manifest | DamagedManifestError], advance: Callable[[int], None] = lambda _: None
) -> Iterator[Verdict]:
    """One verdict for each, in order. advance: is told of bytes that were read, or need not be, by several threads."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        for each in found:
            if isinstance(each, DamagedManifestError):
                yield Verdict(each.stage, each.key, 0, 0, (str(each),))
                continue
            records = [*each.files, *each.records]
            problems = pool.map(lambda record, each=each: _problem(store, each, record, advance), records)
            said = tuple(problem for problem in problems if problem is not None)
            yield Verdict(each.stage, each.key, len(records), size_of(each), said)


def _problem(store: ArtifactStore, manifest: Manifest, record: FileRecord, advance: Callable[[int], None]) -> str | None:
    """What is wrong with a file. A wrong digest is looked at twice: bytes can also flip on the way."""
    for attempt in range(2):
        try:
            size, sha256 = _read(store, manifest, record, advance if attempt == 0 else lambda _: None)
        except FileNotFoundError:
            advance(record.size)
            return f"{record.path} is missing"
        except IsADirectoryError:
            return f"{record.path} is a folder"
        if size != record.size:
            return f"{record.path} has {size:,} bytes where {record.size:,} were written"
        if sha256 == record.sha256:
            return None
    return f"{record.path} holds other bytes (sha256 {sha256[:12]}, not {record.sha256[:12]})"


def _read(store: ArtifactStore, manifest: Manifest, record: FileRecord, advance: Callable[[int], None]) -> tuple[int, str]:
    """Size and sha256 of what lies there."""
    digest, size = hashlib.sha256(), 0
    for chunk in store.read_chunks(manifest.stage, manifest.key, record.path):
        digest.update(chunk)
        size += len(chunk)
        advance(len(chunk))
    return size, digest.hexdigest()
