"""Files that others made (weights, text encoders): a local path, s3://bucket/key or hf://owner/name/path -> a path here.

What is fetched from a bucket is kept in the cache (cache.py) under its URI and version, so an unchanged file is fetched once.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipelines import cache, hub
from pipelines.artifacts import digest_of
from pipelines.s3 import S3Config, S3Folder
from pipelines.storage import LocalFolder, StorageError, StoredFile

_BY_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def local_file(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """key: of the config, for messages. Raises ValueError where there is no such file."""
    if _BY_DIGEST.fullmatch(reference):
        raise ValueError(f"{key} is {reference}, but the store has nothing made from it; import the file first: enat import --help")
    try:
        if reference.startswith("s3://"):
            parent, _, name = reference.rpartition("/")
            found = [file for file in S3Folder(parent, s3 or S3Config()).list(name) if file.name == name]
            if not found:
                raise StorageError(f"{reference} does not exist; correct the URI")
            return _downloaded(S3Folder(parent, s3 or S3Config()), found) / name
        return hub.fetch_file(reference)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def local_folder(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """The same for a folder. Of one in a bucket or on the hub only weights without pickle and text are fetched."""
    try:
        if reference.startswith("s3://"):
            folder = S3Folder(reference, s3 or S3Config())
            suffixes = tuple(pattern.removeprefix("*") for pattern in hub.WEIGHTS_AND_TEXT)
            found = [file for file in folder.list() if file.name.endswith(suffixes)]
            if not found:
                raise StorageError(f"{reference} has no files that end in {', '.join(suffixes)}")
            return _downloaded(folder, found)
        return hub.fetch_folder(reference)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def content_digest(reference: str, key: str, s3: S3Config | None = None) -> str:
    """sha256 of a file's content. "sha256:..." stands for a file that was imported and need not be here."""
    match = _BY_DIGEST.fullmatch(reference)
    if match:
        return match[1]
    path = local_file(reference, key, s3)
    return _digests(LocalFolder(path.parent), [path.name])[0]


def _downloaded(folder: S3Folder, files: list[StoredFile]) -> Path:
    """A local folder with these files, whole or not there at all."""
    versions = [[file.name, file.size, file.version] for file in files]

    def download(target: Path) -> None:
        for file in files:
            path = target / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.download(file.name, path)

    return cache.fetch_folder(digest_of([folder.uri, versions])[:32], sum(file.size for file in files), download)


def folder_digest(folder: Path) -> str:
    """Names the content of a folder from local_folder: the files that it would fetch, by name and sha256."""
    names = sorted({path.relative_to(folder).as_posix() for pattern in hub.WEIGHTS_AND_TEXT for path in folder.rglob(pattern)})
    return digest_of(list(zip(names, _digests(LocalFolder(folder), names), strict=True)))


def _digests(folder: LocalFolder, names: list[str]) -> list[str]:
    """sha256 of files, each hashed once for as long as it does not change."""
    return list(folder.fingerprints(folder.file(name) for name in names))
