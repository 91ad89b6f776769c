"""Feature extractors: InceptionV3 is torch-fidelity's own, and the classifier keeps what it learned."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity import feature_extractor_inceptionv3

from enat.metrics import extractors
from enat.metrics.classifier import ClassifierExtractor, train_classifier
from enat.metrics.extractors import extractor_kinds, load_extractor, register_extractor
from enat.metrics.inception import (
    CleanInceptionExtractor,
    InceptionExtractor,
    published_inception_weights,
    random_inception_weights,
)


def uint8_images(count, side, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inception_weights():
    return random_inception_weights()


@pytest.fixture(scope="module")
def inception(inception_weights):
    return InceptionExtractor(inception_weights)


@pytest.mark.slow
def test_inception_features_are_those_of_torch_fidelity(inception, inception_weights, tmp_path):
    torch.save(inception_weights, tmp_path / "weights.pth")
    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    images = uint8_images(2, 32)
    outputs, (features, logits) = inception(images), theirs(images)
    assert {name: (tuple(values.shape), values.dtype) for name, values in outputs.items()} == {
        name: ((2, width), torch.float32) for name, width in inception.outputs.items()
    }
    assert inception.outputs == {"features": 2048, "spatial": 2023, "logits": 1008}
    assert torch.equal(outputs["features"], features) and torch.equal(outputs["logits"], logits)
    assert features.std() > 0.01 and logits.std() > 0.01, "equality must mean something"
    for name, values in outputs.items():  # batch norm uses its stored moments
        torch.testing.assert_close(values[1:], inception(images[1:])[name], rtol=1e-4, atol=1e-5)
    inception.save(tmp_path / "inception.safetensors")
    loaded = load_extractor("inception", tmp_path / "inception.safetensors")
    assert all(torch.equal(values, outputs[name]) for name, values in loaded(images).items())
    with pytest.raises(ValueError, match="the weights are not those of torch-fidelity's InceptionV3"):
        InceptionExtractor({"fc.weight": torch.zeros(2, 2)})


def test_spatial_features_are_the_first_seven_channels_of_the_1x1_branch_of_mixed_6d_by_position(inception):
    """Computed here step by step: the stem up to Mixed_6c, then one convolution, batch norm and ReLU. ADM flattens rows, columns,
    channels in this order."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    network, images = inception.network, uint8_images(2, 40, seed=3)
    x = (interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    with torch.no_grad():
        for name in (
            *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
            *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
        ):
            x = getattr(network, name)(x)
        branch = network.Mixed_6d.branch1x1
        x = torch.relu(branch.bn(branch.conv(x)))
    assert x.shape == (2, 192, 17, 17)
    spatial = inception(images)["spatial"]
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (3, 16, 5), (16, 16, 6)):
        assert torch.equal(spatial[:, (row * 17 + column) * 7 + channel], x[:, channel, row, column])
    assert (spatial >= 0).all() and spatial.std() > 0.01


@pytest.mark.slow
def test_unrounded_images_are_processed_as_by_torch_fidelity(inception, monkeypatch):
    """torch-fidelity's network computes with floats, too, where it is not kept from it."""
    rounded = uint8_images(2, 40, seed=5)
    for name, values in inception(rounded).items():
        assert torch.equal(values, inception(rounded.float())[name])
    unrounded = rounded.float().clamp(max=254) + 0.4
    outputs = inception(unrounded)
    assert all(torch.equal(values, inception(rounded)[name]) for name, values in inception(rounded).items()), "nothing is kept"
    monkeypatch.setattr(feature_extractor_inceptionv3, "vassert", lambda *_: None)
    features, logits = inception.network(unrounded)
    assert torch.equal(outputs["features"], features) and torch.equal(outputs["logits"], logits)
    assert not torch.equal(features, inception(rounded)["features"])


@pytest.mark.slow
def test_clean_resizing_is_pillow_s_on_floats_and_the_network_is_the_same(inception, inception_weights, tmp_path):
    """Images of the network's own size are not resized, so there both extractors agree."""
    CleanInceptionExtractor(inception_weights).save(tmp_path / "clean")
    clean = load_extractor("inception_clean", tmp_path / "clean")
    same_size = uint8_images(1, 299)
    torch.testing.assert_close(clean(same_size)["features"], inception(same_size)["features"])
    images = uint8_images(2, 64)
    by_hand = np.empty((2, 3, 299, 299), np.float32)
    for place in np.ndindex(2, 3):
        channel = Image.fromarray(images[place].numpy().astype(np.float32), mode="F")
        by_hand[place] = np.asarray(channel.resize((299, 299), resample=Image.Resampling.BICUBIC)).clip(0, 255)
    torch.testing.assert_close(clean(images)["features"], inception(torch.from_numpy(by_hand))["features"])
    assert (clean(images)["features"] - inception(images)["features"]).abs().max() > 1e-3, "another protocol"


def test_published_weights_are_fetched_with_a_hash_and_without_unpickling(monkeypatch):
    """The arguments of torch's own download decide how the file is opened."""
    asked = {}

    def fetch(url, **keywords):
        asked.update(keywords, url=url)
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(ValueError, match=r"no route.*reference\.weights"):
        published_inception_weights()
    assert asked["url"].endswith("weights-inception-2015-12-05-6726825d.pth")
    assert asked["check_hash"] is True and asked["weights_only"] is True


def shades(count):
    """uint8 images of four classes: bright left, right, top or bottom half, with noise. And their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 100, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        half = slice(0, 8) if label % 2 == 0 else slice(8, 16)
        image[(slice(None), half) if label < 2 else (slice(None), slice(None), half)] += 120
    return images, labels


def trained_classifier(seed=0, num_epochs=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = ClassifierExtractor(num_classes=4, num_features=16, width=8)
    images, labels = shades(128)
    epochs = list(train_classifier(extractor, images, labels, num_epochs, torch.Generator().manual_seed(seed)))
    return extractor, epochs


def test_classifier_learns_its_classes_and_round_trips(tmp_path):
    extractor, epochs = trained_classifier(num_epochs=30)
    images, labels = shades(128)
    assert [epoch.epoch for epoch in epochs] == list(range(1, 31))
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert (extractor.logits(images).argmax(dim=1) == labels).double().mean() > 0.9
    assert not extractor.training
    extractor.save(tmp_path / "classifier.safetensors")
    loaded = load_extractor("classifier", tmp_path / "classifier.safetensors")
    for side in (16, 20, 64):
        features = loaded(uint8_images(3, side))["features"]
        assert torch.equal(features, extractor(uint8_images(3, side))["features"])
        assert (features.shape, features.dtype) == ((3, loaded.outputs["features"]), torch.float32) == ((3, 16), torch.float32)
        torch.testing.assert_close(loaded.logits(uint8_images(3, side)), loaded.classify(features))
    assert loaded.num_classes == 4 and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_seed_determines_the_weights_of_a_classifier():
    first, again, other = (trained_classifier(seed)[0].classify.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_other_files_and_kinds_are_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="classifier"):
        load_extractor("classifier", tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'resnet'; choose one of classifier, inception, inception_clean, dinov2, clip"):
        load_extractor("resnet", tmp_path / "other.safetensors")


class BrightnessExtractor:
    """A registered kind: means of colours, scaled by weights from its file."""

    outputs = {"features": 3}  # noqa: RUF012

    def __init__(self, path):
        self.scale = load_file(path)["scale"]

    def __call__(self, images):
        return {"features": images.float().mean(dim=(2, 3)) * self.scale}

    def to(self, device):
        return self


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(extractors, "_FACTORIES", dict(extractors._FACTORIES))


def test_registered_extractor_is_opened_like_the_others(own_registry, tmp_path):
    register_extractor("brightness", BrightnessExtractor)
    save_file({"scale": torch.tensor([2.0])}, tmp_path / "weights.safetensors")
    loaded = load_extractor("brightness", tmp_path / "weights.safetensors")
    assert "brightness" in extractor_kinds()
    assert loaded(torch.full((1, 3, 4, 4), 5, dtype=torch.uint8))["features"].tolist() == [[10.0, 10.0, 10.0]]
    for kind, reason in (("inception", "already"), ("brightness", "already"), ("Two words", "lower-case letters")):
        with pytest.raises(ValueError, match=reason):
            register_extractor(kind, BrightnessExtractor)
