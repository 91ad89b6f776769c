"""A path or s3:// URI as a Folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config
from pipelines.storage.base import Folder, StorageError
from pipelines.storage.local import LocalFolder


def open_folder(uri: str, s3: S3Config) -> Folder:
    """Raises StorageError where there is no such folder, or for a kind of place that cannot be read."""
    if uri.startswith("s3://"):
        from pipelines.storage.s3 import S3Folder

        return S3Folder(uri, s3)
    if "://" in uri:
        raise StorageError(f"{uri} is neither a local folder nor s3://bucket/prefix")
    return LocalFolder(Path(uri))
