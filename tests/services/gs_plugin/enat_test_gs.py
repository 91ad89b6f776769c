"""gs:// as an installed package knows it, over a folder of this machine: objects with sizes, MD5 and generation, in no order.

ENAT_TEST_GS names the folder, whose sub-folders are buckets. Each process that reads gs:// imports this module by the entry point
in the metadata beside it, as it would import gcsfs. Reads are counted in the file ENAT_TEST_GS_READS.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile


class Bucket(AbstractFileSystem):
    protocol = ("gs", "gcs")

    def _local(self, path: str) -> Path:
        return Path(os.environ["ENAT_TEST_GS"]) / self._strip_protocol(path)

    def _describe(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(os.environ["ENAT_TEST_GS"]).as_posix()
        if path.is_dir():
            return {"name": name, "size": 0, "type": "directory"}
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()
        return {"name": name, "size": path.stat().st_size, "type": "file", "md5Hash": base64.b64encode(md5).decode()}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        local = self._local(path)
        if not local.exists():
            raise FileNotFoundError(path)
        found = [self._describe(each) for each in (sorted(local.iterdir(), reverse=True) if local.is_dir() else [local])]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if not (local := self._local(path)).exists():
            raise FileNotFoundError(path)
        return self._describe(local)

    def _open(self, path: str, mode: str = "rb", **given: Any) -> AbstractBufferedFile:
        return _Object(self, path, mode, **given)


class _Object(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        with Path(os.environ["ENAT_TEST_GS_READS"]).open("a") as log:
            log.write(f"{os.getpid()} {self.path} {start} {end}\n")
        content = self.fs._local(self.path).read_bytes()
        if os.environ.get("ENAT_TEST_GS_DAMAGE"):
            content = content[:-1] + b"?"
        return content[start:end]
