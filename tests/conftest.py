"""Fixtures for all tests. Nothing starts before a test asks for it: most tests need neither Ray nor a store.

With pytest-xdist every worker process has its own: temporary folders, cache, Ray cluster, S3 endpoint. Only the run of the command
line in material/digits_run.py is shared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipelines.cluster import connection

pytest_plugins = ["services.chromium", "material.digits_run", "slices"]

# Set before torch is imported. Its threads only get in each other's way on tensors as small as those of the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait for others would compute nothing and keep a core from the tests beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Called before ray is imported, because ray reads its environment then.
connection.prepare_environment()

# No deadline: single examples are slow on a shared machine. No database: an example that failed once becomes a test.
settings.register_profile("repository", deadline=None, database=None)
settings.load_profile("repository")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither this process, nor Ray's workers, nor commands that tests start touch the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of two CPUs for the whole session. The first test that asks for it starts it."""
    import ray

    connection.connect(connection.ClusterConfig(address="local", num_cpus=2))
    yield
    ray.shutdown()


@pytest.fixture
def local_store(tmp_path: Path):
    """An empty store in a folder."""
    from pipelines.artifacts.open import open_store

    return open_store(str(tmp_path / "store"))
