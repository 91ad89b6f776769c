"""DINOv2 and CLIP as feature extractors: CLIP against torch-fidelity's network, DINOv2 against transformers' own, with positions
as the published code resamples them."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from enat.metrics.extractors import load_extractor
from enat.metrics.image_encoders import ImageEncoder, read_image_encoder
from material.random_weights import randomized


def uint8_images(count, side):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
        projection_dim=24,
    )
    randomized(CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    randomized(Dinov2Model(config)).save_pretrained(folder)
    return folder


def openai_names(state):
    """transformers' names of CLIP's image part -> those of the original code, which torch-fidelity keeps."""
    renamed = {"text_projection": torch.zeros(1, state["visual_projection.weight"].shape[0])}
    fixed = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    for name, value in state.items():
        short = name.removeprefix("vision_model.")
        if short == "visual_projection.weight":
            renamed["visual.proj"] = value.T.contiguous()
        elif short in fixed:
            renamed[f"visual.{fixed[short]}"] = value
        elif ".self_attn." not in short:
            for ours, theirs in (
                ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("encoder.layers", "transformer.resblocks"),
                ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                short = short.replace(ours, theirs)
            renamed[f"visual.{short}"] = value
    layers = {name.split(".")[3] for name in state if "encoder.layers" in name}
    for layer in layers:
        place, target = f"vision_model.encoder.layers.{layer}.self_attn", f"visual.transformer.resblocks.{layer}.attn"
        for kind in ("weight", "bias"):
            parts = [state[f"{place}.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{target}.in_proj_{kind}"] = torch.cat(parts)
            renamed[f"{target}.out_proj.{kind}"] = state[f"{place}.out_proj.{kind}"]
    return renamed


def test_clip_features_are_those_of_torch_fidelity(clip_folder):
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP, build_model

    encoder = read_image_encoder("clip", clip_folder)
    # torch-fidelity rounds to float16 on the way; so are ours here.
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.copy_(parameter.half().float())
    state = openai_names(encoder.model.state_dict())
    theirs = FeatureExtractorCLIP.__new__(FeatureExtractorCLIP)
    torch.nn.Module.__init__(theirs)
    theirs.features_list, theirs.feature_extractor_internal_dtype = ["clip"], torch.float32
    theirs.model = build_model(state, torch.float32)
    theirs.resolution = theirs.model.visual.input_resolution
    images = uint8_images(3, 40)
    features = encoder(images)["features"]
    assert features.shape == (3, encoder.outputs["features"]) == (3, 24) and features.std() > 0.01
    torch.testing.assert_close(features, theirs(images)[0], rtol=1e-4, atol=1e-4)


def cubic_weight(distance):
    """Of a sample at this distance, in samples: Keys 1981 with a = -0.75, as torch has it."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def plainly_resampled(grid, size, offset):
    """grid: float64 (M, M, D) -> (size, size, D). Position p of the new grid is at (p + 1/2) M / (size + offset) - 1/2 of the old
    one; beyond the border it is constant."""
    old = len(grid)
    weights = np.zeros((size, old))
    for new in range(size):
        place = (new + 0.5) * old / (size + offset) - 0.5
        for sample in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[new, min(max(sample, 0), old - 1)] += cubic_weight(place - sample)
    return np.einsum("yi,xj,ijd->yxd", weights, weights, grid)


def test_dinov2_resamples_its_positions_as_the_published_code_does():
    """37 x 37 positions, of the 518 pixels that it was trained with, for 16 x 16 patches of 224: by (16 + 0.1) / 37."""
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    model = randomized(Dinov2Model(config))
    smaller = Dinov2Model(Dinov2Config(**{**config.to_dict(), "image_size": 224})).eval()  # has nothing to resample
    state = model.state_dict()
    name = "embeddings.position_embeddings"
    positions = state[name]
    assert positions.shape == (1, 1 + 37 * 37, 32)

    def with_offset(offset):
        """What enters the first layer, and the features."""
        resampled = plainly_resampled(positions[0, 1:].double().numpy().reshape(37, 37, 32), 16, offset)
        whole = torch.cat([positions[:, :1], torch.from_numpy(resampled).float().reshape(1, 256, 32)], dim=1)
        smaller.load_state_dict({**state, name: whole})
        with torch.no_grad():
            return smaller.embeddings(pixels), smaller(pixels).pooler_output

    images = uint8_images(2, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    encoder = ImageEncoder("dinov2", model)
    embeddings, (expected, features) = encoder.model.embeddings(pixels), with_offset(0.1)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(images)["features"], features, rtol=1e-4, atol=1e-4)
    assert (embeddings - with_offset(0.0)[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_encoder_round_trips_and_can_be_called_by_several_threads(kind, clip_folder, dinov2_folder, tmp_path):
    encoder = read_image_encoder(kind, clip_folder if kind == "clip" else dinov2_folder)
    encoder.save(tmp_path / "kept.safetensors")
    before = torch.random.get_rng_state()
    loaded = load_extractor(kind, tmp_path / "kept.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    batches = uint8_images(8, 30).split(1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda images: loaded(images)["features"], batches))
    for features, images in zip(found, batches, strict=True):
        torch.testing.assert_close(features, encoder(images)["features"], rtol=1e-4, atol=1e-4)
    # Bits of features may depend on where weights are in memory, so the weights are compared.
    torch.testing.assert_close(loaded.state_dict(), encoder.state_dict(), rtol=0, atol=0)


DINOV2 = json.dumps({"model_type": "dinov2"}).encode()


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("dinov2", None, r"its config\.json cannot be read"),
        ("dinov2", b"[]", r"its config\.json cannot be read"),
        ("dinov2", json.dumps({"model_type": "bert"}).encode(), "a model of type bert, not dinov2"),
        ("clip", DINOV2, "of type dinov2, not clip"),
        ("dinov2", DINOV2, "no readable weights of dinov2"),
    ],
)
def test_folder_without_such_an_encoder_is_refused(kind, config, reason, tmp_path, dinov2_folder):
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
        torch.save(load_file(dinov2_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")  # is not opened
    with pytest.raises(ValueError, match=reason):
        read_image_encoder(kind, tmp_path)


def test_missing_weights_are_an_error_although_transformers_initialises_them(clip_folder, tmp_path):
    tensors = load_file(clip_folder / "model.safetensors")
    tensors.pop("vision_model.post_layernorm.bias")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"does not hold all weights of clip: .*post_layernorm\.bias"):
        read_image_encoder("clip", tmp_path)
    with pytest.raises(ValueError, match="image encoder"):
        load_extractor("clip", tmp_path / "model.safetensors")
