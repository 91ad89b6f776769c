"""A store under test in a folder and in a bucket."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from material.places import KEY, STAGE, Place, open_place
from pipelines.artifacts.manifest import FileRecord
from pipelines.artifacts.store import ArtifactStore


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return open_place(request, tmp_path, monkeypatch)


@pytest.fixture
def store(place: Place) -> ArtifactStore:
    return place.store


@pytest.fixture
def put(store: ArtifactStore, tmp_path: Path) -> Callable[..., FileRecord]:
    def put(content: bytes, name: str = "model.safetensors", key: str = KEY) -> FileRecord:
        source = tmp_path / f"source-{threading.get_ident()}"
        source.write_bytes(content)
        return store.put_file(STAGE, key, name, source)

    return put
