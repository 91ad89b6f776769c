"""Copy artifacts from one store into another, or into plain files. Every byte is checked on the way.

A transfer that is repeated resumes where it stopped: files that exist with the same bytes are not fetched. In a store, the manifest
is written last and inputs come before what was made from them, so an artifact that exists there is whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.artifacts.lineage import Lineage, read_lineage
from pipelines.artifacts.manifest import MANIFEST, FileRecord, Manifest, inputs_of, name_of, paths_of, short
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage import atomic
from pipelines.storage.base import MissingFileError, StorageError, file_digest, in_parallel

_THREADS = 4  # files at once


@dataclass(frozen=True)
class Transferred:
    """An artifact in the target. was_there: it existed before.   num_fetched, size_fetched: files that had to be fetched, bytes."""

    manifest: Manifest
    was_there: bool
    num_fetched: int = 0
    size_fetched: int = 0


def with_inputs(store: ArtifactStore, manifest: Manifest) -> list[Manifest]:
    """An artifact and everything that it was made from, oldest first. Raises StorageError if some of it is gone."""
    found = read_lineage(store, manifest)
    whole = {name: each for name, each in found.items() if isinstance(each, Manifest)}
    for name, each in found.items():
        if name not in whole:
            maker = next(maker for maker, made in whole.items() if name in inputs_of(made))
            reason = "is gone" if each is None else "is damaged"
            raise StorageError(f"{short(name)}, which {short(maker)} was made from, {reason} in the store {store.uri}")
    return [whole[name] for name in Lineage(whole.values()).oldest_first(whole)]


def pull(
    source: ArtifactStore,
    target: ArtifactStore,
    manifests: Sequence[Manifest],
    advance: Callable[[int], None] = lambda _: None,
) -> list[Transferred]:
    """Copy artifacts, in this order. advance: called with the size of each file that the target has now.

    Raises StorageError before anything is copied if the target has an artifact of the same key with other content.
    """
    committed = [target.read_manifest(manifest.stage, manifest.key) for manifest in manifests]
    for manifest, present in zip(manifests, committed, strict=True):
        if present is not None and present.digest != manifest.digest:
            raise StorageError(f"{target.uri} already has {short(name_of(manifest))} with other content; pull into another store")
    answers = []
    for manifest, present in zip(manifests, committed, strict=True):
        if present is None:
            answers.append(_pull_one(source, target, manifest, advance))
        else:
            advance(manifest.size)
            answers.append(Transferred(present, was_there=True))
    return answers


def _pull_one(source: ArtifactStore, target: ArtifactStore, manifest: Manifest, advance: Callable[[int], None]) -> Transferred:
    stage, key = name_of(manifest)
    target.record_use(stage, key, inputs_of(manifest))

    def copy(record: FileRecord) -> tuple[FileRecord, bool]:
        existing = _existing_record(target, stage, key, record)
        copied = existing or target.put_file(stage, key, record.name, source.fetch_file(stage, key, record))
        advance(record.size)
        return copied, existing is None

    files, records = ([*in_parallel(copy, some, _THREADS)] for some in (manifest.files, manifest.records))
    own = replace(manifest, files=tuple(record for record, _ in files), records=tuple(record for record, _ in records))
    assert own.digest == manifest.digest  # else fetch_file would have refused a file
    fetched = [record for record, is_fetched in (*files, *records) if is_fetched]
    return Transferred(target.commit(own), False, len(fetched), sum(record.size for record in fetched))


def _existing_record(store: ArtifactStore, stage: str, key: str, record: FileRecord) -> FileRecord | None:
    """The record of a file that an earlier, interrupted transfer left in a store."""
    for path in paths_of(record.name, record.sha256):
        digest = hashlib.sha256()
        with suppress(MissingFileError):
            for chunk in store.read_chunks(stage, key, path):
                digest.update(chunk)
            if digest.hexdigest() == record.sha256:
                return replace(record, path=path)
    return None


def write_files(
    source: ArtifactStore, manifest: Manifest, folder: Path, advance: Callable[[int], None] = lambda _: None
) -> Transferred:
    """Write the files of an artifact under their names, and its manifest last.

    Raises ValueError before anything is written if other files have these names.
    """
    records = [*manifest.files, *manifest.records]
    wanted = manifest.to_json()
    missing = [record for record in records if not _has(folder / record.name, record.size, record.sha256)]
    in_the_way = [record.name for record in missing if os.path.lexists(folder / record.name)]
    if os.path.lexists(folder / MANIFEST) and (folder / MANIFEST).read_bytes() != wanted:
        in_the_way.append(MANIFEST)
    if in_the_way:
        raise ValueError(f"{folder / in_the_way[0]} already exists with other content; name an empty folder")
    advance(sum(record.size for record in records) - sum(record.size for record in missing))
    for record in missing:
        content = source.fetch_file(manifest.stage, manifest.key, record)
        atomic.replace(folder / record.name, atomic.chunks_of(content))
        if not _has(folder / record.name, record.size, record.sha256):
            raise StorageError(f"{folder / record.name} does not hold what was written to it; check the disk")
        advance(record.size)
    if not (folder / MANIFEST).exists():
        atomic.replace(folder / MANIFEST, [wanted])
    return Transferred(manifest, not missing, len(missing), sum(record.size for record in missing))


def _has(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and file_digest(path) == sha256
