"""Features computed on Ray equal those of numpy, with the same bits for any workers and batches and after any loss."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from material.layouts import open_dataset
from pipelines.artifacts.manifest import WORK
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution
from pipelines.data.dataset import Dataset
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import features
from pipelines.evaluation.features import BLOCK_SIZE, FeatureSet, FeatureSpec, compute_features, drawn_evenly, read_rows
from pipelines.evaluation.readers import Decoded, PixelBlocks, SourceImages
from pipelines.storage.local import LocalFolder

pytestmark = pytest.mark.usefixtures("ray_cluster")

WIDTH = 24
KEY = "f" * 64


@dataclass(frozen=True)
class SumsExtractor:
    """Features that do not depend on the batch: sums of products of small integers, which are exact in float32.

    The last bits of a network's features change with the batch, which would hide errors of merging moments.
    """

    folder: str = ""  # every pass writes a file there

    @property
    def outputs(self) -> dict[str, int]:
        return {"features": WIDTH, "logits": 2, "spatial": 5}

    def load(self) -> SumsExtractor:
        return self

    def to(self, device: str) -> SumsExtractor:
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.folder:
            Path(self.folder, os.urandom(8).hex()).write_text(str(len(images)))
        weights = np.random.default_rng(0).integers(-3, 4, (3 * 16 * 16, WIDTH)).astype(np.float32)
        sums = torch.from_numpy(images.flatten(1).numpy().astype(np.float32) @ weights + 1e5)
        return {"features": sums, "logits": sums[:, :2] - 7, "spatial": 2 * sums[:, :5]}


@dataclass(frozen=True)
class WrongExtractor(SumsExtractor):
    """Breaks its own declaration."""

    wrong: str = ""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().__call__(images)
        if self.wrong == "nan":
            outputs["logits"][3, 1] = torch.nan
        elif self.wrong == "width":
            outputs["spatial"] = outputs["spatial"][:, :4]
        else:
            del outputs["features"]
        return outputs


@dataclass(frozen=True)
class OtherSums(SumsExtractor):
    """Other features of the same images."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: 3 - values for name, values in super().__call__(images).items()}


@dataclass(frozen=True)
class CountedPixels(PixelBlocks):
    """Leaves a file for each pass that is decoded."""

    folder: str

    def decoder(self, device: str) -> Any:
        decode = super().decoder(device)

        def counted(rows: Any) -> Any:
            Path(self.folder, os.urandom(8).hex()).touch()
            return decode(rows)

        return counted


@dataclass(frozen=True)
class DyingImages:
    """Kills its worker once, at the first read at or after an index."""

    reader: SourceImages
    at: int
    marker: str

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        if start >= self.at and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader.read(start, stop, device)


class StoppingStore(ArtifactStore):
    """Stops the run right after a part is committed."""

    def put_part(self, stage: str, key: str, name: str, record: Any) -> None:
        super().put_part(stage, key, name, record)
        raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_test_modules():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def _a_part_is_a_block():
    """A few images make several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_BLOCKS_PER_PART", 1)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_dataset(DatasetConfig(kind="digits"), open_store(str(tmp_path_factory.mktemp("digits"))))


NUM_IMAGES = 600  # two whole blocks and a piece of a third


@pytest.mark.slow
def test_device_seconds_count_all_devices_that_workers_hold(digits, local_store, make_context):
    """All parts are committed, so the test needs no GPU. Loading images uses none."""
    context, spec = make_context(local_store, "evaluate", KEY), FeatureSpec(num_images=MANY, images_per_pass=64)
    found, one, half = (_sums(digits, context, spec, gpus_per_worker=count) for count in (0, 1, 0.5))
    assert one.worker_seconds == half.worker_seconds == found.worker_seconds
    assert half.device_seconds == pytest.approx(0.5 * one.device_seconds) and 0 < one.device_seconds < found.worker_seconds
    with pytest.raises(ValueError, match="num_images is 0"):
        FeatureSpec(num_images=0, images_per_pass=1)


class SlowPixels(PixelBlocks):
    """Decoding takes three times as long as extracting features."""

    def decoder(self, device: str) -> Any:
        def decode(rows: Any) -> Any:
            time.sleep(0.03)
            return Decoded(rows["pixels"])

        return decode


class SlowExtractor(SumsExtractor):
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        return super().__call__(images)


@pytest.mark.slow
def test_decoding_time_is_measured_separately(digits, local_store, make_context):
    spec = FeatureSpec(num_images=64, images_per_pass=32)
    context, reader = make_context(local_store, "evaluate", KEY), SlowPixels(SourceImages(digits, 16))
    found = compute_features(reader, spec, SlowExtractor(), Execution(), context)
    assert 2 * 0.03 <= found.decoding_seconds < found.worker_seconds - 2 * 0.01


def _sums(
    dataset: Dataset, context: Any, spec: FeatureSpec, reader: Any = None, extractor: Any = SumsExtractor(), **execution: Any
) -> FeatureSet:
    reader = PixelBlocks(reader or SourceImages(dataset, 16))
    return compute_features(reader, spec, extractor, Execution(**execution), context)


@pytest.mark.faults
def test_requested_rows_are_kept_and_moments_are_of_all_images(digits, local_store, make_context):
    kept = drawn_evenly(NUM_IMAGES, 50, seed=1)
    spec = FeatureSpec(num_images=NUM_IMAGES, images_per_pass=32, kept=kept)
    found = _sums(digits, make_context(local_store, "reference", KEY), spec)
    outputs = SumsExtractor()(torch.from_numpy(digits.load_images(16, 0, NUM_IMAGES)[0]))
    for name in ("features", "logits"):
        np.testing.assert_array_equal(read_rows(local_store, "reference", KEY, found.files, name), outputs[name].numpy()[kept])
    assert set(load_file(local_store.fetch_file("reference", KEY, found.files[0]))) == {"features", "logits"}
    for name in ("features", "spatial"):
        values = outputs[name].double().numpy()
        np.testing.assert_allclose(found.moments[name].mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.moments[name].covariance, np.cov(values.T), rtol=1e-9)
    assert set(found.moments) == {"features", "spatial"}
    none = FeatureSpec(num_images=20, images_per_pass=32, kept=np.empty(0, np.int64))
    found = _sums(digits, make_context(local_store, "reference", "e" * 64), none)
    assert found.files == () and found.moments["features"].count == 20


@pytest.mark.faults
def test_every_pass_has_the_same_number_of_images(digits, local_store, make_context, tmp_path):
    spec = FeatureSpec(num_images=37, images_per_pass=16)
    _sums(digits, make_context(local_store, "evaluate", KEY), spec, extractor=SumsExtractor(str(tmp_path)), worker_batch_size=1)
    passes = [int(path.read_text()) for path in tmp_path.iterdir() if path.is_file()]
    assert passes == [16, 16, 16]


@pytest.mark.slow
def test_images_are_decoded_once_for_several_extractors(digits, local_store, make_context, tmp_path):
    """Each gives what it gives alone, under its own key. One that was interrupted alone continues beside the others."""
    spec = FeatureSpec(num_images=MANY, images_per_pass=32)
    (tmp_path / "passes").mkdir()
    reader = CountedPixels(SourceImages(digits, 16), str(tmp_path / "passes"))
    first, second, third = (make_context(local_store, "evaluate", letter * 64) for letter in "abc")
    alone = {
        source: _sums(digits, make_context(local_store, "evaluate", key * 64), spec, extractor=source)
        for source, key in ((SumsExtractor(), "d"), (OtherSums(), "e"))
    }
    together = compute_features(
        reader, spec, SumsExtractor(), Execution(), first, beside=[(OtherSums(), second), (SumsExtractor(), third)]
    )
    num_decoded = len(list((tmp_path / "passes").iterdir()))
    _same(together, alone[SumsExtractor()])
    _same(compute_features(reader, spec, OtherSums(), Execution(), second), alone[OtherSums()])
    _same(compute_features(reader, spec, SumsExtractor(), Execution(), third), alone[SumsExtractor()])
    assert len(list((tmp_path / "passes").iterdir())) == num_decoded == 13, "passes of 32 images"
    parts = local_store.read_parts("evaluate", "a" * 64), local_store.read_parts("evaluate", "b" * 64)
    assert all({*found} == {"features-00000.safetensors", "features-00001.safetensors"} for found in parts)
    fourth, fifth = (make_context(local_store, "evaluate", letter * 64) for letter in "fg")
    compute_features(reader, FeatureSpec(num_images=MANY, images_per_pass=32), OtherSums(), Execution(), fifth)
    local_store.discard_part("evaluate", "g" * 64, "features-00001.safetensors")
    beside = [(OtherSums(), fifth)]
    _same(compute_features(reader, spec, SumsExtractor(), Execution(), fourth, beside=beside), alone[SumsExtractor()])
    _same(compute_features(reader, spec, OtherSums(), Execution(), fifth), alone[OtherSums()])


@pytest.mark.slow
def test_unreadable_images_are_left_out(broken_image_folder, local_store, make_context):
    """The token map leaves out the same images."""
    dataset = open_dataset(DatasetConfig(kind="image_folder", path=str(broken_image_folder)), local_store)
    images, _ = dataset.load_images(16, 0, 14)
    spec = FeatureSpec(num_images=14, images_per_pass=4, kept=np.arange(14))
    found = _sums(dataset, make_context(local_store, "reference", KEY), spec)
    assert found.count == found.num_kept == len(images) == 12
    expected = SumsExtractor()(torch.from_numpy(images))["features"].numpy()
    np.testing.assert_array_equal(read_rows(local_store, "reference", KEY, found.files, "features"), expected)


@pytest.mark.faults
def test_set_without_a_readable_image_is_an_error(tmp_path, local_store, make_context):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "text.jpg").write_text("this is not an image")
    dataset = open_dataset(DatasetConfig(kind="image_folder", path=str(tmp_path / "images")), local_store)
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        _sums(dataset, make_context(local_store, "reference", KEY), FeatureSpec(num_images=1, images_per_pass=4))


@pytest.mark.slow
def test_features_that_are_not_finite_are_an_error(digits, local_store, make_context):
    context, spec = make_context(local_store, "evaluate", KEY), FeatureSpec(num_images=20, images_per_pass=32)
    with pytest.raises((ValueError, ray.exceptions.RayTaskError), match=r"logits of images 0 to 19 .*not finite") as caught:
        _sums(digits, context, spec, extractor=WrongExtractor(wrong="nan"))
    assert isinstance(getattr(caught.value, "cause", caught.value), ValueError)  # the workflow shows it as one sentence


@pytest.mark.parametrize(
    ("wrong", "reason"), [("width", r"width 5 for spatial.* \(20, 4\)"), ("nothing", "width 24 for features.*nothing")]
)
def test_extractor_with_other_outputs_than_declared_is_an_error(digits, wrong, reason):
    reader, spec = PixelBlocks(SourceImages(digits, 16)), FeatureSpec(num_images=20, images_per_pass=32)
    block = {name: np.array([value]) for name, value in {"block": 0, "part": 0, "start": 0, "stop": 20}.items()}
    loaded = np.array(features._load(block, reader)["block"], object)
    with pytest.raises(ValueError, match=f"{reason}.* images 0 to 19"):
        features._Extract(reader, spec, [SumsExtractor(), WrongExtractor(wrong=wrong)], Execution())({"block": loaded})


# Resuming -------------------------------------------------------------------------------------------------------------------

MANY = 400  # a whole part and a piece of a second one, of one block each


@pytest.fixture(scope="module")
def undisturbed(digits, make_context, tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    return _sums(digits, make_context(store, "evaluate", KEY), FeatureSpec(num_images=MANY, images_per_pass=64))


def _same(found: FeatureSet, expected: FeatureSet) -> None:
    assert found.files == expected.files
    for name, moments in expected.moments.items():
        np.testing.assert_array_equal(found.moments[name].mean, moments.mean)
        np.testing.assert_array_equal(found.moments[name].covariance, moments.covariance)


@pytest.mark.faults
def test_features_survive_a_killed_worker(digits, local_store, make_context, undisturbed, tmp_path):
    reader = DyingImages(SourceImages(digits, 16), BLOCK_SIZE, str(tmp_path / "killed"))
    context, spec = make_context(local_store, "evaluate", KEY), FeatureSpec(num_images=MANY, images_per_pass=64)
    _same(_sums(digits, context, spec, reader=reader), undisturbed)
    assert (tmp_path / "killed").exists()


@pytest.mark.faults
def test_stopped_job_resumes_after_its_committed_parts(digits, local_store, make_context, undisturbed, tmp_path):
    context, spec = make_context(local_store, "evaluate", KEY), FeatureSpec(num_images=MANY, images_per_pass=64)
    with pytest.raises(KeyboardInterrupt):
        _sums(digits, make_context(StoppingStore(local_store.folder), "evaluate", KEY), spec)
    assert list(local_store.read_parts("evaluate", KEY)) == ["features-00000.safetensors"]
    found = _sums(digits, context, spec, extractor=SumsExtractor(str(tmp_path)))
    num_passes = sum(path.is_file() for path in tmp_path.iterdir())
    assert num_passes == 3, "the second part only, 144 images"
    _same(found, undisturbed)
    _same(_sums(digits, context, spec, extractor=WrongExtractor(wrong="nan")), undisturbed)  # nothing left to compute


class FailingStore(ArtifactStore):
    """Fails to write after a while, when the next part is already waiting."""

    asked: ClassVar[list[str]] = []

    def put_part(self, stage: str, key: str, name: str, record: Any) -> None:
        self.asked.append(name)
        time.sleep(0.3)
        raise OSError("no space left")


def test_no_part_is_written_after_one_that_failed(tmp_path, make_context):
    parts = [range(0, BLOCK_SIZE), range(BLOCK_SIZE, MANY)]
    blocks = [
        {"part": number, "start": part.start, "images": len(part), "outputs": [features._Outputs(len(part))]}
        for number, part in enumerate(parts)
    ]
    computed = iter([{**block, "seconds": [0.0], "decoding_seconds": 0.0, "loading_seconds": 0.0} for block in blocks])
    store = FailingStore(LocalFolder(tmp_path / "full"))
    writer = features._PartWriter(parts, "", make_context(store, "evaluate", KEY))
    with pytest.raises(OSError, match="no space left"):
        features._write_all([writer], parts, 0, computed, lambda _: None)
    assert store.asked == ["features-00000.safetensors"] and writer.records == []


@pytest.mark.faults
def test_intermediate_moments_are_not_part_of_the_artifact(undisturbed):
    assert [file.name for file in undisturbed.files] == ["features-00000.safetensors", "features-00001.safetensors"]
    assert not any(file.path.startswith(WORK) for file in undisturbed.files)


# Pieces --------------------------------------------------------------------------------------------------------------------


@given(num_images=st.integers(1, 400), count=st.integers(0, 500), seed=st.integers(0, 9))
def test_one_index_is_drawn_from_each_interval(num_images, count, seed):
    drawn = drawn_evenly(num_images, count, seed)
    assert len(drawn) == min(count, num_images) and (np.diff(drawn) > 0).all()
    if 0 < count < num_images:
        edges = np.arange(count + 1) * num_images // count
        assert ((edges[:-1] <= drawn) & (drawn < edges[1:])).all()
    np.testing.assert_array_equal(drawn, drawn_evenly(num_images, count, seed))
