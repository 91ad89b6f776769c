"""A model in a folder: it opens only if everything fits, and one call gives images that depend on seed and label alone."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from enat import ENAT, ENATPipeline, SamplerConfig, sample
from enat.checkpoint import save_weights
from enat.files import hub
from enat.images import to_uint8
from enat.pipeline import HubConfig
from material.small_models import TEXT, small_enat, small_vqgan

SAMPLER = SamplerConfig(num_steps=3, guidance_scale=2.0)
NAMES = ("zero", "one", "two", "three", "one")


def write(folder, model=None, vqgan=None, **values):
    model, vqgan = model or small_enat(), vqgan or small_vqgan()
    save_weights(folder / hub.MODEL, model)
    save_weights(folder / hub.TOKENIZER, vqgan)
    config = HubConfig(**{"model": model.config, "tokenizer": vqgan.config, "sampler": SAMPLER, "class_names": NAMES, **values})
    (folder / hub.CONFIG).write_text(config.to_json())
    return model, vqgan


def test_model_is_equal_after_the_folder(tmp_path):
    model, vqgan = write(tmp_path)
    before = torch.get_rng_state()
    loaded, pipe = ENAT.from_pretrained(tmp_path), ENATPipeline.from_pretrained(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the global generator"
    for own, read in ((model, loaded), (model, pipe.model), (vqgan, pipe.vqgan)):
        assert read.config == own.config and not read.training
        assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert (pipe.sampler, pipe.class_names) == (SAMPLER, NAMES)


def test_tensors_without_a_header_are_read_by_the_config(tmp_path):
    """Other programs that rewrite safetensors drop what save_weights stated."""
    model, _ = write(tmp_path)
    save_file(load_file(tmp_path / hub.MODEL), tmp_path / hub.MODEL)
    assert torch.equal(ENAT.from_pretrained(tmp_path).head.dense.weight, model.head.dense.weight)


def test_images_are_those_of_single_samples_for_any_batch(tmp_path):
    model, vqgan = write(tmp_path)
    pipe = ENATPipeline.from_pretrained(tmp_path)
    labels, seeds = [3, 1, 4, 1, 3], [9, 8, 7, 2**63 - 1, 5]
    whole = pipe(labels=labels, seeds=seeds, images_per_pass=3)
    assert whole.seeds == seeds and [image.size for image in whole.images] == [(16, 16)] * 5 and whole.codes.shape == (5, 16)
    for number, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        codes = sample(model, torch.tensor([label]), SAMPLER, seeds=[seed])[0]
        assert torch.equal(whole.codes[number], codes)
    pixels = to_uint8(vqgan.decode(whole.codes.view(5, 4, 4))).permute(0, 2, 3, 1).numpy()
    shown = np.stack([np.asarray(image) for image in whole.images])
    assert np.abs(shown.astype(int) - pixels).max() <= 1  # a decoder that computes others beside them may round otherwise
    part = pipe(labels=labels[:4], seeds=seeds[:4], images_per_pass=3)
    assert torch.equal(part.codes, whole.codes[:4]) and list(map(list, (i.getdata() for i in part.images))) == [
        list(image.getdata()) for image in whole.images[:4]
    ]


def test_settings_of_a_call_replace_those_of_the_model(tmp_path):
    model, _ = write(tmp_path)
    pipe = ENATPipeline.from_pretrained(tmp_path)
    made = pipe(labels=["three", "zero"], seeds=[1, 2], num_inference_steps=5, guidance_scale=4.0, remask_temperature=0.5)
    sampler = dataclasses.replace(SAMPLER, num_steps=5, guidance_scale=4.0, remask_temperature=0.5)
    assert torch.equal(made.codes, sample(model, torch.tensor([3, 0]), sampler, seeds=[1, 2]))
    assert not torch.equal(made.codes, pipe(labels=[3, 0], seeds=[1, 2]).codes)


def test_seeds_come_from_the_call_a_generator_or_are_fresh(tmp_path):
    write(tmp_path)
    pipe = ENATPipeline.from_pretrained(tmp_path)
    drawn = [pipe(labels=[0, 1], generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert drawn[0].seeds == drawn[1].seeds and torch.equal(drawn[0].codes, drawn[1].codes)
    before = torch.get_rng_state()
    fresh = [pipe(labels=torch.tensor([0, 1])) for _ in range(2)]
    assert fresh[0].seeds != fresh[1].seeds and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pipe(labels=[0, 1], seeds=fresh[0].seeds).codes, fresh[0].codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give labels or captions"),
        ({"labels": [0], "captions": ["a"]}, "give labels or captions"),
        ({"labels": [6]}, "this model has labels 0 to 5"),
        ({"labels": [0.5]}, "0.5 is not a label"),
        ({"labels": ["four"]}, "0 classes have the name 'four'"),
        ({"labels": ["one"]}, "2 classes have the name 'one'"),
        ({"labels": []}, "labels or captions are empty"),
        ({"labels": [0], "seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"labels": [0], "seeds": [-1]}, r"seeds must be in \[0, 2\*\*63\)"),
        ({"labels": [0], "seeds": [1], "generator": torch.Generator()}, "not both"),
        ({"labels": [0], "num_inference_steps": 0}, "num_steps is 0"),
        ({"labels": [0], "num_stepz": 3}, "the sampler has no such setting"),
        ({"labels": [0], "images_per_pass": 0}, "images_per_pass is 0"),
        ({"captions": ["a"]}, "for a model of captions"),
    ],
)
def test_calls_that_do_not_fit_are_refused(tmp_path, call, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        ENATPipeline.from_pretrained(tmp_path)(**call)


def test_captions_need_their_encoder(tmp_path):
    write(tmp_path, small_enat(**TEXT), class_names=(), text_encoder="hf://owner/clip")
    with pytest.raises(ValueError, match="captions need the CLIP text model of the training"):
        ENATPipeline.from_pretrained(tmp_path)(captions=["a"])


def test_captions_become_images(tmp_path):
    from material.tiny_clip import make_tiny_clip

    clip = make_tiny_clip(tmp_path / "clip", max_position_embeddings=16)
    write(tmp_path, small_enat(text_width=32, num_text_tokens=16, num_classes=0), class_names=())
    pipe = ENATPipeline.from_pretrained(tmp_path, text_encoder=clip)
    made = pipe(captions=["a dog", "a cat"], seeds=[0, 0], images_per_pass=2)
    assert len(made.images) == 2 and torch.equal(made.codes[:1], pipe(captions=["a dog"], seeds=[0], images_per_pass=2).codes)
    assert not torch.equal(*made.codes), "another caption, another image"


# What does not fit ---------------------------------------------------------------------------------------------------------


def changed(config, path, value):
    *parents, name = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[name] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "its format is 2, and this version reads 1"),
        ("model.encoder_layers", 3, "was written with another encoder_layers than its config states"),
        ("model.reuse", False, "was written with another reuse than its config states"),
        ("model.num_layers", 3, "num_layers"),
        ("model.embed_dim", "wide", "cannot be used"),
        ("model.embed_dim", 33, "it must be a multiple of num_heads"),
        ("model.codebook_size", 25, "different codes or grids"),
        ("tokenizer.resolution", 32, "different codes or grids"),
        ("tokenizer.num_res_blocks", 2, "was written with another num_res_blocks than its config states"),
        ("sampler.num_steps", 0, "num_steps is 0"),
        ("class_names", ["a"], "class_names has 1 names for 5 classes"),
        ("class_names", [1, 2, 3, 4, 5], "must be text"),
        ("model", [], "cannot be used"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_one_sentence(tmp_path, path, value, message):
    write(tmp_path)
    config = json.loads((tmp_path / hub.CONFIG).read_text())
    changed(config, path, value)
    (tmp_path / hub.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as refused:
        ENATPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", 1 << 20, "does not fit the configured architecture"),
        ("encoder_layers", 10**9, "too few for the 1000000002 blocks"),
        ("encoder_layers", 1, r"surplus: encoder\.1\."),
        ("codebook_size", 10**12, "different codes"),
    ],
)
def test_configs_of_any_size_are_compared_with_the_file_before_memory_is_taken(tmp_path, field, value, message):
    write(tmp_path)
    save_file(load_file(tmp_path / hub.MODEL), tmp_path / hub.MODEL)  # without our header
    config = json.loads((tmp_path / hub.CONFIG).read_text())
    config["model"][field] = value
    (tmp_path / hub.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        ENATPipeline.from_pretrained(tmp_path)


def test_files_that_are_missing_damaged_or_pickled_are_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no exported model: it has no config.json")):
        ENAT.from_pretrained(tmp_path)
    for content in (b"{", b"[]", b"[" * 100_000, b"\xff"):
        (tmp_path / hub.CONFIG).write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json cannot be used: "):
            ENAT.from_pretrained(tmp_path)
    model, _ = write(tmp_path)
    whole = (tmp_path / hub.MODEL).read_bytes()
    for damaged in (whole[:-1], b"", whole[:100]):
        (tmp_path / hub.MODEL).write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            ENAT.from_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / hub.MODEL)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        ENAT.from_pretrained(tmp_path)
    save_weights(tmp_path / hub.MODEL, small_vqgan())
    with pytest.raises(ValueError, match="does not hold the weights of enat"):
        ENAT.from_pretrained(tmp_path)
    (tmp_path / hub.MODEL).unlink()
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        ENAT.from_pretrained(tmp_path)
    for source in ("nowhere", "a/b/c", "../x", "/nowhere", "owner/.."):
        with pytest.raises(ValueError, match="is not a directory; give the folder of an exported model, or owner/name of the hub"):
            ENAT.from_pretrained(source)
