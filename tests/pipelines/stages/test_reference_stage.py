"""Stage reference: the moments of real images, with either extractor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import open_dataset

from enat.metrics import FeatureMoments
from pipelines import workflow
from pipelines.artifacts import LocalStore
from pipelines.sources import DatasetConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InceptionV3 with random weights that are always the same, in torch's own format: the published ones cannot be had here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    skeleton = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        # The constructor insists on a file; an empty one lets it finish with what it drew.
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        skeleton.__init__("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(skeleton.state_dict(), path)
    return path


def test_moments_of_inception_are_those_of_torch_fidelitys_network(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], inception_weights: Path, image_folder: Path, tmp_path: Path
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    store = LocalStore(tmp_path / "store")
    overrides = ("reference.extractor=inception", f"reference.inception_weights={inception_weights}")
    done = workflow.execute(tiny_nodes(*overrides, until="reference"), make_session(store))[-1]
    moments = FeatureMoments.load(store.fetch(done.manifest, "moments.safetensors"))

    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(inception_weights))
    dataset = open_dataset(DatasetConfig(kind="image_folder", path=str(image_folder)), store)
    images = torch.from_numpy(dataset.load_images(16, 0, 100)[0])
    features = network(images)[0].double().numpy()
    assert moments.count == len(features) == 12
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-3, atol=1e-7)


def test_another_file_of_inception_weights_is_another_artifact(
    tiny_nodes: Callable[..., Any], inception_weights: Path, tmp_path: Path
) -> None:
    other, moved = tmp_path / "other.pth", tmp_path / "moved.pth"
    other.write_bytes(inception_weights.read_bytes() + b"x")
    moved.write_bytes(inception_weights.read_bytes())

    def key(path: Path) -> str:
        nodes = tiny_nodes("reference.extractor=inception", f"reference.inception_weights={path}", until="reference")
        return workflow.stage_key(nodes[-1], {})

    assert key(moved) == key(inception_weights)
    assert key(other) != key(inception_weights)
