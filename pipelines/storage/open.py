"""Open a path or s3:// URI as a folder. Only this module knows which kinds of folder there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage.base import Folder, StorageError
from pipelines.storage.local import LocalFolder
from pipelines.storage.redaction import without_credentials

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config


def open_folder(uri: str, s3: S3Config | None = None, *, must_exist: bool = True) -> Folder:
    """Open the folder at a path or at s3://bucket/prefix.

    s3: how to reach the bucket; None uses the settings of AWS.   must_exist: if False, a directory may be missing; it is made
    when something is written to it. Raises StorageError if a directory does not exist, or if the kind of place is unknown.
    """
    if uri.startswith("s3://"):
        from pipelines.storage.s3 import S3Folder

        return S3Folder(uri, s3)
    if "://" in uri:
        raise StorageError(f"{without_credentials(uri)} is neither a local folder nor s3://bucket/prefix")
    folder = LocalFolder(Path(uri))
    if must_exist and not folder.root.is_dir():
        raise StorageError(f"{folder.root} is not a directory. Fix the path, or download the files first.")
    return folder
