"""Files that others made (weights, text encoders): a local path, s3://bucket/key, hf://owner/name/path, for a single file https://,
or an address that fsspec reads (gs://bucket/key) -> a path on this machine.

Files of a bucket or a web server are kept in the cache (cache.py) under their URI and version, so an unchanged file is fetched
once. Those of models on the Hugging Face hub are kept by huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from enat.files.hub import explained
from pipelines.storage import cache, web
from pipelines.storage.base import Folder, StorageError, StoredFile, canonical_json, digest_of, file_digest
from pipelines.storage.local import LocalFolder
from pipelines.storage.open import open_folder

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config

_FILES, _DIGESTS = "files", "sha256.json"  # a folder of fetched files, and their digests beside it
_WEIGHTS_AND_TEXT = ("*.safetensors", "*.json", "*.txt")  # no pickles: a file that is not fetched cannot be opened by mistake
_SUFFIXES = tuple(pattern.removeprefix("*") for pattern in _WEIGHTS_AND_TEXT)
_BY_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NOT_MODELS = ("hf://datasets/", "hf://spaces/", "hf://buckets/")
_LIKE_A_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_ON_THE_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@]+))?")


def local_file(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """Return a local path of a file. key: of the config, for messages. Raises ValueError if it does not exist."""
    if _BY_DIGEST.fullmatch(reference):
        raise ValueError(
            f"{key} is {reference}, but the store has no artifact made from it; import the file first: enat import --help"
        )
    with _naming(key):
        if _is_in_folder(reference):
            parent, _, name = reference.rpartition("/")
            folder = open_folder(parent, s3)
            found = [file for file in folder.list(name) if file.name == name]
            if not found:
                raise StorageError(f"{reference} does not exist; correct the URI")
            return _download(folder, found) / name
        if reference.startswith("https://"):
            return web.fetch(reference)
        if "://" not in reference:
            path = Path(reference).expanduser()
            if not path.is_file():
                raise ValueError(f"{reference} is not a file; correct the path, or give s3://bucket/key or hf://owner/name/file")
            return path
        repository, file_name, revision = _place_on_the_hub(reference)
        if file_name is None:
            raise ValueError(f"{reference} names a whole repository; a file is needed: hf://{repository}/path/of/the/file")
        from huggingface_hub import hf_hub_download

        with explained(reference):
            return Path(hf_hub_download(repository, file_name, revision=revision))


def local_folder(reference: str, key: str, s3: S3Config | None = None) -> Path:
    """Return a local path of a folder. From a bucket or the hub, only weights without pickle and text files are fetched."""
    no_files = f"{reference} has no files that end in {', '.join(_SUFFIXES)}"
    with _naming(key):
        if _is_in_folder(reference):
            bucket = open_folder(reference, s3)
            found = [file for file in bucket.list() if file.name.endswith(_SUFFIXES)]
            if not found:
                raise StorageError(no_files)
            return _download(bucket, found)
        if "://" not in reference:
            folder = Path(reference).expanduser()
            if not folder.is_dir():
                is_repository = _LIKE_A_REPOSITORY.fullmatch(reference)
                advice = f"a repository of the hub is written hf://{reference}" if is_repository else "correct the path"
                raise ValueError(f"{reference} is not a directory; {advice}")
            return folder
        repository, file_name, revision = _place_on_the_hub(reference)
        if file_name is not None:
            raise ValueError(f"{reference} names a file; a whole repository is needed: hf://{repository}")
        from huggingface_hub import snapshot_download

        with explained(reference):
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(_WEIGHTS_AND_TEXT)))
        if not any(path.is_file() for path in folder.rglob("*")):
            raise ValueError(no_files)
        return folder


def _is_in_folder(reference: str) -> bool:
    """Whether a place is reached by its folder: in a bucket, or another address that is not a web page or a model on the hub."""
    is_model = reference.startswith("hf://") and not reference.startswith(_NOT_MODELS)
    return "://" in reference and not is_model and not reference.startswith(("https://", "http://"))


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of a path, such as one that is too long
        raise ValueError(f"{key}: {error.filename} cannot be read ({error.strerror})") from error
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
    names = sorted({path.relative_to(folder).as_posix() for pattern in _WEIGHTS_AND_TEXT for path in folder.rglob(pattern)})
    return digest_of(list(zip(names, _digests(LocalFolder(folder), names), strict=True)))


def _digests(folder: LocalFolder, names: list[str]) -> list[str]:
    """sha256 of files. Each is hashed once as long as it does not change."""
    return list(folder.fingerprints(folder.file(name) for name in names))


def _download(folder: Folder, files: list[StoredFile]) -> Path:
    """A local folder with these files. It exists only when it is complete, and is fetched again if its bytes have changed.

    The digests of what was fetched are beside it. What arrives over the network is read twice, because a bucket has no sha256 of
    files that others wrote.
    """
    versions = [[file.name, file.size, file.version] for file in files]

    def download(target: Path) -> None:
        digests = {}
        for file in files:
            path = target / _FILES / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.download(file.name, path)
            digests[file.name] = file_digest(path)
            _check_arrived(folder, file, digests[file.name])
        (target / _DIGESTS).write_bytes(canonical_json({"files": digests, "sha256": digest_of(digests)}))

    def is_whole(target: Path) -> bool:
        try:
            kept = json.loads((target / _DIGESTS).read_bytes())
            digests = kept["files"]
            is_record_whole = digest_of(digests) == kept["sha256"] and {*digests} == {file.name for file in files}
            return is_record_whole and all(
                cache.holds(target / _FILES / file.name, file.size, digests[file.name]) for file in files
            )
        except (OSError, KeyError, TypeError, ValueError):
            return False

    name, size = digest_of([folder.uri, versions])[:32], sum(file.size for file in files)
    return cache.fetch_folder(name, size, download, is_whole) / _FILES


def _check_arrived(folder: Folder, file: StoredFile, sha256: str) -> None:
    """Raise StorageError if the file has other bytes when it is read a second time: one of the two was damaged on its way."""
    digest = hashlib.sha256()
    for chunk in folder.chunks(file.name):
        digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise StorageError(f"{folder.uri}/{file.name} was damaged on its way; run again, and check the network")


def _place_on_the_hub(reference: str) -> tuple[str, str | None, str | None]:
    """owner/name, the path of a file or None for all of the repository, and the revision or None for the main branch."""
    match = _ON_THE_HUB.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference} is neither a local path nor a place on the hub, hf://owner/name[/path][@revision]")
    return match[1], match[2], match[3]
