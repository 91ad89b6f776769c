"""A short slice of the benchmark of sampling: that what is compared computes the same. No times are asserted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sampling_loops
import torch
from training_loops import make_model

from enat import ENAT, ENATConfig, SamplerConfig, sample


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are tiny, and on a busy machine threads mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> ENAT:
    """As trained ones, its blocks are no identities, unlike those of a new model."""
    config = ENATConfig(encoder_layers=2, decoder_layers=2, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=4)
    made = make_model(config, "cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for block in (*made.encoder, *made.decoder):
        block.modulation.weight.normal_(std=0.3, generator=generator)
    return made


@pytest.mark.parametrize("options", [{}, {"reuse": False}, {"num_steps": 3}], ids=str)
def test_the_samplers_that_are_compared_make_the_same_codes(model: ENAT, options: dict[str, Any]) -> None:
    """Else their ratio would say nothing."""
    config = SamplerConfig(**options)
    conditions, uniforms = sampling_loops.inputs(model, 6, config, "cpu")
    codes = sampling_loops.obvious_sample(model, conditions, uniforms, config)
    assert torch.equal(codes, sampling_loops.Loop(model, config)(conditions, uniforms))
    assert torch.equal(codes, sample(model, conditions[:6], config, seeds=range(6)))


def test_weights_in_half_precision_are_sampled_from(model: ENAT) -> None:
    conditions, uniforms = sampling_loops.inputs(model, 2, SamplerConfig(), "cpu")
    codes = sampling_loops.Loop(model.to(torch.bfloat16), SamplerConfig())(conditions, uniforms)
    assert codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < 32


def test_figures_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ENATConfig(encoder_layers=2, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=4)
    monkeypatch.setattr(sampling_loops.ENATConfig, "preset", lambda _: small)
    monkeypatch.setattr(sampling_loops, "decoding", lambda **_: {"decoded_images_per_second": 5.0})
    figures = sampling_loops.measure("any", batch_size=2, device="cpu", precision="fp32", num_rounds=1)
    speeds = [figures[f"{name}_images_per_second"] for name in ("obvious", "fresh", "reuse")]
    assert figures["reuse_over_fresh"] == speeds[2] / speeds[1]
    assert figures["macs_of_fresh_over_reuse"] > 1 > figures["macs_of_plain_over_half_given"]
    assert figures["minutes_for_50k_samples"] == pytest.approx(50_000 * (1 / max(speeds) + 1 / 5.0) / 60)
    assert figures["reuse_share_of_matmul_peak"] == pytest.approx(figures["reuse_tflops"] / figures["matmul_tflops"])
