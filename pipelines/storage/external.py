"""Files that others made (weights, text encoders): a local path, s3://bucket/key or hf://owner/name/path -> a path here.

What is fetched from a bucket is kept in the cache (cache.py) under its URI and version, so an unchanged file is fetched once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.storage import cache
from pipelines.storage.base import StorageError, StoredFile, digest_of
from pipelines.storage.local import LocalFolder
from pipelines.storage.s3 import S3Folder
from pipelines.storage.s3_client import S3Config

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
        return fetch_file(reference)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def local_folder(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """The same for a folder. Of one in a bucket or on the hub only weights without pickle and text are fetched."""
    try:
        if reference.startswith("s3://"):
            folder = S3Folder(reference, s3 or S3Config())
            suffixes = tuple(pattern.removeprefix("*") for pattern in WEIGHTS_AND_TEXT)
            found = [file for file in folder.list() if file.name.endswith(suffixes)]
            if not found:
                raise StorageError(f"{reference} has no files that end in {', '.join(suffixes)}")
            return _downloaded(folder, found)
        return fetch_folder(reference)
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
    names = sorted({path.relative_to(folder).as_posix() for pattern in WEIGHTS_AND_TEXT for path in folder.rglob(pattern)})
    return digest_of(list(zip(names, _digests(LocalFolder(folder), names), strict=True)))


def _digests(folder: LocalFolder, names: list[str]) -> list[str]:
    """sha256 of files, each hashed once for as long as it does not change."""
    return list(folder.fingerprints(folder.file(name) for name in names))


SCHEME = "hf://"
# Pickles are not among them: what is not fetched cannot be opened by mistake.
WEIGHTS_AND_TEXT = ("*.safetensors", "*.json", "*.txt")
_LIKE_A_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REFERENCE = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True)
class HubReference:
    """repository: owner/name.   path: of a file in it, None for all of it.   revision: None for the repository's main branch."""

    repository: str
    path: str | None
    revision: str | None


def parse_reference(reference: str) -> HubReference:
    """Raises ValueError where reference has another form."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference} is no place on the hub; write hf://owner/name[/path][@revision]")
    return HubReference(match["repository"], match["path"], match["revision"])


def fetch_folder(reference: str, patterns: Sequence[str] = WEIGHTS_AND_TEXT) -> Path:
    """The local folder of a reference: a path as it is, a repository of the hub after its files that fit patterns are fetched.

    Raises ValueError where there is no such folder, or it cannot be had.
    """
    if not _is_remote(reference):
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            is_repository = _LIKE_A_REPOSITORY.fullmatch(reference)
            advice = f"a repository of the hub is written {SCHEME}{reference}" if is_repository else "correct the path"
            raise ValueError(f"{reference} is no folder; {advice}")
        return folder
    place = parse_reference(reference)
    if place.path is not None:
        raise ValueError(f"{reference} names a file; a whole repository is needed: hf://{place.repository}")
    from huggingface_hub import snapshot_download

    folder = _fetched(
        reference, lambda: snapshot_download(place.repository, revision=place.revision, allow_patterns=list(patterns))
    )
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"{reference} has no files that fit {', '.join(patterns)}")
    return folder


def fetch_file(reference: str) -> Path:
    """The local path of a file: a path as it is, a file of the hub after it is fetched. Raises ValueError as fetch_folder does."""
    if not _is_remote(reference):
        file = Path(reference).expanduser()
        if not file.is_file():
            raise ValueError(f"{reference} is no file; correct the path, or give s3://bucket/key or hf://owner/name/file")
        return file
    place = parse_reference(reference)
    if place.path is None:
        raise ValueError(f"{reference} names a whole repository; a file is needed: hf://{place.repository}/path/of/the/file")
    path = place.path
    from huggingface_hub import hf_hub_download

    return _fetched(reference, lambda: hf_hub_download(place.repository, path, revision=place.revision))


def _is_remote(reference: str) -> bool:
    if reference.startswith(SCHEME):
        return True
    if "://" in reference:
        raise ValueError(f"{reference} is neither a local path nor a place on the hub (hf://owner/name)")
    return False


def _fetched(reference: str, fetch: Callable[[], str]) -> Path:
    """fetch's answer; its errors as one sentence."""
    import httpx2
    from huggingface_hub import errors

    try:
        return Path(fetch())
    except errors.GatedRepoError as error:  # before its base class
        reason = "its owner grants access on request, and HF_TOKEN has none; ask for it on the hub"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "there is no such repository, or HF_TOKEN may not see it; correct the name, or set another token"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.RevisionNotFoundError as error:
        reason = "the repository has no such revision; name a branch, tag or commit"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached, and the local cache does not hold it; give a path"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.EntryNotFoundError as error:
        reason = "the repository has no such file; look at its names on the hub"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
