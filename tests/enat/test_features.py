"""Feature extractors: InceptionV3 is torch-fidelity's own, and the classifier keeps what it learned."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3

from enat.features import ClassifierExtractor, InceptionExtractor, load_extractor, train_classifier


def uint8_images(count, side, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inception_weights():
    """A state dict of random weights that keep activations near 1. torch-fidelity's class would fetch a file: here it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("inception", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.state_dict()


@pytest.fixture(scope="module")
def inception(inception_weights):
    return InceptionExtractor(inception_weights)


def test_inception_features_are_those_of_torch_fidelity(inception, inception_weights, tmp_path):
    torch.save(inception_weights, tmp_path / "weights.pth")
    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    images = uint8_images(2, 32)
    features = inception(images)
    assert features.shape == (2, inception.num_features) == (2, 2048)
    assert features.dtype == torch.float32
    assert torch.equal(features, theirs(images)[0])
    assert features.std() > 0.01  # or equality would say little


def test_inception_sees_each_image_alone(inception):
    """Batch norm uses its stored moments, also when the extractor was never told to evaluate."""
    images = uint8_images(2, 48)
    torch.testing.assert_close(inception(images)[1:], inception(images[1:]), rtol=1e-4, atol=1e-5)


def test_inception_is_loaded_from_its_kept_weights(inception, inception_weights, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in inception_weights.items()}, tmp_path / "inception.safetensors")
    loaded = load_extractor("inception", tmp_path / "inception.safetensors")
    assert torch.equal(loaded(uint8_images(1, 32)), inception(uint8_images(1, 32)))


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


def test_a_classifier_learns_its_classes():
    extractor, epochs = trained_classifier(num_epochs=30)
    images, labels = shades(128)
    assert [epoch.epoch for epoch in epochs] == list(range(1, 31))
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert (extractor.logits(images).argmax(dim=1) == labels).double().mean() > 0.9
    assert not extractor.training


def test_a_classifier_is_its_seeds():
    first, again, other = (trained_classifier(seed)[0].classify.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("side", [16, 20, 64])
def test_a_classifier_has_features_of_any_size_of_image(side):
    extractor = ClassifierExtractor(num_classes=4, num_features=16, width=8)
    images = uint8_images(3, side)
    features = extractor(images)
    assert features.shape == (3, extractor.num_features) == (3, 16)
    assert features.dtype == torch.float32
    torch.testing.assert_close(extractor.logits(images), extractor.classify(features))


def test_a_classifier_round_trips(tmp_path):
    extractor, path = trained_classifier()[0], tmp_path / "classifier.safetensors"
    extractor.save(path)
    loaded = load_extractor("classifier", path)
    images = uint8_images(3, 16)
    assert torch.equal(loaded(images), extractor(images))
    assert (loaded.num_classes, loaded.num_features) == (4, 16)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_other_files_and_kinds_are_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_extractor("classifier", tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'resnet'; choose one of classifier, inception"):
        load_extractor("resnet", tmp_path / "other.safetensors")
