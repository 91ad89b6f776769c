"""Stage reconstruction: images decoded from the token map, compared with their originals as by scikit-image and numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enat.images import to_uint8
from enat.metrics.moments import FeatureMoments, frechet_distance
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import TokenizerExecution
from pipelines.data import token_map
from pipelines.data.dataset import Dataset
from pipelines.evaluation.extractors import ExtractorFile
from pipelines.evaluation.features import stored_moments
from pipelines.stages import reconstruction
from pipelines.stages import reference as reference_stage
from pipelines.workflow import driver
from pipelines.workflow.stage import Node, StageResult

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]

KEY = "d" * 64


@dataclass(frozen=True)
class Made:
    """Stages up to reference and token map, of twelve photographs and two unreadable files."""

    store: ArtifactStore
    manifests: dict[str, Manifest]
    nodes: dict[str, Node]

    @property
    def inputs(self) -> dict[str, Manifest]:
        return {name: self.manifests[name] for name in ("token_map", "tokenizer", "dataset", "reference")}


@pytest.fixture(scope="module")
def made(
    tiny_nodes: Callable[..., Any],
    make_session: Callable[..., Any],
    broken_image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    store = open_store(str(tmp_path_factory.mktemp("reconstruction") / "store"))
    overrides = (f"dataset.path={broken_image_folder}", "token_map.max_quarantine_share=0.5", "reference.forward_batch_size=4")
    nodes = {node.id: node for until in ("reference", "token_map") for node in tiny_nodes(*overrides, until=until)}
    ordered = [nodes[name] for name in ("dataset", "tokenizer", "token_map", "reference")]
    done = driver.execute(ordered, make_session(store))
    return Made(store, {item.node.id: item.manifest for item in done}, nodes)


@pytest.fixture(scope="module")
def reconstructed(made: Made, make_context: Callable[..., Any]) -> Callable[..., StageResult]:
    def run(key: str = KEY, num_images: int | None = None, **execution: Any) -> StageResult:
        dataset = made.nodes["dataset"].config
        config = reconstruction.ReconstructionConfig(
            num_images=num_images, dataset=dataset, execution=TokenizerExecution(**execution)
        )
        return reconstruction.run(config, made.inputs, make_context(made.store, "reconstruction", key))

    return run


@pytest.fixture(scope="module")
def result(reconstructed: Callable[..., StageResult]) -> StageResult:
    return reconstructed()


@pytest.fixture(scope="module")
def pairs(made: Made, vqgan) -> tuple[torch.Tensor, torch.Tensor]:
    """The readable originals, and their codes decoded: uint8 (12, 3, 16, 16)."""
    dataset = Dataset(made.nodes["dataset"].config, made.store, made.manifests["dataset"])
    originals = torch.from_numpy(dataset.load_images(16, 0, 14)[0])
    _, codes = token_map.read_codes(made.store, made.manifests["token_map"], range(12))
    return originals, to_uint8(vqgan.decode(torch.from_numpy(codes.astype(np.int64)).view(-1, 4, 4)))


def test_psnr_and_ssim_equal_those_of_scikit_image(result: StageResult, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    arrays = [tensor.permute(0, 2, 3, 1).numpy() for tensor in pairs]
    ratios = [peak_signal_noise_ratio(original, decoded) for original, decoded in zip(*arrays, strict=True)]
    similar = [
        structural_similarity(
            original, decoded, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for original, decoded in zip(*arrays, strict=True)
    ]
    assert result.metrics["psnr"] == pytest.approx(np.mean(ratios), abs=0.02)  # a code's pixel may round the other way
    assert result.metrics["ssim"] == pytest.approx(np.mean(similar), abs=2e-3)
    assert result.summary.num_images == 12


def test_distance_is_that_of_decoded_images_to_the_reference(
    result: StageResult, made: Made, pairs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    extractor = ExtractorFile.of_reference(made.store, made.manifests["reference"]).load()
    with torch.inference_mode():
        features = extractor(pairs[1])["features"]
    real = stored_moments(made.store, made.manifests["reference"])["features"]
    expected = frechet_distance(FeatureMoments(64).add(features), real)
    assert result.metrics["reconstruction_frechet_distance"] == pytest.approx(expected, rel=1e-2) and expected > 0
    assert "reconstruction_fid" not in result.metrics  # which is of Inception's features
    for name in ("code_usage", "code_perplexity"):
        assert result.metrics[name] == made.manifests["token_map"].metrics[name] > 0


@pytest.mark.faults
def test_result_does_not_depend_on_workers_and_batches(result: StageResult, reconstructed: Callable[..., StageResult]) -> None:
    other = reconstructed("c" * 64, num_workers=2, worker_batch_size=1)
    assert other.metrics == result.metrics
    assert [(file.name, file.sha256) for file in other.files] == [(file.name, file.sha256) for file in result.files]
    assert reconstructed("b" * 64, num_images=5).summary.num_images == 5


def test_wrong_inputs_are_refused(made: Made, make_context: Callable[..., Any]) -> None:
    config = reconstruction.ReconstructionConfig(dataset=made.nodes["dataset"].config)
    real, tokenizer = made.manifests["reference"], made.manifests["tokenizer"]
    for changed, sentence in (
        ({"tokenizer": replace(tokenizer, key="0" * 64)}, "the tokenizer expects tokenizer"),
        (
            {"reference": replace(real, summary={**real.summary, "resolution": 8})},
            "the token map has 16 px and the reference 8 px",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            reconstruction.run(config, {**made.inputs, **changed}, make_context(made.store, "reconstruction", KEY))
    with pytest.raises(ValueError, match=r"num_images is 1; it must be at least 2"):
        reconstruction.ReconstructionConfig(num_images=1)
    assert real.summary["of"] == f"photographs, 16 px, {reference_stage.CROP}"
    assert token_map.TokenMapInfo(**made.manifests["token_map"].summary["info"]).crop == reference_stage.CROP
