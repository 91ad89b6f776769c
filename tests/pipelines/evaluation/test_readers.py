"""Passes that run in parallel compute what sequential passes compute, with a network that threads share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from enat.metrics.inception import InceptionExtractor, random_inception_weights
from pipelines.cluster.resources import Execution
from pipelines.evaluation.features import FeatureSpec, _Extract, _load
from pipelines.evaluation.readers import Decoded, run_pass
from pipelines.sampling.fixed_batches import pass_pool

TWO_THREADS = Execution(num_workers=1, cpus_per_worker=2, worker_batch_size=64)


def pixels(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side)).astype(np.uint8)


@dataclass(frozen=True)
class Pixels:
    """A block reader of an array."""

    images: np.ndarray

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"pixels": self.images[start:stop]}

    def decoder(self, device: str) -> Any:
        return lambda rows: Decoded(rows["pixels"])


@dataclass(frozen=True)
class Here:
    """A source that holds its extractor."""

    extractor: Any

    def load(self) -> Any:
        return self.extractor


@pytest.mark.slow
def test_inception_gives_every_image_its_own_spatial_features_in_parallel_passes():
    """The two passes wait for each other between the layer of these features and the end of the network."""
    extractor, images = InceptionExtractor(random_inception_weights()), pixels(2, 32)

    def outputs(rows: np.ndarray) -> dict[str, np.ndarray]:
        return run_pass(lambda padded: extractor(padded["pixels"]), {"pixels": rows}, 1, "cpu")

    passes = (images[:1], images[1:])
    with pass_pool(1) as pool:
        expected = list(pool.map(outputs, passes))
    both_are_past = threading.Barrier(2)

    def wait(*_: Any) -> None:
        both_are_past.wait(60)

    extractor.network.Mixed_7a.register_forward_pre_hook(wait)
    with pass_pool(2) as pool:
        found = list(pool.map(outputs, passes))
    assert np.abs(expected[0]["spatial"] - expected[1]["spatial"]).max() > 0.1, "equality must mean something"
    for name in extractor.outputs:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)


@dataclass
class CountingExtractor:
    """Counts concurrent calls. Each call waits a moment for a second one."""

    outputs: dict[str, int] = field(default_factory=lambda: {"features": 1})
    most: int = 0
    running: int = 0
    second: threading.Event = field(default_factory=threading.Event)

    def to(self, device: str) -> CountingExtractor:
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running > 1:
            self.second.set()
        self.second.wait(0.2)
        self.running -= 1
        return {"features": images.flatten(1)[:, :1].float()}


class ThreadSafeExtractor(CountingExtractor):
    is_thread_safe = True


@pytest.mark.parametrize(("extractor", "most"), [(CountingExtractor(), 1), (ThreadSafeExtractor(), 2)])
def test_only_a_thread_safe_extractor_is_called_by_several_threads(extractor, most):
    reader, spec = Pixels(pixels(4, 2)), FeatureSpec(num_images=4, images_per_pass=2)
    extract = _Extract(reader, spec, [Here(extractor)], TWO_THREADS)
    block = {name: np.array([value]) for name, value in {"block": 0, "part": 0, "start": 0, "stop": 4}.items()}
    (record,) = extract({"block": np.array(_load(block, reader)["block"], object)})["record"]
    assert record["images"] == 4 and extractor.most == most
