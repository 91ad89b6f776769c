"""Whether the files of artifacts still hold the bytes that their manifests promise: every byte is read where it lies, past caches.

Nothing is repaired. What is wrong is named; the artifact is removed by whoever owns it and made again by running again. What cannot
be read is named, too, and the rest is looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.artifacts.inventory import size_of
from pipelines.artifacts.manifest import MANIFEST, DamagedManifestError, FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError

_THREADS = 4  # sha256 lets other threads run; of a bucket each reads ahead by itself
_MANIFEST_THREADS = 16  # small, and mostly waited for


@dataclass(frozen=True)
class Verdict:
    """problems: one sentence for each file that is not what it should be; none where all is well.   size: bytes that were to be
    read.   is_readable: all that is there could be read; what cannot be may still be whole."""

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


def read_manifests(store: ArtifactStore) -> Iterator[Manifest | DamagedManifestError]:
    """Of all artifacts of a store; of those that cannot be read the reason, in place of an end."""

    def read(name: tuple[str, str]) -> Manifest | DamagedManifestError | None:
        try:
            return store.read_manifest(*name)
        except DamagedManifestError as error:
            return error
        except StorageError as error:
            damaged = DamagedManifestError(f"{MANIFEST} cannot be read ({error})", *name)
            damaged.__cause__ = error
            return damaged

    with ThreadPoolExecutor(_MANIFEST_THREADS, thread_name_prefix="verify") as pool:
        yield from (found for found in pool.map(read, store.names()) if found is not None)


def verify(
    store: ArtifactStore, found: Iterable[Manifest | DamagedManifestError], advance: Callable[[int], None] = lambda _: None
) -> Iterator[Verdict]:
    """One verdict for each, in order. advance: is told of bytes that were read, or need not be, by several threads."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        for each in found:
            if isinstance(each, DamagedManifestError):
                yield Verdict(each.stage, each.key, 0, 0, (str(each),), not isinstance(each.__cause__, OSError | StorageError))
                continue
            records = [*each.files, *each.records]
            problems = pool.map(lambda record, each=each: _problem(store, each, record, advance), records)
            said = [problem for problem in problems if problem is not None]
            sentences, is_readable = tuple(problem.sentence for problem in said), all(problem.is_readable for problem in said)
            yield Verdict(each.stage, each.key, len(records), size_of(each), sentences, is_readable)


def _problem(store: ArtifactStore, manifest: Manifest, record: FileRecord, advance: Callable[[int], None]) -> _Problem | None:
    """What is wrong with a file. A wrong digest is looked at twice: bytes can also flip on the way."""
    for attempt in range(2):
        try:
            size, sha256 = _read(store, manifest, record, advance if attempt == 0 else lambda _: None)
        except FileNotFoundError:
            advance(record.size)
            return _Problem(f"{record.path} is missing")
        except IsADirectoryError:
            return _Problem(f"{record.path} is a folder")
        except (OSError, StorageError) as error:  # of a disk, or of the endpoint: other files may be whole
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            return _Problem(f"{record.path} cannot be read ({reason})", is_readable=False)
        if size != record.size:
            return _Problem(f"{record.path} has {size:,} bytes where {record.size:,} were written")
        if sha256 == record.sha256:
            return None
    return _Problem(f"{record.path} holds other bytes (sha256 {sha256[:12]}, not {record.sha256[:12]})")


def _read(store: ArtifactStore, manifest: Manifest, record: FileRecord, advance: Callable[[int], None]) -> tuple[int, str]:
    """Size and sha256 of what lies there."""
    digest, size = hashlib.sha256(), 0
    for chunk in store.read_chunks(manifest.stage, manifest.key, record.path):
        digest.update(chunk)
        size += len(chunk)
        advance(len(chunk))
    return size, digest.hexdigest()
