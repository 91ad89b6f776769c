"""Weights in and out: strict about names and shapes, exact about values."""

import dataclasses
import json
import re
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from enat.checkpoint import load_enat, load_published_enat, load_published_vqgan, load_vqgan, save_weights
from enat.files.weights import read_state_dict
from material.small_models import (
    ARCHITECTURES,
    TEXT,
    conditions,
    golden,
    golden_enat_config,
    golden_vqgan_config,
    nested_tokens,
    pairwise_cases,
    published_weights,
    small_enat,
    small_vqgan,
)


def published(name):
    """How to load a published state dict, and such a dict."""
    arrays = golden(f"{name}_tiny")
    if name == "enat":
        return (lambda weights: load_published_enat(weights, golden_enat_config(arrays))), published_weights(arrays)
    return (lambda weights: load_published_vqgan(weights, golden_vqgan_config(arrays))), published_weights(arrays)


def test_unused_prev_embedder_is_required_but_its_values_are_dropped():
    load, weights = published("enat")
    name = "prev_embedder.fc1.weight"
    with pytest.raises(ValueError, match=r"prev_embedder\.fc1\.weight is \(32, 128\), expected \(128, 32\)"):
        load({**weights, name: weights[name].t()})
    model, other = load(weights), load({**weights, name: weights[name] + 1})
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_published_half_precision_becomes_float32():
    load, weights = published("enat")
    model = load({name: tensor.half() for name, tensor in weights.items()})
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.token_embedding.weight, weights["x_embedder.word_embeddings.weight"].half().float())


def test_file_written_before_a_field_existed_has_its_default(tmp_path):
    model, path = small_enat(), tmp_path / "model.safetensors"
    old = dataclasses.asdict(model.config)
    for field in ("text_width", "num_text_tokens", "qk_norm", "reused_features"):
        del old[field]
    save_file(model.state_dict(), path, metadata={"enat": json.dumps({"architecture": "enat", "config": old})})
    assert load_enat(path).config == model.config


def test_equal_weights_are_equal_bytes(tmp_path):
    """Artifacts are named by the digest of their bytes."""
    for copy in range(8):
        save_weights(tmp_path / str(copy), small_enat())
    assert len({(tmp_path / str(copy)).read_bytes() for copy in range(8)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["enat", "vqgan"])
def test_every_published_tensor_must_have_its_name_and_shape(name):
    load, weights = published(name)
    assert not load(weights).training
    extra = torch.zeros(1)
    for missing, short in pairwise([*weights, next(iter(weights))]):
        damaged = {**weights, short: weights[short][..., :-1], "something.else": extra}
        del damaged[missing]
        named = rf"missing: {re.escape(missing)}\. surplus: something\.else\. wrong shape: {re.escape(short)} is "
        with pytest.raises(ValueError, match=named):
            load(damaged)
    with pytest.raises(ValueError, match=r"surplus: something\.else"):
        load({**weights, "something.else": extra})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_layers": 4}, r"missing: blocks\.4\.adaLN_modulation\.1\.bias"),
        *(({"decoder_attention": kind}, "'self_cross' with reuse=True") for kind in ("cross", "full")),
        ({"reuse": False}, "'self_cross' with reuse=True"),
        *(
            (extension, r"text_width.*qk_norm.*reused_features")
            for extension in ({"qk_norm": True}, {"reused_features": "all"}, TEXT)
        ),
    ],
    ids=str,
)
def test_published_weights_fit_the_published_architecture_only(overrides, message):
    arrays = golden("enat_tiny")
    with pytest.raises(ValueError, match=message):
        load_published_enat(published_weights(arrays), dataclasses.replace(golden_enat_config(arrays), **overrides))


@pytest.mark.parametrize("architecture", [{**a, **b, **c, **d} for a, b, c, d in pairwise_cases(*ARCHITECTURES)], ids=str)
def test_enat_round_trips(tmp_path, architecture):
    model = small_enat(**architecture)
    save_weights(tmp_path / "model.safetensors", model)
    loaded = load_enat(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    (tokens,) = nested_tokens(model.config, [9])
    assert torch.equal(loaded(tokens, conditions(model)).logits, model(tokens, conditions(model)).logits)
    assert torch.equal(loaded(tokens, loaded.null_condition(3)).logits, model(tokens, model.null_condition(3)).logits)


def test_average_and_vqgan_round_trip(tmp_path):
    model, vqgan, path = small_enat(), small_vqgan(), tmp_path / "weights.safetensors"
    average = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    save_weights(path, model, average)
    assert all(torch.equal(tensor, average[name]) for name, tensor in load_enat(path).state_dict().items())
    save_weights(path, vqgan)
    assert load_vqgan(path).config == vqgan.config  # multipliers came back from JSON as a tuple
    assert all(torch.equal(tensor, vqgan.state_dict()[name]) for name, tensor in load_vqgan(path).state_dict().items())
    with pytest.raises(ValueError, match="holds vqgan, not the weights of enat"):
        load_enat(path)


_NO_LAYERS = {"architecture": "enat", "config": {"encoder_layers": None}}


def test_damaged_file_is_refused_by_name(tmp_path):
    model, path = small_enat(), tmp_path / "model.safetensors"
    save_weights(path, model)
    whole = path.read_bytes()
    for share in (0, 1e-5, 0.01, 0.5, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
            load_enat(path)
    for header in ({"architecture": "enat"}, {"architecture": "enat", "config": {"num_wheels": 4}}, _NO_LAYERS, "not JSON"):
        save_file({"weight": torch.zeros(1)}, path, metadata={"enat": header if isinstance(header, str) else json.dumps(header)})
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_enat(path)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 2**63, "num_heads": 1}
    save_file({"weight": torch.zeros(1)}, path, metadata={"enat": json.dumps({"architecture": "enat", "config": sizes})})
    with pytest.raises(ValueError, match="fields that cannot be used") as overflow:
        load_enat(path)
    assert "\n" not in str(overflow.value) and len(str(overflow.value)) < 400, "without torch's stack"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no known architecture, not the weights of vqgan"):
        load_vqgan(path)
    save_weights(path, model, {name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"})
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*missing: head\.bias"):
        load_enat(path)


@pytest.mark.parametrize("name", ["enat", "vqgan"])
def test_weights_that_are_not_finite_floating_point_numbers_are_refused(name):
    load, weights = published(name)
    first = next(key for key in weights if not key.startswith("prev_embedder"))
    poisoned = {"nan": torch.nan, "infinity": torch.inf, "beyond float32": 1e300}
    for value in poisoned.values():
        tensor = weights[first].double()
        tensor.view(-1)[-1] = value
        with pytest.raises(ValueError, match=r"tensor .* holds values that are NaN or infinite"):
            load({**weights, first: tensor})
    with pytest.raises(ValueError, match=r"tensor .* holds int64, not floating-point weights"):
        load({**weights, first: weights[first].long()})


@pytest.mark.parametrize("name", ["enat", pytest.param("vqgan", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_what_training_adds_to_names_is_removed(name, caplog):
    load, weights = published(name)
    expected = load(weights).state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model."):
        loaded = load({prefix + key: tensor for key, tensor in weights.items()}).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
        assert f"{prefix.split('.')[0]}. " in caplog.messages[-1] and "removed from the names" in caplog.messages[-1]
    with_loss = {**weights, "loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)}
    assert all(torch.equal(load(with_loss).state_dict()[key], tensor) for key, tensor in expected.items())
    incomplete = {f"module.{key}": tensor for key, tensor in [*weights.items()][1:]}
    with pytest.raises(ValueError, match=r"all names begin with module\.; missing: ") as refused:
        load(incomplete)
    assert len(str(refused.value)) < 1500


def test_state_dict_is_found_in_a_training_file(tmp_path, caplog):
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    for content, entry in (
        (weights, None),
        ({"state_dict": weights, "epoch": 3, "optimizer_states": [optimizer]}, "state_dict"),
        ({"state_dict": weights, "callbacks": {"best_k_models": {"a.ckpt": torch.ones(())}}}, "state_dict"),
        ({"model": weights, "optimizer": optimizer}, "model"),
        ({"ema": weights}, "ema"),
        ({"nnet_ema": weights, "step": 5}, "nnet_ema"),
        ({"checkpoint": {"model_state": weights}}, "checkpoint.model_state"),
    ):
        caplog.clear()
        torch.save(content, tmp_path / "file.pth")
        assert read_state_dict(tmp_path / "file.pth").keys() == weights.keys()
        assert caplog.messages == (
            [] if entry in (None, "state_dict") else [f"{tmp_path}/file.pth: the weights are read from its entry {entry!r}"]
        )
    for content, sentence in (
        ({"model": weights, "ema": weights}, r"holds several state dicts \(model, ema\); save the one that is meant"),
        ({"epoch": 3}, "holds no state dict"),
        ([torch.ones(1)], "holds no state dict"),
        ({}, "holds no state dict"),
    ):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=sentence):
            read_state_dict(tmp_path / "file.pth")


def test_empty_cut_and_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{path} is empty; download or copy it again$"):
        read_state_dict(path)
    for content in (whole[:10], whole[: len(whole) // 2], whole[:-1], b"\x80", b"\x80\x02.", b"text" * 99, whole[:40] + b"x" * 99):
        for suffix in (".pth", ".safetensors"):
            damaged = path.with_suffix(suffix)
            damaged.write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(damaged))) as refused:
                read_state_dict(damaged)
            assert "\n" not in str(refused.value)
