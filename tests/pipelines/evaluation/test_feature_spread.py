"""Features of the job give the distance of all features at once, to 40 digits, and have the same bits for any number of workers,
batch size and threads, and any order in which blocks return."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import ray
import torch

from enat.metrics.classifier import ClassifierExtractor
from enat.metrics.moments import FeatureMoments, frechet_distance
from material.layouts import open_dataset
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import features as evaluation_features
from pipelines.evaluation.extractors import ExtractorFile
from pipelines.evaluation.features import FeatureSet, FeatureSpec, compute_features, read_rows
from pipelines.evaluation.readers import PixelBlocks, SourceImages, read_images, run_pass
from references.precise import precise_distance

KEY = "f" * 64
NUM_IMAGES, BLOCK, PASS, WIDTH = 150, 32, 4, 12  # five blocks, the last a piece; parts of two blocks
CPUS = {1: 2, 2: 1, 4: 0.5}  # of each worker; the cluster has two. With one worker, passes run in parallel on two threads


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_test_modules():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def _small_blocks_and_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_features, "BLOCK_SIZE", BLOCK)
        patch.setattr(evaluation_features, "_BLOCKS_PER_PART", 2)
        patch.setattr(evaluation_features, "_BLOCKS_PER_SUM", 1)
        yield


@dataclass(frozen=True)
class LateImages:
    """Every other block is slow, the first one most, so later blocks return before it."""

    reader: SourceImages

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        time.sleep({0: 1.0, 2: 0.4, 4: 0.2}.get(start // BLOCK, 0.0))
        return self.reader.read(start, stop, device)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_dataset(DatasetConfig(kind="digits"), open_store(str(tmp_path_factory.mktemp("digits"))))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A stored network with random weights. The last bits of its features depend on the rest of the batch."""
    store, folder = open_store(str(tmp_path_factory.mktemp("extractor"))), tmp_path_factory.mktemp("file")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ClassifierExtractor(10, num_features=WIDTH, width=8).eval().save(folder / "extractor.safetensors")
    record = store.put_file("reference", "k", "extractor.safetensors", folder / "extractor.safetensors")
    return ExtractorFile.of(store, "classifier", "reference", "k", record)


@dataclass(frozen=True)
class Expected:
    """features: float32 (N, F), pass by pass without the job.   reference: of other images.   distance: to 40 digits."""

    features: np.ndarray
    reference: FeatureMoments
    distance: float


@pytest.fixture(scope="module")
def expected(digits, network):
    extractor, num_threads = network.load(), torch.get_num_threads()
    torch.set_num_threads(1)
    sets = []
    for start in (0, NUM_IMAGES):
        pixels = read_images(PixelBlocks(SourceImages(digits, 16)), start, start + NUM_IMAGES, NUM_IMAGES).numpy()
        # A pass ends where its block does.
        blocks = [pixels[first : first + BLOCK] for first in range(0, NUM_IMAGES, BLOCK)]
        passes = [block[first : first + PASS] for block in blocks for first in range(0, len(block), PASS)]
        found = [run_pass(lambda rows: extractor(rows["pixels"]), {"pixels": rows}, PASS, "cpu") for rows in passes]
        sets.append(np.concatenate([each["features"] for each in found]))
    torch.set_num_threads(num_threads)
    return Expected(sets[0], FeatureMoments(WIDTH).add(sets[1]), precise_distance(*sets))


@pytest.fixture(scope="module")
def computed(
    digits,
    network,
    ray_cluster,
    make_context,
    tmp_path_factory,
):
    """Run the job once for each distribution of the work."""

    @functools.cache
    def run(num_workers: int, batch_size: int, is_late: bool = False) -> tuple[ArtifactStore, FeatureSet]:
        store, images = open_store(str(tmp_path_factory.mktemp("store"))), SourceImages(digits, 16)
        execution = Execution(num_workers=num_workers, worker_batch_size=batch_size, cpus_per_worker=CPUS[num_workers])
        spec = FeatureSpec(num_images=NUM_IMAGES, images_per_pass=PASS)
        reader = PixelBlocks(LateImages(images) if is_late else images)
        return store, compute_features(reader, spec, network, execution, make_context(store, "evaluate", KEY))

    return run


def check(store: ArtifactStore, found: FeatureSet, expected: Expected) -> None:
    assert found.count == found.num_kept == NUM_IMAGES and found.worker_seconds > 0 == found.device_seconds
    np.testing.assert_array_equal(read_rows(store, "evaluate", KEY, found.files, "features"), expected.features)
    moments, features = found.moments["features"], expected.features.astype(np.float64)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-9, atol=1e-12)
    assert frechet_distance(moments, expected.reference) == pytest.approx(expected.distance, rel=1e-9)


def _bits(store: ArtifactStore, found: FeatureSet) -> tuple[Any, ...]:
    moments = found.moments["features"]
    return moments.mean.tobytes(), moments.covariance.tobytes(), tuple(file.sha256 for file in found.files)


@pytest.mark.faults
def test_distance_is_that_of_all_features_at_once(computed, expected):
    """On one worker with two threads. The fault tests distribute it otherwise."""
    store, found = computed(1, 64)
    check(store, found, expected)
    with pytest.raises(ValueError, match="keeps no logits"):
        read_rows(store, "evaluate", KEY, found.files, "logits")


@pytest.mark.faults
@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 1), (2, 8), (4, 1), (4, 64)])
def test_distribution_of_the_work_changes_no_bit(computed, expected, num_workers, batch_size):
    check(*computed(num_workers, batch_size), expected)
    assert _bits(*computed(num_workers, batch_size)) == _bits(*computed(1, 64))


@pytest.mark.faults
def test_blocks_that_return_in_another_order_change_no_bit(computed, expected):
    check(*computed(4, 8, is_late=True), expected)
    assert _bits(*computed(4, 8, is_late=True)) == _bits(*computed(1, 64))


# The driver's side alone -----------------------------------------------------------------------------------------------------


def _records(features: np.ndarray) -> list[dict[str, Any]]:
    """Records that workers send for the blocks at 0, BLOCK, ..., in order."""
    records = []
    for number, start in enumerate(range(0, len(features), BLOCK)):
        rows = features[start : start + BLOCK]
        outputs = [evaluation_features._Outputs(len(rows), len(rows), {"features": rows}, {"features": rows})]
        seconds = {"seconds": [0.0], **dict.fromkeys(("loading_seconds", "decoding_seconds"), 0.0)}
        records.append({"part": number // 2, "start": start, "images": len(rows), "outputs": outputs, **seconds})
    return records


def _written(records: list[dict[str, Any]], store: ArtifactStore, make_context: Callable[..., Any]) -> FeatureMoments:
    parts = [range(start, min(start + 2 * BLOCK, NUM_IMAGES)) for start in range(0, NUM_IMAGES, 2 * BLOCK)]
    writer = evaluation_features._PartWriter(parts, "", make_context(store, "evaluate", KEY))
    evaluation_features._write_all([writer], parts, 0, iter(records), lambda _: None)
    assert [record["rows"] for record in writer.records] == [record["kept"] for record in writer.records] == [64, 64, 22]
    return writer.moments["features"]


@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_moments_do_not_depend_on_the_order_of_arrival(expected, order, make_context, tmp_path):
    records = _records(expected.features)
    arrived = records[::-1]
    if order == "shuffled":
        np.random.default_rng(0).shuffle(arrived)
    moments = _written(arrived, open_store(str(tmp_path / "one")), make_context)
    in_order = _written(records, open_store(str(tmp_path / "other")), make_context)
    assert moments.mean.tobytes() == in_order.mean.tobytes()
    assert moments.covariance.tobytes() == in_order.covariance.tobytes()
    assert frechet_distance(moments, expected.reference) == pytest.approx(expected.distance, rel=1e-9)
    files = [sorted(asdict(file).items() for file in _files(open_store(str(tmp_path / name)))) for name in ("one", "other")]
    assert files[0] == files[1]


def _files(store: ArtifactStore) -> list[Any]:
    return [evaluation_features.FileRecord(**record["file"]) for record in store.read_parts("evaluate", KEY).values()]


def test_driver_adds_a_few_blocks_at_once(expected, make_context, local_store, monkeypatch):
    """It holds no float64 copy of a whole part."""
    sizes, add = [], FeatureMoments.add
    monkeypatch.setattr(FeatureMoments, "add", lambda self, rows: (sizes.append(len(rows)), add(self, rows))[1])
    _written(_records(expected.features), local_store, make_context)
    assert sizes == [32, 32, 32, 32, 22]


def test_parts_are_of_bounded_size(monkeypatch):
    monkeypatch.setattr(evaluation_features, "BLOCK_SIZE", 256)
    monkeypatch.setattr(evaluation_features, "_BLOCKS_PER_PART", 4)
    for num_images in (1, 1024, 50_000, 262_144, 1_281_167):
        size = evaluation_features._part_size(num_images)
        assert size % 256 == 0 and 1024 <= size <= 8192
        assert -(-num_images // size) <= 32 or size == 8192
