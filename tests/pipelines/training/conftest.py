"""Fixtures of the tests of training: a key of the store for each test, and results of the plain loop."""

from __future__ import annotations

from functools import cache

import pytest

from material.tiny_training import CONFIG, Material, Trained
from references.plain_training import Plainly, train_plainly


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return request.node.name


@pytest.fixture(scope="session")
def plainly(material: Material) -> Plainly:
    """Train with the plain loop, once per config."""
    return cache(lambda config: train_plainly(material, config))


@pytest.fixture(scope="session")
def plain(plainly: Plainly) -> Trained:
    return plainly(CONFIG)
