"""Weights in and out: strict about names and shapes, exact about values."""

import dataclasses
import json
import re
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from small_models import (
    TEXT,
    conditions,
    golden,
    golden_enat_config,
    golden_vqgan_config,
    nested_tokens,
    published_weights,
    small_enat,
    small_vqgan,
)

from enat.checkpoint import load_enat, load_published_enat, load_published_vqgan, load_strictly, load_vqgan, save_weights
from enat.config import DECODER_ATTENTIONS, ENATConfig
from enat.tokenizer import VQGANConfig


def published(name):
    """How to load a published state dict, and such a dict."""
    arrays = golden(f"{name}_tiny")
    if name == "enat":
        return (lambda weights: load_published_enat(weights, golden_enat_config(arrays))), published_weights(arrays)
    return (lambda weights: load_published_vqgan(weights, golden_vqgan_config(arrays))), published_weights(arrays)


@pytest.mark.parametrize("name", ["enat", "vqgan"])
def test_every_published_tensor_is_needed_by_its_name_and_shape(name):
    load, weights = published(name)
    assert not load(weights).training
    for missing, short in pairwise([*weights, next(iter(weights))]):
        damaged = {**weights, short: weights[short][..., :-1]}
        del damaged[missing]
        with pytest.raises(ValueError, match=rf"missing: {re.escape(missing)}\. wrong shape: {re.escape(short)} is "):
            load(damaged)


@pytest.mark.parametrize("name", ["enat", "vqgan"])
def test_a_surplus_tensor_and_every_problem_at_once_are_named(name):
    load, weights = published(name)
    (first, second), extra = list(weights)[:2], torch.zeros(1)
    with pytest.raises(ValueError, match=r"surplus: something\.else"):
        load({**weights, "something.else": extra})
    damaged = {**weights, "something.else": extra, second: extra}
    del damaged[first]
    with pytest.raises(
        ValueError, match=rf"missing: {re.escape(first)}\. surplus: something\.else\. wrong shape: {re.escape(second)} is \(1,\)"
    ):
        load(damaged)


def test_the_unused_prev_embedder_is_required_but_its_values_are_dropped():
    load, weights = published("enat")
    name = "prev_embedder.fc1.weight"
    with pytest.raises(ValueError, match=r"prev_embedder\.fc1\.weight is \(32, 128\), expected \(128, 32\)"):
        load({**weights, name: weights[name].t()})
    model, other = load(weights), load({**weights, name: weights[name] + 1})
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_weights_of_another_depth_are_refused():
    arrays = golden("enat_tiny")
    deeper = dataclasses.replace(golden_enat_config(arrays), encoder_layers=4)
    with pytest.raises(ValueError, match=r"missing: blocks\.4\.adaLN_modulation\.1\.bias"):
        load_published_enat(published_weights(arrays), deeper)


@pytest.mark.parametrize("overrides", [{"decoder_attention": "cross"}, {"decoder_attention": "full"}, {"reuse": False}])
def test_published_weights_belong_to_the_published_architecture(overrides):
    arrays = golden("enat_tiny")
    with pytest.raises(ValueError, match="decoder_attention='self_cross' with reuse=True"):
        load_published_enat(published_weights(arrays), dataclasses.replace(golden_enat_config(arrays), **overrides))


@pytest.mark.parametrize("overrides", [{"qk_norm": True}, {"reused_features": "masked"}, {"reused_features": "all"}, TEXT], ids=str)
def test_published_weights_know_none_of_the_extensions(overrides):
    arrays = golden("enat_tiny")
    with pytest.raises(ValueError, match=r"text_width.*qk_norm.*reused_features"):
        load_published_enat(published_weights(arrays), dataclasses.replace(golden_enat_config(arrays), **overrides))


def test_published_half_precision_becomes_float32():
    load, weights = published("enat")
    model = load({name: tensor.half() for name, tensor in weights.items()})
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.token_embedding.weight, weights["x_embedder.word_embeddings.weight"].half().float())


@pytest.mark.parametrize("decoder_attention", DECODER_ATTENTIONS)
@pytest.mark.parametrize("reuse", [True, False])
def test_an_enat_round_trips(tmp_path, decoder_attention, reuse):
    model = small_enat(decoder_attention=decoder_attention, reuse=reuse)
    save_weights(tmp_path / "model.safetensors", model)
    loaded = load_enat(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    (tokens,) = nested_tokens(model.config, [9])
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(loaded(tokens, labels).logits, model(tokens, labels).logits)


@pytest.mark.parametrize(
    "extension", [{"qk_norm": True}, {"reused_features": "all"}, {"reused_features": "masked", **TEXT}, {"num_classes": 0}], ids=str
)
def test_an_extended_enat_round_trips(tmp_path, extension):
    model = small_enat(**extension)
    save_weights(tmp_path / "model.safetensors", model)
    loaded = load_enat(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    before, now = nested_tokens(model.config, [13, 9])
    labels, null = conditions(model), loaded.null_condition(3)
    assert torch.equal(loaded(now, labels, loaded(before, labels)).logits, model(now, labels, model(before, labels)).logits)
    assert torch.equal(loaded(now, null).logits, model(now, model.null_condition(3)).logits)  # the empty caption came along


def test_a_file_written_before_a_field_existed_has_its_default(tmp_path):
    model, path = small_enat(), tmp_path / "model.safetensors"
    old = dataclasses.asdict(model.config)
    for field in ("text_width", "num_text_tokens", "qk_norm", "reused_features"):
        del old[field]
    save_file(model.state_dict(), path, metadata={"enat": json.dumps({"architecture": "enat", "config": old})})
    assert load_enat(path).config == model.config


def test_a_vqgan_round_trips(tmp_path):
    vqgan = small_vqgan()
    save_weights(tmp_path / "vqgan.safetensors", vqgan)
    loaded = load_vqgan(tmp_path / "vqgan.safetensors")
    assert loaded.config == vqgan.config  # multipliers came back from JSON as a tuple
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in vqgan.state_dict().items())


def test_equal_weights_are_equal_bytes(tmp_path):
    """Artifacts are named by the digest of their bytes."""
    for copy in range(8):
        save_weights(tmp_path / str(copy), small_enat())
    assert len({(tmp_path / str(copy)).read_bytes() for copy in range(8)}) == 1


def test_an_average_is_saved_in_place_of_the_weights(tmp_path):
    model = small_enat()
    average = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    save_weights(tmp_path / "ema.safetensors", model, average)
    assert all(torch.equal(tensor, average[name]) for name, tensor in load_enat(tmp_path / "ema.safetensors").state_dict().items())


def test_a_file_of_another_architecture_is_refused(tmp_path):
    save_weights(tmp_path / "vqgan.safetensors", small_vqgan())
    with pytest.raises(ValueError, match="holds vqgan, not the weights of enat"):
        load_enat(tmp_path / "vqgan.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "anything.safetensors")
    with pytest.raises(ValueError, match="holds no known architecture, not the weights of vqgan"):
        load_vqgan(tmp_path / "anything.safetensors")


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "model.safetensors"
    save_weights(path, small_enat())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_enat(path)


def test_a_file_that_lacks_a_tensor_is_refused_by_name(tmp_path):
    model, path = small_enat(), tmp_path / "model.safetensors"
    save_weights(path, model, {name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"})
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*missing: head\.bias"):
        load_enat(path)


@pytest.mark.parametrize(
    "header",
    [{"architecture": "enat"}, {"architecture": "enat", "config": {"num_wheels": 4}}, "not JSON"],
    ids=["no config", "unknown field", "no JSON"],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata={"enat": header if isinstance(header, str) else json.dumps(header)})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_enat(path)


def test_strict_loading_names_what_is_wrong():
    model = small_enat()
    with pytest.raises(ValueError, match=r"the average does not fit .*missing: .*position_embedding\.weight"):
        load_strictly(model, {"head.bias": torch.zeros(25)}, source="the average")


def test_configs_survive_json():
    """The header of a file holds its config as JSON."""
    for config in (ENATConfig.preset("enat-s", dropout=0.2), VQGANConfig.preset("vqgan-small")):
        assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
