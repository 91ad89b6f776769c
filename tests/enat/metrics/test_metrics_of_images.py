"""Scores of the same photographs by the same network equal torch-fidelity's, from files to numbers."""

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from skimage import data
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from enat.metrics.inception import random_inception_weights
from enat.metrics.moments import FeatureMoments, frechet_distance, inception_score, kernel_distance
from enat.metrics.neighbours import manifold_scores

NUM_IMAGES, SIDE = 32, 96
LAYERS = ("64", "2048", "logits_unbiased")
OPTIONS = {
    "cuda": False,
    "batch_size": 8,
    "cache": False,
    "save_cpu_ram": True,  # or it starts processes that read images
    "verbose": False,
    "feature_extractor": "inception-v3-compat",
    "isc_splits": 4,
    "kid_subsets": 10,
    "kid_subset_size": 20,
    "feature_layer_prc": "2048",
}


@pytest.fixture(scope="module", autouse=True)
def _memory():
    """The network sees the same batches again and again; it is asked once for each, always for the same layers."""
    forward, known = FeatureExtractorInceptionV3.forward, {}

    def remember(network, images):
        wanted, key = network.features_list, images.numpy().tobytes()
        if key not in known:
            network.features_list = list(LAYERS)
            known[key] = dict(zip(LAYERS, forward(network, images), strict=True))
            network.features_list = wanted
        return tuple(known[key][layer] for layer in wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "forward", remember)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pieces of two photographs each, one photograph in both."""
    rng = np.random.default_rng(0)
    folders = []
    for photographs in ((data.astronaut(), data.coffee()), (data.coffee(), data.chelsea())):
        folder = tmp_path_factory.mktemp("images")
        for index in range(NUM_IMAGES):
            photograph = photographs[index % 2]
            top, left = (rng.integers(0, size - SIDE) for size in photograph.shape[:2])
            Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(folder / f"{index:03}.png")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def features(folders, weights):
    """Of both folders, by layer."""
    network = FeatureExtractorInceptionV3("inception", list(LAYERS), feature_extractor_weights_path=str(weights))
    both = []
    for folder in folders:
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
        batches = [network(batch) for batch in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(8)]
        both.append({layer: torch.cat(parts) for layer, parts in zip(LAYERS, zip(*batches, strict=True), strict=True)})
    return both


def fidelity(folders, weights, **options):
    inputs = {"input1": str(folders[0]), "input2": str(folders[1]), "feature_extractor_weights_path": str(weights)}
    return torch_fidelity.calculate_metrics(**OPTIONS, **inputs, **options)


def distance(features, layer):
    first, second = (FeatureMoments(int(layer)).add(each[layer]) for each in features)
    return frechet_distance(first, second)


@pytest.mark.slow
def test_scores_equal_torch_fidelity(folders, weights, features):
    """The Frechet distance here at the first 64 features; that of all of them is below."""
    theirs = fidelity(folders, weights, isc=True, fid=True, kid=True, prc=True, feature_layer_fid="64")
    generated, reference = features
    assert distance(features, "64") == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)

    score = inception_score(generated["logits_unbiased"], 4)
    assert score.value > 1.02  # or equality would say little
    assert score.value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert score.std == pytest.approx(theirs["inception_score_std"], rel=1e-4)

    kernel = kernel_distance(generated["2048"], reference["2048"], 10, 20)
    assert kernel.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert kernel.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)

    manifold = manifold_scores(reference["2048"], generated["2048"])
    assert 0 < manifold.precision < 1 and 0 < manifold.recall < 1
    assert manifold.precision == pytest.approx(theirs["precision"], abs=1e-4)
    assert manifold.recall == pytest.approx(theirs["recall"], abs=1e-4)


@pytest.mark.slow
def test_distance_of_all_features_equals_torch_fidelity(folders, weights, features):
    """Five seconds: torch-fidelity takes the eigenvalues of a product of 2048 x 2048, which is not symmetric."""
    theirs = fidelity(folders, weights, fid=True, feature_layer_fid="2048")
    assert distance(features, "2048") == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
