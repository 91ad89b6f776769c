"""A URI as an artifact store: a folder, or s3://bucket/prefix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage.base import StoreError
from pipelines.storage.redaction import without_credentials

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config


from pipelines.artifacts.local_store import LocalStore
from pipelines.artifacts.store import ArtifactStore


def open_store(uri: str, s3: S3Config | None = None) -> ArtifactStore:
    """A folder's path or s3://bucket/prefix -> the store there. s3: how the bucket is reached; without it, AWS's own settings
    decide. Raises StoreError for a kind of place that no store is written for."""
    if uri.startswith("s3://"):
        from pipelines.artifacts.s3_store import S3Store

        return S3Store(uri, s3)
    if "://" in uri:
        shown = without_credentials(uri)
        raise StoreError(f"the store {shown} is neither a folder nor s3://bucket/prefix; choose one with store=...")
    return LocalStore(Path(uri))


def open_existing(uri: str, s3: S3Config) -> ArtifactStore:
    """Raises ValueError for a folder that is not there: a mistyped store would look like an empty one."""
    store = open_store(uri, s3)
    if "://" not in uri and not Path(uri).expanduser().is_dir():
        raise ValueError(f"there is no store at {uri}; name another, or make one with enat run")
    return store
