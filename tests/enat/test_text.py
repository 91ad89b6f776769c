"""The caption encoder against transformers called directly, and against CLIP's forward pass written down here."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from enat.text import CAPTIONS_PER_PASS, TextEncoder, TextFeatures, load_text_encoder
from material.tiny_clip import END, START, make_tiny_clip, write_tokenizer

CAPTIONS = [
    "The cat on the dog",
    "a dog",
    "",
    "  THE   cat\n\ton the\u00a0dog ",
    "ein Café am Fluß, 日本の猫 🐈‍⬛ — ½",
    "the cat on the dog " * 40,
    "cat's 1234 dogs!",
    "\x00",
    "e\u0301" * 90,
    "the dog",
    "cat",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip") / "text")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder)


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return make_tiny_clip(tmp_path / "clip")


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_equal(features: TextFeatures, others: TextFeatures) -> None:
    for name in ("hidden", "pooled", "num_tokens"):
        torch.testing.assert_close(getattr(features, name), getattr(others, name), rtol=0, atol=0)


# Values --------------------------------------------------------------------------------------------------------------------


def plain_hidden(weights: dict[str, Tensor], tokens: Tensor, num_heads: int) -> Tensor:
    """CLIP's text transformer, float64: pre-norm blocks, causal attention, x * sigmoid(1.702 x), final norm. (B, T) -> (B, T, W)"""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.token_embedding.weight"][tokens] + weights["embeddings.position_embedding.weight"]
    is_later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        y = norm(x, f"{layer}.layer_norm1")
        heads = []
        queries, keys, values = (linear(y, f"{layer}.self_attn.{kind}_proj").chunk(num_heads, -1) for kind in "qkv")
        for query, key, value in zip(queries, keys, values, strict=True):
            scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
            heads.append(scores.masked_fill(is_later, -math.inf).softmax(-1) @ value)
        x = x + linear(torch.cat(heads, -1), f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
    return norm(x, "final_layer_norm")


def plain_tokens(ids: list[int], start: int, end: int) -> list[int]:
    """Start, at most 75 ids, end, and ends up to 77."""
    return [start, *ids[:75], *[end] * (76 - len(ids[:75]))]


def test_features_are_those_of_clip_written_down_plainly(encoder: TextEncoder, folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    spelled = {
        "a cat": ["a</w>", "cat</w>"],
        "": [],
        "The DOG, on": ["the</w>", "dog</w>", ",</w>", "on</w>"],
        "dot " * 50: ["do", "t</w>"] * 50,
        "é": ["Ã", "©</w>"],  # the two bytes of its UTF-8
    }
    start, end = vocabulary[START], vocabulary[END]
    rows = [plain_tokens([vocabulary[piece] for piece in pieces], start, end) for pieces in spelled.values()]
    expected = plain_hidden(load_file(folder / "model.safetensors"), torch.tensor(rows), num_heads=4)
    features = encoder.encode(list(spelled))
    torch.testing.assert_close(features.hidden.double(), expected, rtol=2**-10, atol=1e-4)
    ends = [min(len(pieces) + 1, 76) for pieces in spelled.values()]
    assert features.num_tokens.tolist() == [position + 1 for position in ends] == [4, 2, 6, 77, 4]
    assert torch.equal(features.pooled, features.hidden[torch.arange(len(ends)), ends])


# Where the caption ends ----------------------------------------------------------------------------------------------------


def test_tokenizer_uses_its_own_padding_token(own_folder: Path, encoder: TextEncoder) -> None:
    edit = own_folder / "tokenizer_config.json"
    edit.write_text(json.dumps({**json.loads(edit.read_text()), "pad_token": "!"}))
    padded, features = load_text_encoder(own_folder).encode(["the cat"]), encoder.encode(["the cat"])
    assert torch.equal(padded.num_tokens, features.num_tokens) and torch.equal(padded.pooled, features.pooled)
    assert torch.equal(padded.hidden[:, :4], features.hidden[:, :4])
    assert not torch.isclose(padded.hidden[:, 4:], features.hidden[:, 4:]).all(dim=2).any()


# Folders -------------------------------------------------------------------------------------------------------------------


def test_config_as_openai_published_it(tmp_path: Path) -> None:
    """What openai/clip-vit-large-patch14 has beside the sizes: settings of generation, token ids that are not the tokenizer's, a
    text_config_dict that is null, and buffers of positions among the weights."""
    full = make_tiny_clip(tmp_path / "clip", kind="full")
    expected = load_text_encoder(full).encode(CAPTIONS)
    config = json.loads((full / "config.json").read_text())
    config["text_config"] |= {
        "_name_or_path": "",
        "add_cross_attention": False,
        "architectures": None,
        "bad_words_ids": None,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "length_penalty": 1.0,
        "num_beams": 1,
        "pad_token_id": 1,
        "problem_type": None,
        "return_dict": True,
        "torch_dtype": None,
        "torchscript": False,
        "transformers_version": "4.16.0.dev0",
    }
    (full / "config.json").write_text(json.dumps({**config, "text_config_dict": None, "torch_dtype": "float32"}))
    weights = load_file(full / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    special = {"content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "__type": "AddedToken"}
    tokenizer = {"unk_token": special, "bos_token": {**special, "content": START}, "eos_token": special, "pad_token": END}
    tokenizer |= {"add_prefix_space": False, "errors": "replace", "do_lower_case": True, "name_or_path": "./clip_ViT_B_32/"}
    (full / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert_equal(load_text_encoder(full).encode(CAPTIONS), expected)


@pytest.mark.parametrize("kind", ["text", "full"])
def test_weights_in_shards(tmp_path: Path, kind: str) -> None:
    """Of a full CLIP, the last shard has nothing of the text part."""
    clip = make_tiny_clip(tmp_path, kind=kind)
    expected, weights = load_text_encoder(clip).encode(CAPTIONS), load_file(clip / "model.safetensors")
    names = {name: f"model-0000{1 + number % 2}-of-00003.safetensors" for number, name in enumerate(sorted(weights))}
    names |= {name: "model-00003-of-00003.safetensors" for name in weights if name.startswith("vision_model.")}
    for shard in set(names.values()):
        save_file({name: weights[name] for name in names if names[name] == shard}, clip / shard)
    (clip / "model.safetensors").unlink()
    (clip / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert_equal(load_text_encoder(clip).encode(CAPTIONS), expected)


def test_tiny_tokenizer_has_the_layout_of_clip(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path) == 521
    assert list(json.loads((tmp_path / "vocab.json").read_text()).items())[-2:] == [(START, 519), (END, 520)]


# Features of captions --------------------------------------------------------------------------------------------------------


def test_padding_truncation_case_and_spaces_do_not_change_a_caption(encoder: TextEncoder) -> None:
    equal = [("the cat on the dog", CAPTIONS[3]), ("café", "cafe\u0301"), ("cat " * 75, "cat " * 75 + "dog " * 20)]
    for pair in equal:
        assert torch.equal(*encoder.encode(pair).hidden)
    features = encoder.encode(["cat " * 75, "cat " * 74, "the cat on the dog", "the cat on a dog"])
    assert features.num_tokens.tolist() == [77, 76, 7, 7]
    assert torch.equal(features.pooled[0], features.hidden[0, 76])
    first, second = features.hidden[2:]
    assert torch.equal(first[:4], second[:4])  # start, the, cat, on
    assert not torch.isclose(first[4:], second[4:]).all(dim=1).any()


@pytest.mark.parametrize("threads", [1, 2])
def test_features_of_a_caption_do_not_depend_on_the_others(encoder: TextEncoder, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, backwards = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS[::-1])
        alone = [encoder.encode([caption]) for caption in CAPTIONS]
        assert_equal(whole, TextFeatures(*(torch.cat([getattr(part, name) for part in alone]) for name in vars(whole))))
        assert_equal(whole, TextFeatures(*(tensor.flip(0) for tensor in vars(backwards).values())))
    finally:
        torch.set_num_threads(before)
    dtypes = [tensor.dtype for tensor in vars(whole).values()]
    assert dtypes == [torch.float16, torch.float16, torch.int64] and not whole.hidden.is_inference()


@settings(max_examples=30)
@given(captions=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=120), max_size=2 * CAPTIONS_PER_PASS + 1))
def test_any_text_can_be_a_caption(encoder: TextEncoder, captions: list[str]) -> None:
    features = encoder.encode(captions)
    assert (features.hidden.shape, features.pooled.shape) == ((len(captions), 77, 32), (len(captions), 32))
    assert features.hidden.isfinite().all()
    assert ((features.num_tokens >= 2) & (features.num_tokens <= 77)).all()
    if not any(END in caption.lower() for caption in captions):
        assert torch.equal(features.pooled, features.hidden[torch.arange(len(captions)), features.num_tokens - 1])


def test_other_captions_and_values_beyond_float16_are_refused(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    for caption in (None, 3, b"cat", "\ud83d"):
        with pytest.raises(ValueError, match="a caption must be text"):
            encoder.encode(["a cat", caption])  # type: ignore[list-item]
    encoder.model.final_layer_norm.bias.fill_(7e4)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        encoder.encode(["a cat"])


# Folders that can be loaded ----------------------------------------------------------------------------------------------------


def _edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def _save_tokenizer_as_one_file(folder: Path) -> None:
    load_text_encoder(folder).tokenizer.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def _ask_for_code(folder: Path) -> None:
    remote = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "kernels-community/flash-attn"}
    edit_config(folder, **remote, quantization_config={"quant_method": "bitsandbytes"})
    (folder / "evil.py").write_text("raise SystemExit('run')")
    tokenizer = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_config(folder, eos_token_id=2),  # before transformers 4.31; the model pools at the highest id
        _save_tokenizer_as_one_file,
        _ask_for_code,
    ],
    ids=["old id", "one file", "code"],
)
def test_folder_of_another_layout_gives_the_same_features(own_folder: Path, encoder: TextEncoder, change: Callable) -> None:
    change(own_folder)
    loaded = load_text_encoder(own_folder)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert_equal(loaded.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_weights_in_float16_are_computed_with_in_float32(own_folder: Path, encoder: TextEncoder) -> None:
    _edit_weights(own_folder, lambda weights: {name: value.half() for name, value in weights.items()})
    loaded = load_text_encoder(own_folder)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.encode(CAPTIONS).hidden, encoder.encode(CAPTIONS).hidden, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_text_part_of_a_whole_clip_is_loaded_alone_and_without_output(tmp_path: Path) -> None:
    full = make_tiny_clip(tmp_path / "full", kind="full")
    code = """
import sys, torch
from enat.text import load_text_encoder
state = torch.random.get_rng_state()
encoder = load_text_encoder(sys.argv[1])
assert torch.equal(torch.random.get_rng_state(), state)
features = encoder.encode(["the cat", ""])
assert not any("vision" in name or "projection" in name for name, _ in encoder.model.named_parameters())
torch.save([features.hidden, features.pooled], sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(full), str(tmp_path / "features")]
    root, environment = Path(__file__).parents[2], {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    hidden, pooled = torch.load(tmp_path / "features")
    weights = {name.removeprefix("text_model."): value for name, value in load_file(full / "model.safetensors").items()}
    tokens = torch.tensor([plain_tokens([515, 513], 519, 520), plain_tokens([], 519, 520)])
    torch.testing.assert_close(hidden.double(), plain_hidden(weights, tokens, num_heads=4), rtol=2**-10, atol=1e-4)
    assert torch.equal(pooled, hidden[[0, 1], [3, 1]])


# Folders that are refused ------------------------------------------------------------------------------------------------------


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_unopened(own_folder: Path, tmp_path: Path, name: str) -> None:
    (own_folder / "model.safetensors").unlink()
    (own_folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "run")))
    with pytest.raises(ValueError, match="has no model.safetensors" if name.endswith("bin") else "not a readable safetensors"):
        load_text_encoder(own_folder)
    assert not (tmp_path / "run").exists()


def _index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))


def _shrink_vocabulary(folder: Path) -> None:
    name = "embeddings.token_embedding.weight"
    _edit_weights(folder, lambda weights: {**weights, name: weights[name][:500].clone()})
    edit_config(folder, vocab_size=500, eos_token_id=499)


def _drop_bias(folder: Path) -> None:
    name = "encoder.layers.1.mlp.fc2.bias"
    _edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if key != name})


CLIP: dict[str, Any] = {"model_type": "clip_text_model"}
TOKENIZER = r"neither tokenizer\.json nor vocab\.json with merges\.txt"
DAMAGED = r"no readable CLIP tokenizer|tokenizer has ids|pools at id"
REFUSED: list[tuple[Any, str]] = [
    *(
        (lambda folder, shard=shard: _index(folder, shard), f"has no {shard}")
        for shard in ("pytorch_model.bin", "../model.safetensors")
    ),
    (lambda folder: _index(folder, "missing.safetensors"), r"has no missing\.safetensors"),
    (_drop_bias, r"missing: encoder\.layers\.1\.mlp\.fc2\.bias"),
    (_shrink_vocabulary, "ids up to 520, but the text model embeds 500"),
    (lambda folder: edit_config(folder, eos_token_id=7), "pools at id 7"),
    (lambda folder: edit_config(folder, eos_token_id=None), "pools at id None"),
    ({"tokenizer_config.json": '{"padding_side": "left"}'}, "pads captions on the left"),
    ({"vocab.json": None}, TOKENIZER),
    ({"merges.txt": None}, TOKENIZER),
    ({"vocab.json": "{"}, DAMAGED),
    ({"merges.txt": "xyz\n"}, DAMAGED),
    ({"tokenizer.json": "{}"}, DAMAGED),
    ({"config.json": None}, r"holds no text encoder: it has no config\.json"),
    ({"config.json": "{"}, "JSON"),
    ({"config.json": "[1]"}, "JSON object"),
    ({"config.json": json.dumps({"model_type": "bert", "vocab_size": 5})}, "a model of type bert, not CLIP"),
    ({"config.json": json.dumps({"architecture": "vqgan"})}, "describes no model, not CLIP"),
    ({"config.json": json.dumps({**CLIP, "hidden_size": "wide"})}, "known CLIP text model"),
    ({"config.json": json.dumps({**CLIP, "hidden_size": 33, "num_attention_heads": 4})}, "known CLIP text model"),
    ({"config.json": json.dumps({**CLIP, "hidden_act": "sine"})}, "known CLIP text model"),
    (
        {"config.json": json.dumps({"model_type": "clip", "text_config": {"hidden_size": 16, "num_attention_heads": 4}})},
        "does not fit",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_folders_are_refused_in_one_line(own_folder: Path, change: Any, message: str) -> None:
    if callable(change):
        change(own_folder)
    else:
        for name, content in change.items():
            (own_folder / name).unlink(missing_ok=True) if content is None else (own_folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(own_folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not a directory"):
        load_text_encoder(own_folder / "config.json")
