"""Tokenizers of other programs: MaskGIT's in the layout of open-muse loads, and others are named with what they have beside it."""

import re

import pytest
import torch
from safetensors.torch import save_file

from enat.checkpoint import load_published_vqgan, open_vqgan
from enat.config import VQGANConfig
from enat.tokenizer import VQGAN
from material.small_models import small_vqgan


def open_muse(vqgan):
    """A state dict as open-muse names it: its mid is a list, and its upsampling a single convolution."""
    renamed = {}
    for name, tensor in vqgan.state_dict().items():
        place = name.replace("codebook.weight", "quantize.embedding.weight").replace("upsample.conv", "upsample_conv")
        renamed[place.replace("mid.block_1.", "mid.0.").replace("mid.block_2.", "mid.1.")] = tensor
    return renamed


def residual(name, width=32, bias=True):
    made = {f"{name}.{norm}.{kind}": torch.zeros(width) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    for conv in ("conv1", "conv2"):
        made[f"{name}.{conv}.weight"] = torch.zeros(width, width, 3, 3)
        if bias:
            made[f"{name}.{conv}.bias"] = torch.zeros(width)
    return made


def attention(name, width=32):
    return {f"{name}.{part}.weight": torch.zeros(width, width, 1, 1) for part in ("q", "k", "v", "proj_out")}


def taming():
    tensors = {"quantize.embedding.weight": torch.zeros(1024, 256), "loss.logvar": torch.zeros(())}
    for side, level in (("encoder", "down"), ("decoder", "up")):
        tensors |= residual(f"{side}.{level}.0.block.0") | residual(f"{side}.mid.block_1") | attention(f"{side}.mid.attn_1")
        tensors |= attention(f"{side}.{level}.4.attn.0")
    tensors["encoder.down.0.downsample.conv.weight"] = torch.zeros(32, 32, 3, 3)
    tensors["decoder.up.1.upsample.conv.weight"] = torch.zeros(32, 32, 3, 3)
    return tensors | {f"{name}.weight": torch.zeros(256, 256, 1, 1) for name in ("quant_conv", "post_quant_conv")}


def llamagen():
    tensors = {"quantize.embedding.weight": torch.zeros(16384, 8), "quantize.codebook_used": torch.zeros(65536)}
    for side in ("encoder", "decoder"):
        tensors |= residual(f"{side}.conv_blocks.0.res.0") | attention(f"{side}.conv_blocks.4.attn.0")
        tensors |= residual(f"{side}.mid.0") | attention(f"{side}.mid.1")
    tensors["encoder.conv_blocks.0.downsample.conv.weight"] = torch.zeros(32, 32, 3, 3)
    return tensors | {"quant_conv.weight": torch.zeros(8, 256, 1, 1), "post_quant_conv.weight": torch.zeros(256, 8, 1, 1)}


def diffusers():
    tensors = {"quantize.embedding.weight": torch.zeros(8192, 64), "quant_conv.weight": torch.zeros(64, 64, 1, 1)}
    tensors |= residual("encoder.down_blocks.0.resnets.0") | {"encoder.down_blocks.0.downsamplers.0.conv.weight": torch.zeros(1)}
    return tensors | residual("decoder.up_blocks.0.resnets.0")


def test_open_muse_has_the_168_tensors_of_the_published_tokenizer_and_32_other_names():
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig.preset("vqgan-256"))
    ours = {name.replace("codebook.weight", "quantize.embedding.weight") for name in vqgan.state_dict()}
    theirs = set(open_muse(vqgan))
    assert len(ours) == len(theirs) == 168 and len(ours - theirs) == len(theirs - ours) == 32


@pytest.mark.parametrize("prefix", ["", pytest.param("module.", marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".bin", marks=pytest.mark.slow)])
def test_open_muse_loads_tensor_by_tensor(tmp_path, prefix, suffix):
    vqgan = small_vqgan(num_res_blocks=2)
    tensors = {prefix + name: tensor.contiguous() for name, tensor in open_muse(vqgan).items()}
    path = tmp_path / f"muse{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    loaded = open_vqgan(path, vqgan.config)
    assert not loaded.training
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in vqgan.state_dict().items())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(images), vqgan.encode(images))


def test_errors_of_open_muse_have_its_names():
    vqgan = small_vqgan()
    tensors = open_muse(vqgan)
    del tensors["encoder.mid.1.norm2.bias"]
    with pytest.raises(ValueError, match=r"missing: encoder\.mid\.1\.norm2\.bias\)$") as refused:
        load_published_vqgan(tensors, vqgan.config)
    assert len(str(refused.value)) < 150


@pytest.mark.parametrize(
    ("make", "layout", "parts"),
    [
        (
            taming,
            "taming-transformers",
            "attention, convolutions that halve the resolution, a projection around the codebook, biases in residual blocks, "
            "and a codebook of 1,024 x 256",
        ),
        (
            llamagen,
            "LlamaGen",
            "attention, convolutions that halve the resolution, a projection around the codebook, biases in residual blocks, "
            "and a codebook of 16,384 x 8",
        ),
        (
            diffusers,
            "diffusers",
            "convolutions that halve the resolution, a projection around the codebook, biases in residual blocks, "
            "and a codebook of 8,192 x 64",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_other_layouts_are_named_in_one_short_line(make, layout, parts, prefix):
    tensors = {prefix + name: tensor for name, tensor in make().items()}
    with pytest.raises(ValueError, match=re.escape(f"in the layout of {layout} with {parts}; only MaskGIT's")) as refused:
        load_published_vqgan(tensors, VQGANConfig.preset("vqgan-256"))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 350


def test_weights_of_no_known_layout_are_compared_by_name():
    with pytest.raises(ValueError, match="the published VQGAN does not fit the configured architecture"):
        load_published_vqgan({"something.else": torch.zeros(1)}, small_vqgan().config)
