"""Folders of other services, read through fsspec: hf://, gs://, az:// and every other kind that an installed package knows.

They are only read. Credentials come from the environment, as each package documents it; an address holds none. A dataset of the
Hugging Face hub is read at one commit: pinned() looks it up once, and everything in this process reads the same.
"""

from __future__ import annotations

import builtins
import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

from enat.files import hub
from pipelines.storage import cache as fetched
from pipelines.storage.base import (
    AccessError,
    Folder,
    MissingFileError,
    StorageError,
    StoredFile,
    in_parallel,
)
from pipelines.storage.ranges import RangeFile
from pipelines.storage.redaction import without_credentials

EXTRAS = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}  # packages of the extra "clouds"
# Kinds of fsspec that lead to other addresses, run what a file says, or are this machine.
_REFUSED = re.compile(
    r"async.*|.*cache.*|arrow_hdfs|dask|data|dir|file|generic|git|gist|github|https?|jlab|jupyter|libarchive|local|memory|pyscript"
    r"|reference|s3a?|tar|zip"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSWORD = re.compile(r"[a-z0-9+.-]+://[^/@]*:(?!\d+/)[^@]*@", re.IGNORECASE)
_VERSIONS = (
    "etag",
    "ETag",
    "generation",
    "version_id",
    "xet_hash",
    "content_hash",
    "checksum",
    "mtime",
    "LastModified",
    "modified",
)
_ATTEMPTS = 3  # of a read whose answer is incomplete or damaged; the packages repeat failed requests themselves
_PAUSE = 0.5  # seconds before the second attempt
_RANGE = 8 << 20  # bytes of one request of a download
_DOWNLOADS = 8  # ranges of one file that are read at once
_FEW = 16  # sub-folders that are too few to keep the threads busy
_SHOWN = 200


def is_address(place: str) -> bool:
    """Whether a place is an address, such as gs://bucket/folder, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+._-]*://", place) is not None


class FilesystemFolder(Folder):
    """Files below an address. Holds no open connection when it is sent to a worker."""

    is_remote = True

    def __init__(self, uri: str) -> None:
        """Raises StorageError for a kind of address that cannot be read, and for a repository that does not exist."""
        check_kind(uri)
        self.uri = pinned(uri.rstrip("/"))

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the root in the names that it uses."""
        from fsspec.core import url_to_fs
        from fsspec.dircache import DirCache

        with self._explained(""):
            is_fixed = self.uri.startswith("hf://")  # at a commit: what was listed stays true
            filesystem, root = url_to_fs(self.uri, skip_instance_cache=not is_fixed)
        if isinstance(filesystem.dircache, DirCache):
            filesystem.dircache.use_listings_cache = False
        return filesystem, root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._opened[1]}/{name}".rstrip("/")

    # Listing -----------------------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "", *, follow_links: bool = True) -> Iterator[StoredFile]:
        """List sub-folders in parallel, some ahead of the reader. A prefix without a trailing / is the name of one file."""
        if prefix and not prefix.endswith("/"):
            try:
                yield self._stored(self._info(prefix))
            except MissingFileError:
                return
            return
        units = self._level(prefix)
        if (
            sum(isinstance(unit, str) for unit in units) <= _FEW
        ):  # such as train/ and val/: their sub-folders are listed in parallel
            units = [each for unit in units for each in (self._level(unit) if isinstance(unit, str) else [unit])]
        for files in in_parallel(lambda unit: self._below(unit) if isinstance(unit, str) else [unit], units):
            yield from files

    def entries(self, prefix: str = "") -> builtins.list[str]:
        level = self._level(prefix)
        return sorted((unit if isinstance(unit, str) else unit.name).removeprefix(prefix) for unit in level)

    def _level(self, prefix: str) -> builtins.list[str | StoredFile]:
        """The direct entries of a folder, in order: sub-folders with a trailing /, and files."""
        try:
            with self._explained(prefix):
                listed = self._opened[0].ls(self._path(prefix), detail=True)
        except MissingFileError:
            return []
        if [info["name"].rstrip("/") for info in listed] == [self._path(prefix)]:
            return []  # it is a file
        folders = {f"{self._name(info)}/" for info in listed if info["type"] == "directory"} - {prefix}
        entries: builtins.list[str | StoredFile] = [*folders, *self._files(listed)]
        return sorted(entries, key=lambda entry: (entry if isinstance(entry, str) else entry.name).encode())

    def _below(self, prefix: str) -> builtins.list[StoredFile]:
        """The files of a folder, at any depth."""
        try:
            with self._explained(prefix):
                found = self._opened[0].find(self._path(prefix), detail=True)
        except MissingFileError:
            return []
        return sorted(self._files(found.values()), key=lambda file: file.name.encode())

    def _files(self, listed: Iterable[Any]) -> builtins.list[StoredFile]:
        """Without names that end in /: consoles make them to show empty folders."""
        return [self._stored(info) for info in listed if info["type"] == "file" and not info["name"].endswith("/")]

    def _name(self, info: Any) -> str:
        root = f"{self._opened[1]}/"
        if not info["name"].startswith(root):
            raise StorageError(
                f"{self.uri} is listed with names of another folder ({info['name'][:_SHOWN]!r}); correct the address"
            )
        return str(info["name"][len(root) :]).rstrip("/")

    def _stored(self, info: Any) -> StoredFile:
        name, digest = self._name(info), _digest(info)
        if not isinstance(info.get("size"), int):
            raise StorageError(f"{self.uri}/{name} has no stated size, so it cannot be read in parts; copy the files to a bucket")
        # A sha256 identifies a file as that of a local file does, so a dataset has the same key here and there.
        version = digest[1] if digest and digest[0] == "sha256" else ":".join(digest) if digest else None
        version = version or next((f"{info['size']}-{info[key]}" for key in _VERSIONS if info.get(key) is not None), None)
        if version is None:
            raise StorageError(f"{self.uri}/{name} has neither a digest nor a time, so a change would go unnoticed; copy the files")
        return StoredFile(name, info["size"], version)

    def _info(self, name: str) -> Any:
        with self._explained(name):
            info = self._opened[0].info(self._path(name))
            if info["type"] != "file":
                raise FileNotFoundError(name)
            return info

    # Reading -----------------------------------------------------------------------------------------------------------------

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        # A read from inside a file has no digest to compare.
        info: dict[str, Any] | None = self._info(name) if start == 0 or length is None else None
        stop = start + length if length is not None else int((info or {})["size"])
        if info is not None and stop > info["size"]:
            raise StorageError(f"{self.uri}/{name} ends after {info['size']} bytes; {stop} were expected")
        digest = _digest(info) if info is not None and (start, stop) == (0, info["size"]) else None
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            content = self._get(name, start, stop)
            if len(content) == stop - start and (digest is None or _digest_of(content, digest[0]) == digest[1]):
                return content
        what = f"{len(content)} bytes" if len(content) != stop - start else "other bytes"
        raise AccessError(
            f"{self.uri}/{name} was answered with {what} instead of {stop - start}, {_ATTEMPTS} times; run again later"
        )

    def _get(self, name: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        filesystem, path = self._opened[0], self._path(name)
        with self._explained(name):
            if filesystem.async_impl:
                return bytes(filesystem.cat_file(path, start=start, end=stop))
            with filesystem.open(path, "rb", cache_type="none") as file:  # no more bytes than are asked for
                file.seek(start)
                return bytes(file.read(stop - start))

    @property
    def is_compared(self) -> bool:
        return False

    def open(self, name: str) -> BinaryIO:
        size = self._info(name)["size"]
        return RangeFile(lambda start, stop: self.read(name, start, min(stop, size) - start), size)

    def chunks(self, name: str) -> Iterator[bytes]:
        info = self._info(name)
        size, digest = info["size"], _digest(info)
        whole = _hasher(digest[0], size) if digest else None
        for content in in_parallel(lambda start: self._range(name, start, size), range(0, size, _RANGE), _DOWNLOADS):
            if whole is not None:
                whole.update(content)
            yield content
        if digest and whole is not None and whole.hexdigest() != digest[1]:
            raise AccessError(f"{self.uri}/{name} was damaged on its way, or has changed meanwhile; run again")

    def _range(self, name: str, start: int, size: int) -> bytes:
        content = self._get(name, start, min(start + _RANGE, size))
        if len(content) != min(_RANGE, size - start):
            raise AccessError(f"{self.uri}/{name} was answered only in part; run again, and check the network")
        return content

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        return fetched.fetch(sha256, size, lambda path: self.download(name, path), Path(name).suffix)

    def fingerprints(self, files: Iterable[StoredFile]) -> Iterator[str]:
        return (file.version for file in files)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Errors of many packages become one sentence. Their messages may hold signed addresses."""
        place = f"{self.uri}/{name}".rstrip("/")
        try:
            yield
        except (StorageError, MemoryError):
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingFileError(f"{place} does not exist; correct the address") from error
        except Exception as error:
            reason = without_credentials((str(error).strip().splitlines() or [""])[0])[:_SHOWN] or type(error).__name__
            raise AccessError(
                f"{place} cannot be read ({reason}); check the credentials in the environment, and the network"
            ) from error

    # Writing -----------------------------------------------------------------------------------------------------------------

    def put_if_absent(self, name: str, source: Path | bytes, sha256: str | None = None) -> bool:
        raise self._read_only()

    def put(self, name: str, content: bytes) -> None:
        raise self._read_only()

    def delete(self, names: Iterable[str], *, follow_links: bool = True) -> None:
        raise self._read_only()

    def _read_only(self) -> StorageError:
        return StorageError(f"{self.uri} is only read; write to a folder or s3://bucket/prefix")


# Kinds of address ----------------------------------------------------------------------------------------------------------


def check_kind(uri: str) -> None:
    """Raise StorageError if no installed package reads this kind of address, naming the package to install, or if it holds a
    password."""
    from fsspec.registry import get_filesystem_class, known_implementations

    kind = uri.partition("://")[0].lower()
    if _PASSWORD.match(uri):
        raise StorageError(f"a {kind}:// address holds no password; set the credentials in the environment")
    if _REFUSED.fullmatch(kind) or "::" in uri:
        raise StorageError(
            f"{without_credentials(uri)} is not a place that is read; give a folder, s3://bucket/prefix, hf://datasets/owner/name, "
            "gs://bucket/prefix or az://container/prefix"
        )
    try:
        get_filesystem_class(kind)
    except ImportError as error:
        known = known_implementations.get(kind, {})
        package = EXTRAS.get(kind) or known.get("class", "").partition(".")[0].replace("_", "-")
        advice = f"install the package {package}" if package != "fsspec" else str(known.get("err", "")).rstrip(".")
        advice += " (pip install 'enat-lab[clouds]')" if kind in EXTRAS else ""
        raise StorageError(f"{without_credentials(uri)} cannot be read on this machine: {advice}") from error
    except ValueError as error:
        advice = f"; install the package {EXTRAS[kind]} (pip install 'enat-lab[clouds]')" if kind in EXTRAS else ""
        raise StorageError(
            f"{without_credentials(uri)} is neither a local folder nor s3://bucket/prefix, and no installed package reads "
            f"{kind}:// addresses{advice}"
        ) from error


def pinned(uri: str) -> str:
    """An address of a repository of the hub with its commit in place of branch or tag. Others stay as they are.

    The commit is looked up once until forget_commits(). Raises StorageError for an address or repository that does not exist, and
    AccessError if the hub cannot be reached.
    """
    if not uri.startswith("hf://"):
        return uri
    from huggingface_hub.utils import parse_hf_uri

    try:
        place = parse_hf_uri(uri.rstrip("/"))
    except ValueError as error:
        raise StorageError(f"{uri} is not of the form hf://datasets/owner/name[@revision][/folder]") from error
    if place.is_bucket or _COMMIT.fullmatch(place.revision or ""):
        return uri
    kind = "" if place.type == "model" else f"{place.type}s/"
    root = f"hf://{kind}{place.id}"
    commit = _commit_of(place.type, place.id, place.revision)
    return f"{root}@{commit}/{place.path_in_repo}".rstrip("/")


@cache
def _commit_of(kind: str, repository: str, revision: str | None) -> str:
    import httpx2
    from huggingface_hub import HfApi

    shown = f"hf://{'' if kind == 'model' else f'{kind}s/'}{repository}{f'@{revision}' if revision else ''}"
    try:
        with hub.explained(shown, "cannot be read"):
            commit = HfApi().repo_info(repository, revision=revision, repo_type=kind).sha
    except ValueError as error:
        is_network = isinstance(error.__cause__, httpx2.TransportError | ConnectionError)
        raise (AccessError if is_network else StorageError)(str(error)) from error
    if not _COMMIT.fullmatch(commit or ""):
        raise AccessError(f"{shown} cannot be read: the hub names no commit")
    return str(commit)


def forget_commits() -> None:
    """Look up the commits of branches again from now on: a new run begins."""
    _commit_of.cache_clear()


# Digests -------------------------------------------------------------------------------------------------------------------


def _digest(info: Any) -> tuple[str, str] | None:
    """The algorithm and the digest of a file's content, as hex, if its service states one: the hub, Google's and Azure's do."""
    if lfs := info.get("lfs"):
        return "sha256", lfs["sha256"]
    if blob := info.get("blob_id"):
        return "git", blob
    if md5 := info.get("md5Hash"):
        return "md5", _hex_of_base64(md5)
    if md5 := (info.get("content_settings") or {}).get("content_md5"):
        return "md5", bytes(md5).hex()
    return None


def _hex_of_base64(text: str) -> str:
    import base64

    return base64.b64decode(text).hex()


def _digest_of(content: bytes, algorithm: str) -> str:
    digest = _hasher(algorithm, len(content))
    digest.update(content)
    return str(digest.hexdigest())


def _hasher(algorithm: str, size: int) -> Any:
    """git: the name that git gives a file of so many bytes."""
    if algorithm == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(algorithm, usedforsecurity=False)
