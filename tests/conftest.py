"""Fixtures for all tests. Nothing starts before a test asks for it: most tests need neither Ray nor a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipelines.cluster import connection

# Before anything imports torch: its threads only get in each other's way on what is as small as in tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports ray: it reads its environment when it is imported.
connection.prepare_environment()

# A shared machine makes single examples slow; examples that once failed belong into tests, not into a hidden folder.
settings.register_profile("repository", deadline=None, database=None)
settings.load_profile("repository")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is neither read nor filled, by this process, by Ray's workers or by commands that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of two CPUs for the whole session, started by the first test that asks for it."""
    import ray

    connection.connect(connection.ClusterConfig(address="local", num_cpus=2))
    yield
    ray.shutdown()


@pytest.fixture
def local_store(tmp_path: Path):
    """An empty store in a folder."""
    from pipelines.artifacts.local_store import LocalStore

    return LocalStore(tmp_path / "store")
