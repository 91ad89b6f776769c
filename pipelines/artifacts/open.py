"""Open a path or s3://bucket/prefix as an artifact store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError
from pipelines.storage.open import open_folder
from pipelines.storage.redaction import without_credentials

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config


def open_store(uri: str, s3: S3Config | None = None) -> ArtifactStore:
    """Open the store at a path, which need not exist, or at s3://bucket/prefix.

    s3: how to reach the bucket; None uses the settings of AWS. Raises StorageError for other kinds of place.
    """
    if "://" in uri and not uri.startswith("s3://"):
        shown = without_credentials(uri)
        raise StorageError(f"the store {shown} is neither a folder nor s3://bucket/prefix; choose one with store=...")
    return ArtifactStore(open_folder(uri, s3, must_exist=False))


def open_existing(uri: str, s3: S3Config) -> ArtifactStore:
    """Raise ValueError if a path does not exist: a mistyped store would look like an empty one."""
    store = open_store(uri, s3)
    if "://" not in uri and not Path(uri).expanduser().is_dir():
        raise ValueError(f"the store {uri} does not exist; name another, or make one with enat run")
    return store
