"""Files that others made (weights, text encoders): a local path, s3://bucket/key or hf://owner/name/path -> a path on this machine.

Files of a bucket are kept in the cache (cache.py) under their URI and version, so an unchanged file is fetched once. Files of the
Hugging Face hub are kept by huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage import cache
from pipelines.storage.base import Folder, StorageError, StoredFile, digest_of
from pipelines.storage.local import LocalFolder
from pipelines.storage.open import open_folder

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config

SCHEME = "hf://"
WEIGHTS_AND_TEXT = ("*.safetensors", "*.json", "*.txt")  # no pickles: a file that is not fetched cannot be opened by mistake
_SUFFIXES = tuple(pattern.removeprefix("*") for pattern in WEIGHTS_AND_TEXT)
_BY_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LIKE_A_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REFERENCE = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>[^@]+))?")


def local_file(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """Return a local path of a file. key: of the config, for messages. Raises ValueError if it does not exist."""
    if _BY_DIGEST.fullmatch(reference):
        raise ValueError(
            f"{key} is {reference}, but the store has no artifact made from it; import the file first: enat import --help"
        )
    try:
        if reference.startswith("s3://"):
            parent, _, name = reference.rpartition("/")
            folder = open_folder(parent, s3)
            found = [file for file in folder.list(name) if file.name == name]
            if not found:
                raise StorageError(f"{reference} does not exist; correct the URI")
            return _download(folder, found) / name
        return fetch_file(reference)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def local_folder(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """Return a local path of a folder. From a bucket or the hub, only weights without pickle and text files are fetched."""
    try:
        if reference.startswith("s3://"):
            folder = open_folder(reference, s3)
            found = [file for file in folder.list() if file.name.endswith(_SUFFIXES)]
            if not found:
                raise StorageError(f"{reference} has no files that end in {', '.join(_SUFFIXES)}")
            return _download(folder, found)
        return fetch_folder(reference)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def content_digest(reference: str, key: str, s3: S3Config | None = None) -> str:
    """Return the sha256 of a file's content. "sha256:..." refers to a file that was imported and need not be on this machine."""
    match = _BY_DIGEST.fullmatch(reference)
    if match:
        return match[1]
    path = local_file(reference, key, s3)
    return _digests(LocalFolder(path.parent), [path.name])[0]


def folder_digest(folder: Path) -> str:
    """Identify the content of a folder from local_folder: the files that would be fetched, by name and sha256."""
    names = sorted({path.relative_to(folder).as_posix() for pattern in WEIGHTS_AND_TEXT for path in folder.rglob(pattern)})
    return digest_of(list(zip(names, _digests(LocalFolder(folder), names), strict=True)))


def _digests(folder: LocalFolder, names: list[str]) -> list[str]:
    """sha256 of files. Each is hashed once as long as it does not change."""
    return list(folder.fingerprints(folder.file(name) for name in names))


def _download(folder: Folder, files: list[StoredFile]) -> Path:
    """A local folder with these files. It exists only when it is complete."""
    versions = [[file.name, file.size, file.version] for file in files]

    def download(target: Path) -> None:
        for file in files:
            path = target / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as copy:
                copy.writelines(folder.chunks(file.name))

    return cache.fetch_folder(digest_of([folder.uri, versions])[:32], sum(file.size for file in files), download)


# The hub -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubReference:
    """repository: owner/name.   path: of a file in it; None for all of it.   revision: None for the repository's main branch."""

    repository: str
    path: str | None
    revision: str | None


def parse_reference(reference: str) -> HubReference:
    """Raises ValueError if the reference has another form."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference} is not a place on the hub; write hf://owner/name[/path][@revision]")
    return HubReference(match["repository"], match["path"], match["revision"])


def fetch_folder(reference: str, patterns: Sequence[str] = WEIGHTS_AND_TEXT) -> Path:
    """Return the local folder of a path, or of a repository of the hub after the files that match `patterns` are fetched.

    Raises ValueError if it does not exist, or if it cannot be fetched.
    """
    if not _is_remote(reference):
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            is_repository = _LIKE_A_REPOSITORY.fullmatch(reference)
            advice = f"a repository of the hub is written {SCHEME}{reference}" if is_repository else "correct the path"
            raise ValueError(f"{reference} is not a directory; {advice}")
        return folder
    place = parse_reference(reference)
    if place.path is not None:
        raise ValueError(f"{reference} names a file; a whole repository is needed: hf://{place.repository}")
    from huggingface_hub import snapshot_download

    folder = _fetch(reference, lambda: snapshot_download(place.repository, revision=place.revision, allow_patterns=list(patterns)))
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"{reference} has no files that match {', '.join(patterns)}")
    return folder


def fetch_file(reference: str) -> Path:
    """Return the local file of a path, or of a file of the hub after it is fetched. Raises ValueError as fetch_folder does."""
    if not _is_remote(reference):
        file = Path(reference).expanduser()
        if not file.is_file():
            raise ValueError(f"{reference} is not a file; correct the path, or give s3://bucket/key or hf://owner/name/file")
        return file
    place = parse_reference(reference)
    if place.path is None:
        raise ValueError(f"{reference} names a whole repository; a file is needed: hf://{place.repository}/path/of/the/file")
    path = place.path
    from huggingface_hub import hf_hub_download

    return _fetch(reference, lambda: hf_hub_download(place.repository, path, revision=place.revision))


def _is_remote(reference: str) -> bool:
    if reference.startswith(SCHEME):
        return True
    if "://" in reference:
        raise ValueError(f"{reference} is neither a local path nor a place on the hub (hf://owner/name)")
    return False


def _fetch(reference: str, fetch: Callable[[], str]) -> Path:
    """The path that `fetch` returns. Its errors become one sentence."""
    import httpx2
    from huggingface_hub import errors

    cause: Exception
    try:
        return Path(fetch())
    except errors.GatedRepoError as error:  # before its base class
        reason, cause = "its owner grants access on request, and HF_TOKEN has none; ask for it on the hub", error
    except errors.RepositoryNotFoundError as error:
        reason, cause = "the repository does not exist, or HF_TOKEN may not see it; correct the name, or set another token", error
    except errors.RevisionNotFoundError as error:
        reason, cause = "the repository has no such revision; name a branch, tag or commit", error
    except errors.LocalEntryNotFoundError as error:
        reason, cause = "the hub cannot be reached, and the local cache does not hold it; give a path", error
    except errors.EntryNotFoundError as error:
        reason, cause = "the repository has no such file; look at its names on the hub", error
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        reason, cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, error
    raise ValueError(f"{reference} cannot be fetched: {reason}") from cause
