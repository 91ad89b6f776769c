"""Open a path or an address as a folder. Only this module knows which kinds of folder there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage import filesystem
from pipelines.storage.base import Folder, StorageError
from pipelines.storage.filesystem import is_address
from pipelines.storage.local import LocalFolder

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config

__all__ = ["forget_commits", "is_address", "open_folder", "pinned"]

pinned, forget_commits = filesystem.pinned, filesystem.forget_commits


def open_folder(uri: str, s3: S3Config | None = None, *, must_exist: bool = True) -> Folder:
    """Open the folder at a path, at s3://bucket/prefix, or, for reading only, at another address (filesystem.py).

    s3: how to reach the bucket; None uses the settings of AWS.   must_exist: if False, a directory may be missing; it is made
    when something is written to it. Raises StorageError if a directory does not exist, or if the kind of place is unknown.
    """
    if uri.startswith("s3://"):
        from pipelines.storage.s3 import S3Folder

        return S3Folder(uri, s3)
    if "://" in uri:
        return filesystem.FilesystemFolder(uri)
    folder = LocalFolder(Path(uri))
    if must_exist and not folder.root.is_dir():
        raise StorageError(f"{folder.root} is not a directory. Fix the path, or download the files first.")
    return folder
