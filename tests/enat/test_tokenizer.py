"""The tokenizer: equal to the published one, shapes, sizes, what it refuses."""

from dataclasses import replace

import pytest
import torch

from enat.tokenizer import VQGAN, VQGANConfig
from material.small_models import golden, golden_vqgan, randomize, small_vqgan
from references import plain


@torch.no_grad()
def test_codes_and_decoded_images_equal_the_published_code():
    arrays = golden("vqgan_tiny")
    vqgan = golden_vqgan(arrays)
    torch.testing.assert_close(vqgan.encode_latents(arrays["images"]), arrays["latents"], atol=1e-4, rtol=0)
    assert torch.equal(vqgan.encode(arrays["images"]).flatten(1), arrays["tokens"])
    codes = arrays["tokens"].unflatten(1, arrays["latents"].shape[2:])
    entries = vqgan.codebook(codes).permute(0, 3, 1, 2)
    torch.testing.assert_close(vqgan.decode_latents(entries), arrays["decoded"], atol=1e-4, rtol=0)
    assert arrays["decoded"].min() < 0 or arrays["decoded"].max() > 1, "the next line must be able to see a missing clamp"
    torch.testing.assert_close(vqgan.decode(codes), arrays["decoded"].clamp(0, 1), atol=1e-4, rtol=0)


def test_nearest_entry_is_found():
    vqgan = small_vqgan()
    randomize(vqgan.codebook, std=1.0)
    latents = torch.randn(3, vqgan.config.latent_dim, 5, 4, generator=torch.Generator().manual_seed(0))
    codes = vqgan.quantize(latents)
    assert torch.equal(codes, plain.quantize(latents, vqgan.codebook.weight))
    assert len(codes.unique()) > 10


@pytest.mark.parametrize(
    ("architecture", "grid_size"),
    [({}, 4), ({"channel_multipliers": (1,), "resolution": 5}, 5), ({"channel_multipliers": (1, 2, 1, 1), "resolution": 24}, 3)],
    ids=str,
)
def test_codes_and_images_have_their_shapes_and_ranges(architecture, grid_size):
    vqgan = small_vqgan(**architecture)
    side = vqgan.config.resolution
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    codes = vqgan.encode(images)
    assert codes.shape == (2, grid_size, grid_size) == (2, vqgan.config.grid_size, vqgan.config.grid_size)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < vqgan.config.codebook_size
    assert torch.equal(codes, torch.cat([vqgan.encode(image[None]) for image in images])), "in any batch"
    assert not torch.equal(codes[0], codes[1])
    larger = VQGAN(VQGANConfig(**{**vars(vqgan.config), "resolution": 2 * side}))
    larger.load_state_dict(vqgan.state_dict())
    assert torch.equal(larger.eval().encode(images), codes), "one set of weights serves several resolutions"
    decoded = vqgan.decode(codes)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig())
    assert sum(parameter.numel() for parameter in vqgan.parameters()) / 1e6 == pytest.approx(54.5, abs=0.05)


def test_presets_have_the_published_grids():
    published = {name: VQGANConfig.preset(f"vqgan-{name}") for name in (256, 512)}
    assert {name: (config.grid_size, config.downsampling) for name, config in published.items()} == {256: (16, 16), 512: (32, 16)}
    assert published[256] == VQGANConfig()
    assert VQGANConfig.preset("vqgan-small", codebook_size=64).codebook_size == 64
    with pytest.raises(ValueError, match="vqgan-256, vqgan-512, vqgan-small"):
        VQGANConfig.preset("vqgan-1024")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"resolution": 250}, "250; it must be a multiple of the downsampling factor 16 of a tokenizer with 5 levels"),
        ({"base_channels": 48}, "multiple of 32"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"channel_multipliers": (1, 0)}, "all must be at least 1"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
    ],
)
def test_impossible_architecture_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**overrides)


def test_images_of_another_shape_are_refused():
    for shape in ((1, 3, 16, 18), (1, 3, 18, 16), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match="sides divisible by 4 is needed"):
            small_vqgan().encode(torch.zeros(shape))


@pytest.mark.slow
def test_compiled_networks_compute_the_same_but_for_rounding() -> None:
    """With one graph for each size of batch, under autocast as well, and eager where asked for."""
    torch.manual_seed(0)
    vqgan = VQGAN(replace(VQGANConfig.preset("vqgan-small"), base_channels=32)).eval()
    images, codes = torch.rand(3, 3, 16, 16), torch.randint(0, vqgan.config.codebook_size, (3, 4, 4))
    encoded, decoded = vqgan.encode(images), vqgan.decode(codes, "bf16")
    vqgan.compile_networks()
    torch._dynamo.utils.counters.clear()
    assert (vqgan.encode(images) != encoded).float().mean() < 0.001
    torch.testing.assert_close(vqgan.decode(codes, "bf16"), decoded, rtol=0, atol=0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 and not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.utils.counters.clear()
    vqgan.decode(codes.flip(0), "bf16")
    assert "unique_graphs" not in torch._dynamo.utils.counters["stats"]
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(vqgan.decode(codes, "bf16"), decoded)
