"""The configuration of training: invalid values are refused by name, and schedules are functions of the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from material.tiny_training import CONFIG, changed
from pipelines.data.captions import CaptionFeaturesInfo
from pipelines.data.token_map import TokenMapInfo
from pipelines.training.config import ModelConfig, TrainConfig, TrainExecution


@pytest.fixture
def info(material):
    return TokenMapInfo(**material.inputs["token_map"].summary["info"])


@pytest.fixture
def captions(material):
    return CaptionFeaturesInfo(**material.inputs["captions"].summary["info"])


# Recipes and how they run --------------------------------------------------------------------------------------------------


def test_invalid_recipe_is_refused():
    invalid: list[tuple[dict[str, Any], str]] = [
        ({"num_groups": 5}, r"batch_size is 16; it must be a multiple of num_groups, which is 5"),
        (
            {"execution": {"num_workers": 17}},
            r"batch_size is 16, but execution\.num_workers 17 needs at least 17 with execution\.microbatches 1, so that",
        ),
        ({"execution": {"microbatches": 3}}, r"execution\.microbatches is 3; it must divide a group of 4 images"),
        ({"num_steps": -1}, r"num_steps is -1"),
        ({"batch_size": 0}, r"batch_size is 0; it must be at least 1"),
        ({"cond_drop_prob": 1.0}, r"cond_drop_prob is 1\.0; it must be in \[0, 1\)"),
        ({"label_smoothing": -0.5}, r"label_smoothing is -0\.5; it must be in \[0, 1\)"),
        ({"ema_decay": -0.1}, r"ema_decay is -0\.1"),
        ({"learning_rate": float("nan")}, r"learning_rate is nan; it must be finite and at least 0"),
        ({"learning_rate": float("inf")}, r"learning_rate is inf"),
        ({"final_learning_rate": -1.0}, r"final_learning_rate is -1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0"),
        ({"z_loss": -1e-4}, r"z_loss is -0\.0001"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; it must be above 0"),
        ({"max_grad_norm": float("nan")}, r"max_grad_norm is nan; it must be finite and above 0"),
        ({"precision": "fp8"}, r"precision is 'fp8'; choose one of fp32, bf16, fp16"),
        ({"learning_rate_schedule": "step"}, r"learning_rate_schedule is 'step'; choose one of constant, cosine"),
        ({"weight_decay_on": "none"}, r"weight_decay_on is 'none'; choose one of all, matrices"),
        (
            {"precision": "fp16", "execution": {"zero_stage": 0}},
            r"precision fp16 needs execution\.zero_stage 1, 2 or 3",
        ),
    ]
    for fields, sentence in invalid:
        with pytest.raises(ValueError, match=sentence):
            changed(**fields)


def test_invalid_execution_is_refused():
    invalid: list[tuple[dict[str, Any], str]] = [
        ({"min_workers": 3, "num_workers": 2}, r"min_workers is 3; it must be at most num_workers, which is 2"),
        ({"zero_stage": 4}, r"zero_stage is 4; it must be in \[0, 3\]"),
        ({"zero_stage": 3, "compile": True}, r"compile does not work with zero_stage 3"),
        ({"on_divergence": "ignore"}, r"on_divergence is 'ignore'; choose one of stop, rollback"),
        ({"resize_seconds": -1.0}, r"resize_seconds is -1\.0; it must be at least 0"),
        ({"divergence_factor": 1.0}, r"divergence_factor is 1\.0; it must be above 1"),
        ({"num_workers": 0}, r"num_workers is 0"),
    ]
    counts = ("checkpoint_every", "log_every", "sample_every", "keep_last", "keep_every", "microbatches", "min_workers")
    for fields, sentence in [*invalid, *(({name: 0}, rf"{name} is 0; it must be at least 1") for name in counts)]:
        with pytest.raises(ValueError, match=sentence):
            TrainExecution(**fields)


def test_identity_is_the_recipe_without_its_execution():
    ways = [{"num_workers": 4}, {"zero_stage": 3}, {"microbatches": 2}, {"compile": True}, {"keep_every": 8}]
    for execution in ways:
        assert changed(execution=execution).identity() == CONFIG.identity()
    for fields in [{"precision": "bf16"}, {"z_loss": 1e-4}, {"max_grad_norm": 1.0}, {"num_groups": 2}, {"seed": 1}]:
        assert changed(**fields).identity() != CONFIG.identity()


# Schedules -----------------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_in_a_line_and_stays():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4)
    assert [config.learning_rate_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert dataclasses.replace(config, warmup_steps=0).learning_rate_at(0) == 1.0


def test_learning_rate_falls_by_half_a_cosine():
    config = TrainConfig(learning_rate=1.0, final_learning_rate=0.2, learning_rate_schedule="cosine", warmup_steps=4, num_steps=12)
    rates = [config.learning_rate_at(step) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.6) and rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True) and len(set(rates[4:])) == 9
    assert rates[6] + rates[10] == pytest.approx(1.2), "symmetric about its middle"


def test_run_of_nothing_but_warm_up_has_a_learning_rate():
    config = TrainConfig(learning_rate=1.0, learning_rate_schedule="cosine", warmup_steps=4, num_steps=4)
    assert config.learning_rate_at(3) == 1.0


# Models --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("grid_size", 16, r"train\.model\.grid_size is 16, but the token map of drawn \(16 px\) has 4"),
        ("codebook_size", 1024, r"train\.model\.codebook_size is 1024, but the token map of drawn \(16 px\) has 32"),
        ("num_classes", 1000, r"train\.model\.num_classes is 1000, but the token map of drawn \(16 px\) has 2"),
        ("num_heads", 3, r"train\.model\.embed_dim is 32; it must be a multiple of num_heads, which is 3"),
    ],
)
def test_model_that_does_not_fit_the_token_map_is_refused(info, field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG.model, **{field: value}).architecture(info)


def test_model_without_preset_must_give_its_sizes(info):
    with pytest.raises(ValueError, match=r"no preset.* decoder_layers, num_heads"):
        ModelConfig(encoder_layers=1, embed_dim=32).architecture(info)


def test_preset_takes_the_sizes_of_the_token_map_and_every_replaced_field(info):
    made = ModelConfig(preset="enat-s", encoder_layers=3, reuse=False).architecture(info)
    assert (made.embed_dim, made.encoder_layers, made.reuse) == (512, 3, False)
    assert (made.grid_size, made.codebook_size, made.num_classes) == (4, 32, 2)


def test_text_model_takes_its_widths_from_the_captions(info, captions):
    made = dataclasses.replace(CONFIG.model, text=True).architecture(info, captions)
    assert (made.text_width, made.num_text_tokens, made.num_classes) == (8, 3, 0)


def test_text_model_that_does_not_fit_its_captions_is_refused(info, captions):
    model = dataclasses.replace(CONFIG.model, text=True)
    with pytest.raises(ValueError, match=r"train\.model\.text requires .*captions\.encoder"):
        model.architecture(info)
    with pytest.raises(ValueError, match=r"40 captions, but there are features of 39"):
        model.architecture(info, dataclasses.replace(captions, num_captions=39))
    with pytest.raises(ValueError, match=r"num_classes is 2, but a text model has no classes"):
        dataclasses.replace(model, num_classes=2).architecture(info, captions)
