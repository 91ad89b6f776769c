"""Check that the files of artifacts still hold the bytes that their manifests list: every byte is read from the store, past caches.

Nothing is repaired. Every problem is named; the owner of an artifact removes it, and running again makes it again. Files that
cannot be read are named, too, and the rest is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.artifacts.manifest import DamagedManifestError, FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import MissingFileError, StorageError, in_parallel

_THREADS = 4  # sha256 lets other threads run; of a bucket each reads ahead by itself


@dataclass(frozen=True)
class Verdict:
    """problems: one sentence for each file that is wrong.   size: bytes that were to be read.   is_readable: everything could be
    read; a file that cannot be read may still be whole."""

    stage: str
    key: str
    num_files: int
    size: int
    problems: tuple[str, ...]
    is_readable: bool = True


@dataclass(frozen=True)
class _Problem:
    sentence: str
    is_readable: bool = True


def verify(
    store: ArtifactStore, found: Iterable[Manifest | DamagedManifestError], advance: Callable[[int], None] = lambda _: None
) -> Iterator[Verdict]:
    """Yield one verdict for each, in order. advance: called by several threads with the bytes that were read or need not be."""
    for each in found:
        if isinstance(each, DamagedManifestError):
            yield Verdict(each.stage, each.key, 0, 0, (str(each),), not isinstance(each.__cause__, OSError | StorageError))
            continue
        records = [*each.files, *each.records]
        checked = in_parallel(lambda record, each=each: _problem(store, each, record, advance), records, _THREADS)  # type: ignore[misc]
        problems = [problem for problem in checked if problem is not None]
        sentences = tuple(problem.sentence for problem in problems)
        is_readable = all(problem.is_readable for problem in problems)
        yield Verdict(each.stage, each.key, len(records), each.size, sentences, is_readable)


def _problem(store: ArtifactStore, manifest: Manifest, record: FileRecord, advance: Callable[[int], None]) -> _Problem | None:
    """What is wrong with a file. A file with a wrong digest is read twice: bytes can also flip on the way."""
    for attempt in range(2):
        try:
            size, sha256 = _read(store, manifest, record, advance if attempt == 0 else lambda _: None)
        except MissingFileError:
            advance(record.size)
            return _Problem(f"{record.path} is missing")
        except StorageError as error:  # of a disk or a bucket: other files may be whole
            cause = error.__cause__
            if isinstance(cause, IsADirectoryError):
                return _Problem(f"{record.path} is a folder")
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else error
            return _Problem(f"{record.path} cannot be read ({reason})", is_readable=False)
        if size != record.size:
            return _Problem(f"{record.path} has {size:,} bytes, but {record.size:,} were written")
        if sha256 == record.sha256:
            return None
    return _Problem(f"{record.path} holds other bytes (sha256 {sha256[:12]}, not {record.sha256[:12]})")


def _read(store: ArtifactStore, manifest: Manifest, record: FileRecord, advance: Callable[[int], None]) -> tuple[int, str]:
    """Size and sha256 of the stored file."""
    digest, size = hashlib.sha256(), 0
    for chunk in store.read_chunks(manifest.stage, manifest.key, record.path):
        digest.update(chunk)
        size += len(chunk)
        advance(len(chunk))
    return size, digest.hexdigest()
