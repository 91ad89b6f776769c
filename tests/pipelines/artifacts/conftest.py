"""A store under test in a folder and in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import Place, open_place


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return open_place(request, tmp_path, monkeypatch)
