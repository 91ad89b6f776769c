"""Moments computed on Ray equal those of numpy, whatever the workers, the batches and the order of blocks."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from layouts import open_dataset
from rich.console import Console

from enat.features import ClassifierExtractor
from pipelines.artifacts import LocalStore
from pipelines.dataset import Dataset
from pipelines.feature_job import BLOCK_SIZE, ExtractorFile, FeatureJob, SourceImages, compute_moments
from pipelines.progress import Bar
from pipelines.sources import DatasetConfig
from pipelines.workflow import Execution

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_FEATURES = 24


class ExactExtractor:
    """Features that are the same whatever the batch: sums of products of small integers, which float64 holds exactly.

    A network's own features change in their last bits with the batch, which would hide what the merging of moments does.
    """

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        self.weights = np.random.default_rng(0).integers(-9, 10, (3 * 16 * 16, NUM_FEATURES)).astype(np.float64)

    def load(self) -> ExactExtractor:
        return self

    def to(self, device: str) -> ExactExtractor:
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(images.flatten(1).numpy().astype(np.float64) @ self.weights + 1e6)


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_test_modules() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _moments(dataset: Dataset, num_images: int, extractor: Any, execution: Execution) -> FeatureJob:
    bar = Bar(Console(file=io.StringIO()), "test", num_images, "images")
    return compute_moments(SourceImages(dataset, 16), num_images, extractor, execution, bar)


def _oracle(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


NUM_IMAGES = 600  # two whole blocks and a piece of a third
SPREADS = [(num_workers, batch_size) for num_workers in (1, 2) for batch_size in (1, 8, 64)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(DatasetConfig(), LocalStore(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def moments_of(digits: Dataset) -> Callable[[int, int], FeatureJob]:
    """The job at a number of workers and a batch size, run once."""

    @functools.cache
    def run(num_workers: int, batch_size: int) -> FeatureJob:
        return _moments(digits, NUM_IMAGES, ExactExtractor(), Execution(num_workers=num_workers, batch_size=batch_size))

    return run


@pytest.mark.parametrize(("num_workers", "batch_size"), SPREADS)
def test_moments_of_the_digits_equal_those_of_numpy(digits: Dataset, moments_of, num_workers: int, batch_size: int) -> None:
    assert 2 * BLOCK_SIZE < NUM_IMAGES < 3 * BLOCK_SIZE
    images, _ = digits.load_images(16, 0, NUM_IMAGES)
    mean, covariance = _oracle(ExactExtractor()(torch.from_numpy(images)).numpy())
    job = moments_of(num_workers, batch_size)
    assert job.moments.count == NUM_IMAGES and job.worker_seconds > 0
    np.testing.assert_allclose(job.moments.mean, mean, rtol=1e-9, atol=0)
    np.testing.assert_allclose(job.moments.covariance, covariance, rtol=1e-9, atol=1e-9 * np.abs(covariance).max())


def test_moments_are_the_same_bits_whatever_the_workers_and_batches(moments_of) -> None:
    moments = [moments_of(*spread).moments for spread in SPREADS]
    assert len({(each.mean.tobytes(), each.covariance.tobytes()) for each in moments}) == 1


def test_unreadable_images_are_left_out_of_the_moments(broken_image_folder: Path, local_store: LocalStore) -> None:
    """As they are from the token map, so that both speak of the same images."""
    dataset = open_dataset(DatasetConfig(kind="image_folder", path=str(broken_image_folder)), local_store)
    extractor = ExactExtractor()
    images, _ = dataset.load_images(16, 0, 14)
    job = _moments(dataset, 14, extractor, Execution())
    assert job.moments.count == len(images) == 12
    np.testing.assert_allclose(job.moments.mean, _oracle(extractor(torch.from_numpy(images)).numpy())[0], rtol=1e-9)


def test_a_stored_extractor_is_opened_and_used_by_the_workers(digits: Dataset, local_store: LocalStore, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extractor = ClassifierExtractor(10).eval()
    extractor.save(tmp_path / "extractor.safetensors")
    record = local_store.put_file("reference", "k", "extractor.safetensors", tmp_path / "extractor.safetensors")
    stored = ExtractorFile(local_store, "classifier", "reference", "k", record)
    images, _ = digits.load_images(16, 0, 100)
    with torch.inference_mode():
        mean, covariance = _oracle(extractor(torch.from_numpy(images)).double().numpy())
    job = _moments(digits, 100, stored, Execution(batch_size=100))
    np.testing.assert_allclose(job.moments.mean, mean, atol=1e-5)  # float32 features: the last bits depend on threads
    np.testing.assert_allclose(job.moments.covariance, covariance, atol=1e-5)
