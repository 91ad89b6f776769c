"""Stage reference: features of real images, of a dataset or of ADM's reference file, by any extractor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enat.metrics.classifier import ClassifierExtractor
from enat.metrics.inception import random_inception_weights
from enat.metrics.moments import FeatureMoments, FeatureStatistics, load_moments
from material.layouts import open_dataset
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation.adm_reference import NpzReference
from pipelines.evaluation.features import feature_files, read_rows
from pipelines.stages import reference
from pipelines.workflow import driver
from pipelines.workflow.stage import StageResult

pytestmark = pytest.mark.usefixtures("ray_cluster")

KEY = "e" * 64


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InceptionV3 with drawn weights, in torch's own format."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(random_inception_weights(), path)
    return path


@pytest.mark.faults
def test_moments_of_inception_equal_those_of_torch_fidelity(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], inception_weights: Path, image_folder: Path, tmp_path: Path
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    store = open_store(str(tmp_path / "store"))
    overrides = ("reference.extractor=inception", f"reference.weights={inception_weights}", "reference.forward_batch_size=4")
    done = driver.execute(tiny_nodes(*overrides, "reference.num_kept=5", until="reference"), make_session(store))[-1]
    moments = FeatureMoments.load(store.fetch(done.manifest, "moments.safetensors"))

    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(inception_weights))
    dataset = open_dataset(DatasetConfig(kind="image_folder", path=str(image_folder)), store)
    images = torch.from_numpy(dataset.load_images(16, 0, 100)[0])
    features = network(images)[0].double().numpy()
    assert moments.count == len(features) == 12
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-3, atol=1e-7)
    assert load_moments(store.fetch(done.manifest, "spatial_moments.safetensors")).mean.shape == (2023,)
    summary = done.manifest.summary
    assert read_rows(store, "reference", done.manifest.key, feature_files(done.manifest), "logits").shape == (5, 1008)
    assert (summary["num_images"], summary["num_kept"], summary["images_per_pass"]) == (12, 5, 4)
    assert summary["of"] == "photographs, 16 px, adm-center" and summary["rounding"] == "uint8"
    assert summary["extractor_digest"] == done.manifest.file("extractor.safetensors").sha256
    assert summary["outputs"] == {"features": 2048, "spatial": 2023, "logits": 1008} and not summary["is_imported"]


@pytest.mark.slow
def test_key_depends_on_the_content_of_the_weights(tiny_nodes: Callable[..., Any], inception_weights: Path, tmp_path: Path) -> None:
    other, moved = tmp_path / "other.pth", tmp_path / "moved.pth"
    other.write_bytes(inception_weights.read_bytes() + b"x")
    moved.write_bytes(inception_weights.read_bytes())

    def key(path: Path, *overrides: str) -> str:
        nodes = tiny_nodes("reference.extractor=inception", f"reference.weights={path}", *overrides, until="reference")
        return driver.stage_key(nodes[-1], {})

    assert key(moved) == key(inception_weights)
    assert key(moved, "seed=7") == key(inception_weights)  # runs of other seeds have the same reference
    assert key(moved, "reference.execution.worker_batch_size=3") == key(inception_weights)
    different = {key(other), key(moved, "reference.num_kept=7"), key(moved, "reference.forward_batch_size=8"), key(moved)}
    assert len(different) == 4


# ADM's reference files -----------------------------------------------------------------------------------------------------


def _statistics(width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=(50, width))
    return values.mean(axis=0), np.cov(values.T)


def _write_npz(path: Path, width: int = 2048, images: np.ndarray | None = None, **arrays: np.ndarray) -> Path:
    mu, sigma = _statistics(width, 0)
    mu_s, sigma_s = _statistics(2023, 1)
    held = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, **({} if images is None else {"arr_0": images})}
    np.savez(path, **{**held, **arrays})
    return path


def _images(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _run(config: reference.ReferenceConfig, make_context: Callable[..., Any], store: ArtifactStore) -> StageResult:
    return reference.run(config, {}, make_context(store, "reference", KEY))


def _config(path: Path, weights: Path, **given: Any) -> reference.ReferenceConfig:
    common = {"extractor": "inception", "weights": str(weights), "npz": str(path), "resolution": 16, "seed": 0}
    return reference.ReferenceConfig(**{**common, **given})


def test_statistics_of_a_published_file_are_used_unchanged(
    inception_weights: Path, make_context, local_store: ArtifactStore, tmp_path: Path
) -> None:
    path = _write_npz(tmp_path / "VIRTUAL_photographs16.npz")
    result = _run(_config(path, inception_weights), make_context, local_store)
    files = {file.name: local_store.fetch_file("reference", KEY, file) for file in result.files}
    assert set(files) == {"extractor.safetensors", "moments.safetensors", "spatial_moments.safetensors"}
    for name, (mean, covariance) in (("moments", _statistics(2048, 0)), ("spatial_moments", _statistics(2023, 1))):
        found = load_moments(files[f"{name}.safetensors"])
        assert isinstance(found, FeatureStatistics)
        np.testing.assert_array_equal(found.mean, mean)
        np.testing.assert_array_equal(found.covariance, covariance)
    assert result.summary.of == "VIRTUAL_photographs16.npz, 16 px" and result.summary.is_imported
    assert result.summary.num_images is None and result.summary.num_kept == 0  # the file does not state it


@pytest.mark.faults
def test_features_of_images_in_a_published_file_are_kept(
    inception_weights: Path, make_context, local_store: ArtifactStore, tmp_path: Path
) -> None:
    from enat.metrics.extractors import load_extractor

    path = _write_npz(tmp_path / "with-images.npz", images=_images(5))
    result = _run(_config(path, inception_weights, forward_batch_size=5), make_context, local_store)
    files = {file.name: local_store.fetch_file("reference", KEY, file) for file in result.files}
    np.testing.assert_array_equal(load_moments(files["moments.safetensors"]).mean, _statistics(2048, 0)[0])
    kept = read_rows(
        local_store, "reference", KEY, [file for file in result.files if file.name.startswith("features-")], "features"
    )
    network = load_extractor("inception", files["extractor.safetensors"])
    expected = network(torch.from_numpy(_images(5).transpose(0, 3, 1, 2)))["features"].numpy()
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-5)
    assert result.summary.num_kept == 5


@pytest.mark.slow
def test_reference_files_that_do_not_fit_are_refused(
    inception_weights: Path, make_context, local_store: ArtifactStore, tmp_path: Path
) -> None:
    path = tmp_path / "reference.npz"
    for arrays, reason in (
        ({"mu": np.zeros(2047)}, "mu"),
        ({"mu": np.full(2048, np.nan)}, "not finite"),
        ({"mu": np.array([{}], object)}, "mu"),
        ({"arr_0": _images(2, side=8)}, "has images of 8 px, but this run makes 16 px"),
        ({"arr_0": _images(2).astype(np.float32)}, "arr_0"),
    ):
        _write_npz(path, **arrays)
        with pytest.raises(ValueError, match=rf"reference\.npz.*{reason}"):
            _run(_config(path, inception_weights), make_context, local_store)
    found = NpzReference.open(str(_write_npz(tmp_path / "narrow.npz", width=64)), None)
    with pytest.raises(ValueError, match=r"has 64 features; Inception has 2048"):
        found.check("inception", {"features": 2048, "spatial": 2023}, 16)
    with pytest.raises(ValueError, match="no images; set extractor: inception"):
        found.check("dinov2", {"features": 384}, 16)
    for content in (b"", b"not a zip", b"PK\x03\x04 half"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"reference\.npz: .* cannot be read as an \.npz"):
            NpzReference.open(str(path), None)
    np.savez(path, values=np.zeros(3))
    with pytest.raises(ValueError, match=r"neither images .* nor statistics"):
        NpzReference.open(str(path), None)


# Configs that are refused --------------------------------------------------------------------------------------------------


def test_wrong_configs_are_refused() -> None:
    for wrong, reason in (
        ({"extractor": "resnet"}, "'resnet'; choose one of classifier, inception, inception_clean, dinov2, clip"),
        ({"extractor": "classifier", "npz": "a.npz"}, "leave reference.npz and reference.weights out"),
        ({"extractor": "classifier", "weights": "a.pth"}, "reference.weights out"),
        ({"extractor": "dinov2"}, "needs reference.weights: a folder"),
        ({"num_kept": -1}, "num_kept is -1; it must be at least 0"),
        ({"forward_batch_size": 0}, "forward_batch_size is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            reference.ReferenceConfig(**wrong)


@pytest.mark.slow
def test_stage_resumes_with_the_trained_classifier(
    make_context, local_store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed features are those of this classifier."""
    dataset = open_dataset(DatasetConfig(kind="digits"), local_store)
    config = reference.ReferenceConfig(
        num_epochs=1, resolution=16, seed=0, dataset=DatasetConfig(kind="digits"), execution=Execution(num_workers=1)
    )
    context, inputs = make_context(local_store, "reference", KEY), {"dataset": dataset.manifest}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference, "compute_features", stop)
        with pytest.raises(KeyboardInterrupt):
            reference.run(config, inputs, context)
    committed = local_store.read_parts("reference", KEY)["extractor.safetensors"]
    monkeypatch.setattr(ClassifierExtractor, "__init__", stop)  # loading does not create one in this process either
    monkeypatch.setattr(reference, "_train_classifier", stop)
    monkeypatch.setattr(reference.ExtractorFile, "load", lambda self: type("Known", (), {"outputs": {"features": 64}}))
    monkeypatch.setattr(reference, "compute_features", lambda *_: _nothing_computed())
    result = reference.run(config, inputs, context)
    assert result.files[0].sha256 == committed["file"]["sha256"] and result.metrics["held_out_accuracy"] > 0.1
    assert result.summary.num_kept == 1790, "the number of committed rows"


def _nothing_computed() -> Any:
    from pipelines.evaluation.features import FeatureSet

    moments = {"features": FeatureMoments(64)}
    times = ("worker_seconds", "device_seconds", "decoding_seconds")
    return FeatureSet(count=1797, num_kept=1790, moments=moments, files=(), **dict.fromkeys(times, 0.0))
