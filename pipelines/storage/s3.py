"""Folders in buckets: listed in order, read by ranges, and written with conditional requests that never replace a file."""

from __future__ import annotations

import base64
import builtins
import hashlib
import io
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from uuid import uuid4

from pipelines.storage import cache
from pipelines.storage.base import AccessError, Folder, MissingFileError, StorageError, StoredFile, file_digest, in_parallel
from pipelines.storage.ranges import RangeFile
from pipelines.storage.s3_client import (
    ATTEMPTS,
    NO_CHECKSUMS,
    WITHOUT_CHECKSUMS,
    S3Config,
    broken_transfers,
    client_of,
    error_code,
    explained,
    is_checked,
    is_conflict,
    is_unknown,
    knows_checksums,
    may_have_happened,
    pause_before,
    refusal,
)

MIB = 1 << 20
_DOWNLOADS = 8  # ranges of one file that are read at once
_RANGE = 8 * MIB  # bytes of one request of a download
_PART = 32 * MIB  # bytes of one part of an upload; smaller files go up in one request
_PARTS_AT_MOST = 10_000  # S3's own limit
_UPLOADS = 4  # parts that are uploaded, and held in memory, at once
_PAGES_AHEAD = 10  # of 1,000 names, listed by one thread ahead of the reader
_CONFLICTS = 4  # attempts of a write that another write refuses without leaving an object
_DELETED_AT_ONCE = 1000  # S3's own limit
_FEW = 16  # sub-folders that are too few to keep the threads busy

_Files: TypeAlias = list[StoredFile]


class S3Folder(Folder):
    """Objects below s3://bucket/prefix. Holds no open connection: each process has one client per S3Config."""

    is_remote = True

    def __init__(self, uri: str, config: S3Config | None = None) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if "@" in bucket or ":" in bucket:
            raise StorageError("an s3:// URI holds no user or password; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if not uri.startswith("s3://") or not bucket:
            raise StorageError(f"{uri!r} is not of the form s3://bucket/prefix")
        prefix = prefix.strip("/")
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.config = config or S3Config()
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    # Listing -----------------------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "", *, follow_links: bool = True) -> Iterator[StoredFile]:
        """List sub-folders in parallel, some ahead of the reader. Memory does not grow with the folder. Buckets have no links."""
        last = b""
        for file in self._all(prefix):
            if (name := file.name.encode()) <= last:  # a reader that resumes after a name would skip files
                raise StorageError(f"{self.uri} is listed out of order ({file.name}); use a bucket that lists names in order")
            last = name
            yield file

    def _all(self, prefix: str) -> Iterator[StoredFile]:
        units = self._level(prefix)
        first = [*islice(units, _FEW + 1)]
        if len(first) <= _FEW:  # such as train/ and val/: their sub-folders are listed in parallel
            units = chain.from_iterable(self._level(unit) if isinstance(unit, str) else (unit,) for unit in first)
        else:
            units = chain(first, units)

        def begin(unit: str | _Files) -> tuple[_Files, Iterator[Any]]:
            """The first files of a sub-folder, and its further pages."""
            if not isinstance(unit, str):
                return unit, iter(())
            pages = self._pages(unit)
            return [file for page in islice(pages, _PAGES_AHEAD) for file in self._files(page)], pages

        for files, rest in in_parallel(begin, units):
            yield from files
            for page in rest:
                yield from self._files(page)

    def entries(self, prefix: str = "") -> builtins.list[str]:
        units = self._level(prefix)
        names = [name for unit in units for name in ([unit] if isinstance(unit, str) else [file.name for file in unit])]
        return [name.removeprefix(prefix) for name in names]

    def _level(self, prefix: str) -> Iterator[str | _Files]:
        """The direct entries of a folder, in order: sub-folders, and runs of files between them."""
        for page in self._pages(prefix, Delimiter="/"):
            folders = [found["Prefix"][len(self._prefix) :] for found in page.get("CommonPrefixes", ())]
            entries: list[str | StoredFile] = [*folders, *self._files(page)]
            entries.sort(key=lambda entry: (entry if isinstance(entry, str) else entry.name).encode())
            for are_folders, run in groupby(entries, key=lambda entry: isinstance(entry, str)):
                if are_folders:
                    yield from (entry for entry in run if isinstance(entry, str))
                else:
                    yield [entry for entry in run if isinstance(entry, StoredFile)]

    def _pages(self, prefix: str, **options: str) -> Iterator[Any]:
        """Answers of up to 1,000 names below a prefix, at any depth; with a Delimiter, of direct entries."""
        with self._explained("list", prefix):
            paginator = self._client.get_paginator("list_objects_v2")
            yield from paginator.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix, **options)

    def _files(self, page: Any) -> _Files:
        """Without keys that end in /: consoles make them to show empty folders."""
        start, found = len(self._prefix), page.get("Contents", ())
        return [
            StoredFile(entry["Key"][start:], entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp())
            for entry in found
            if not entry["Key"].endswith("/")
        ]

    # Reading -----------------------------------------------------------------------------------------------------------------

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        stop = None if length is None else start + length
        content = self._get(name, start, stop, None if start else stop)
        if stop is not None and len(content) != length:
            raise StorageError(f"{self.uri}/{name} ends after {start + len(content)} bytes; {stop} were expected")
        return content

    def open(self, name: str) -> BinaryIO:
        size, version = self._status(name)
        return RangeFile(lambda start, stop: self._get(name, start, stop, size, version), size)

    @property
    def is_compared(self) -> bool:
        """Parts of an object have no checksum. Over http they are read twice; what comes over https cannot change on its way."""
        return not self._client.meta.endpoint_url.startswith("https:")

    def fingerprints(self, files: Iterable[StoredFile]) -> Iterator[str]:
        return (file.version for file in files)

    def chunks(self, name: str) -> Iterator[bytes]:
        return self._ranges(name, *self._status(name))

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        return cache.fetch(sha256, size, lambda path: self.download(name, path), Path(name).suffix)

    def _status(self, name: str) -> tuple[int, str]:
        with self._explained("read", name):
            answer = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        return answer["ContentLength"], answer["ETag"].strip('"')

    def _ranges(self, name: str, size: int, version: str) -> Iterator[bytes]:
        def read(start: int) -> bytes:
            return self._transfer(name, start, min(start + _RANGE, size), size, version)[0]

        return in_parallel(read, range(0, size, _RANGE), _DOWNLOADS)

    def _get(self, name: str, start: int, stop: int | None, size: int | None = None, version: str | None = None) -> bytes:
        """The same bytes as _transfer, which are believed if a checksum or a second read confirms them.

        The second read also confirms whole objects without a checksum whose ETag is not an MD5.
        """
        read: builtins.list[bytes] = []
        for _ in range(ATTEMPTS):
            content, is_confirmed = self._transfer(name, start, stop, size, version)
            if is_confirmed or content in read:
                return content
            read.append(content)
        raise AccessError(f"{self.uri}/{name} arrives with other bytes each time; check the endpoint and the network")

    def _transfer(
        self, name: str, start: int, stop: int | None, size: int | None = None, version: str | None = None
    ) -> tuple[bytes, bool]:
        """Bytes start..stop-1 (None: to the end), fewer if the object ends before, and whether they are known to be the object's.

        size: of the object, if it is known or assumed.   version: StorageError for any other.
        """
        request = {"Bucket": self._bucket, "Key": self._prefix + name}
        if start or stop not in (None, size):
            request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if version is not None:
            request["IfMatch"] = f'"{version}"'
        with self._explained("read", name):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    answer = self._client.get_object(**request)
                except Exception as error:
                    if error_code(error) == "InvalidRange":
                        return b"", True
                    raise
                expected = total = answer["ContentLength"]
                if "Range" in request:
                    if "ContentRange" not in answer:
                        raise StorageError(f"{self.uri}/{name}: the endpoint does not answer requests for a range of bytes")
                    total = int(answer["ContentRange"].rpartition("/")[2])
                    expected = (total if stop is None else min(stop, total)) - start
                elif stop is not None and total > stop:  # the object is larger than assumed
                    answer["Body"].close()
                    request["Range"] = f"bytes={start}-{stop - 1}"
                    continue
                try:
                    with closing(answer["Body"]) as body:
                        content: bytes = body.read()
                    if len(content) == expected:
                        is_whole = len(content) == total
                        is_known = _is_md5(answer["ETag"], content) if is_whole else not self.is_compared
                        return content, is_known or is_checked(answer)
                except broken_transfers():
                    if attempt == ATTEMPTS:
                        raise
                _pause(attempt)
        raise AccessError(f"{self.uri}/{name} was answered only in part, {ATTEMPTS} times; check the endpoint")

    # Writing -----------------------------------------------------------------------------------------------------------------

    def put(self, name: str, content: bytes) -> None:
        with self._explained("write", name):
            self._put(name, content, file_digest(content))

    def put_if_absent(self, name: str, source: Path | bytes, sha256: str | None = None, *, part_size: int = _PART) -> bool:
        """Write an object unless its name is taken. Returns whether the name now holds exactly these bytes.

        Nothing more can be known: if an answer was lost, existing bytes may be those of this request. The endpoint compares the
        content with checksums. Files over `part_size` bytes are sent in parts; the object appears when all parts have arrived.
        """
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256 = sha256 or file_digest(source)
        is_large = isinstance(source, Path) and size > part_size
        if is_large and (holds := self._holds(name, size, sha256)) is not None:
            return holds  # known without sending gigabytes
        with self._explained("write", name):
            for attempt in range(1, _CONFLICTS + 1):
                try:
                    if isinstance(source, Path) and is_large:
                        self._put_parts(name, source, sha256, max(part_size, -(-size // _PARTS_AT_MOST)))
                    else:
                        self._put(name, source, sha256, IfNoneMatch="*")
                    return True
                except Exception as error:
                    if is_unknown(error_code(error)) and knows_checksums(self.config) and self._writes_without_checksums():
                        raise AccessError(refusal(NO_CHECKSUMS, "write", f"{self.uri}/{name}", self.config)) from error
                    if not may_have_happened(error):
                        raise
                    if (holds := self._holds(name, size, sha256)) is not None:
                        return holds
                    if attempt == _CONFLICTS or not is_conflict(error):
                        raise
                _pause(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _put(self, name: str, source: Path | bytes, sha256: str, **condition: str) -> None:
        checksum = self._checksum(source, sha256)
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as body:
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=body, **condition, **checksum)

    def _checksum(self, source: Path | bytes, sha256: str) -> dict[str, str]:
        """With which the service compares what it receives."""
        if knows_checksums(self.config):
            return {"ChecksumSHA256": _base64(sha256)}
        return {"ContentMD5": _base64(file_digest(source, "md5"))}

    def _writes_without_checksums(self) -> bool:
        """Find out by writing, which leaves nothing: a refusal need not name what it refuses."""
        client = client_of(self.config, WITHOUT_CHECKSUMS)
        probe = {"Bucket": self._bucket, "Key": f"{self._prefix}.probe-{uuid4().hex}"}
        try:
            client.put_object(**probe, IfNoneMatch="*")
            client.delete_object(**probe)
        except Exception as error:  # noqa: BLE001 (the first refusal is the one to explain)
            return not is_unknown(error_code(error))
        return True

    def _put_parts(self, name: str, source: Path, sha256: str, part_size: int) -> None:
        client, target = self._client, {"Bucket": self._bucket, "Key": self._prefix + name}
        algorithm = {"ChecksumAlgorithm": "SHA256"} if knows_checksums(self.config) else {}
        upload = client.create_multipart_upload(**target, **algorithm)["UploadId"]
        whole = hashlib.sha256()

        def parts() -> Iterator[tuple[int, bytes]]:
            with source.open("rb") as file:
                for number, content in enumerate(iter(lambda: file.read(part_size), b""), 1):
                    whole.update(content)
                    yield number, content

        def put(part: tuple[int, bytes]) -> dict[str, Any]:
            number, content = part
            checksum = self._checksum(content, file_digest(content))
            answer = client.upload_part(**target, UploadId=upload, PartNumber=number, Body=content, **checksum)
            checksum.pop("ContentMD5", None)  # only of a request
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        try:
            done = {"Parts": [*in_parallel(put, parts(), _UPLOADS)]}
            if whole.hexdigest() != sha256:
                raise StorageError(f"{source} changed while it was written to {self.uri}/{name}; run again")
            client.complete_multipart_upload(**target, UploadId=upload, MultipartUpload=done, IfNoneMatch="*")
        except BaseException:
            with suppress(Exception):  # report the first error; the bucket's rules expire parts that are left
                client.abort_multipart_upload(**target, UploadId=upload)
            raise

    def _holds(self, name: str, size: int, sha256: str) -> bool | None:
        """Whether an object has exactly these bytes; None if it does not exist."""
        try:
            with self._explained("read", name):
                mode = {"ChecksumMode": "ENABLED"} if knows_checksums(self.config) else {}
                answer = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name, **mode)
            if answer["ContentLength"] != size:
                return False
            if answer.get("ChecksumSHA256") == _base64(sha256):
                return True
            # S3 has a checksum of checksums for an object in parts, and perhaps none for one that others wrote.
            for _ in range(2):  # bytes may be damaged on their way
                digest = hashlib.sha256()
                for content in self._ranges(name, size, answer["ETag"].strip('"')):
                    digest.update(content)
                if digest.hexdigest() == sha256:
                    return True
        except MissingFileError:
            return None
        return False

    def delete(self, names: Iterable[str], *, follow_links: bool = True) -> None:
        remaining = iter(names)
        while some := [*islice(remaining, _DELETED_AT_ONCE)]:
            objects = {"Objects": [{"Key": self._prefix + name} for name in some], "Quiet": True}
            with self._explained("delete", some[0]):
                failed = self._client.delete_objects(Bucket=self._bucket, Delete=objects).get("Errors")
            if failed:
                place = f"s3://{self._bucket}/{failed[0].get('Key')}"
                raise AccessError(refusal(failed[0].get("Code", ""), "delete", place, self.config))

    @property
    def _client(self) -> Any:
        return client_of(self.config)

    def _explained(self, action: str, name: str) -> AbstractContextManager[None]:
        return explained(self.config, action, f"{self.uri}/{name}".rstrip("/"))


def _pause(attempt: int) -> None:
    time.sleep(pause_before(attempt))


def _is_md5(etag: str, content: bytes) -> bool:
    """Of most objects that were written in one request. Others are encrypted, or the service has ETags of its own."""
    return etag.strip('"') == file_digest(content, "md5")


def _base64(digest: str) -> str:
    """digest: as hex."""
    return base64.b64encode(bytes.fromhex(digest)).decode()
