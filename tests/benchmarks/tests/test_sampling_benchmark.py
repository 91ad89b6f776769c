"""A short run of the benchmark of sampling. The compared samplers compute the same; no times are asserted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import samples_with_fid
import sampling
import sampling_loops
import torch
from click.testing import CliRunner
from training_loops import make_model

from enat.config import ENATConfig
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: with more threads, these mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> ENAT:
    """Its blocks are not identities, unlike those of an untrained model."""
    config = ENATConfig(encoder_layers=2, decoder_layers=2, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=4)
    made = make_model(config, "cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for block in (*made.encoder, *made.decoder):
        block.modulation.weight.normal_(std=0.3, generator=generator)
    return made


def test_the_stages_path_and_the_fastest_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: bf16 with fast decoding, and a CUDA graph per call as the fastest sampler."""
    monkeypatch.setattr(samples_with_fid, "sampling", lambda *_, **__: 20.0)
    monkeypatch.setattr(samples_with_fid, "decoding", lambda *, precision, **_: {"fp32": 5.0, "bf16": 8.0}[precision])
    monkeypatch.setattr(samples_with_fid, "features", lambda **_: 4.0)
    monkeypatch.setattr(samples_with_fid, "distance_seconds", lambda: 0.0)
    figures = samples_with_fid.project(
        "enat-l", ("graphed", 40.0), batch_size=256, device="cuda", precision="bf16", num_rounds=1, compiled=True
    )
    assert figures["stages_path"] == "bf16 autocast over fp32 weights, compiled blocks; decoder and Inception fp32 without TF32"
    assert figures["fastest_path"] == "graphed, bf16 weights; decoder bf16, Inception fp32 without TF32"
    stages, fastest = (figures[f"{path}_minutes_for_50k_samples_with_fid"] for path in ("stages", "fastest"))
    assert stages == pytest.approx(50_000 * (1 / 20 + 1 / 5 + 1 / 4) / 60)
    assert fastest == pytest.approx(50_000 * (1 / 40 + 1 / 8 + 1 / 4) / 60)


@pytest.mark.faults
def test_every_part_of_samples_with_fid_can_be_timed() -> None:
    given = {"batch_size": 1, "device": "cpu", "num_rounds": 1}
    assert samples_with_fid.decoding(precision="bf16", **given) > 0
    assert samples_with_fid.features(**given) > 0 and samples_with_fid.distance_seconds(64) > 0


def test_on_a_gpu_the_large_model_is_sampled_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(sampling, "in_process", lambda *given: asked.append(dict(given[3])) or {})
    monkeypatch.setattr(sampling.torch.cuda, "get_device_name", lambda: "a GPU")
    for is_gpu, given in ((True, ()), (True, ("--preset", "enat-b")), (False, ())):
        monkeypatch.setattr(sampling.torch.cuda, "is_available", lambda is_gpu=is_gpu: is_gpu)
        assert CliRunner().invoke(sampling.main, ["--json", *given]).exit_code == 0
    assert [(each["preset"], each["device"], each["precision"]) for each in asked] == [
        ("enat-l", "cuda", "bf16"),
        ("enat-b", "cuda", "bf16"),
        ("enat-s", "cpu", "fp32"),
    ]


@pytest.mark.parametrize("options", [{}, {"reuse": False}, {"num_steps": 3}], ids=str)
def test_the_compared_samplers_make_the_same_codes(model: ENAT, options: dict[str, Any]) -> None:
    """Otherwise their ratio would be meaningless."""
    config = SamplerConfig(**options)
    conditions, uniforms = sampling_loops.inputs(model, 6, config, "cpu")
    codes = sampling_loops.obvious_sample(model, conditions, uniforms, config)
    assert torch.equal(codes, sampling_loops.Loop(model, config)(conditions, uniforms))
    assert torch.equal(codes, sampling_loops.published_like_sample(model, conditions, uniforms, config))
    assert torch.equal(codes, sample(model, conditions[:6], config, seeds=range(6)))


def test_weights_in_half_precision_are_sampled_from(model: ENAT) -> None:
    conditions, uniforms = sampling_loops.inputs(model, 2, SamplerConfig(), "cpu")
    codes = sampling_loops.Loop(model.to(torch.bfloat16), SamplerConfig())(conditions, uniforms)
    assert codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < 32


@pytest.mark.slow
def test_figures_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ENATConfig(encoder_layers=2, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=4)
    monkeypatch.setattr(sampling_loops.ENATConfig, "preset", lambda _: small)
    monkeypatch.setattr(sampling_loops.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(samples_with_fid, "decoding", lambda *, precision, **_: {"fp32": 5.0, "bf16": 8.0}[precision])
    monkeypatch.setattr(samples_with_fid, "features", lambda **_: 4.0)
    monkeypatch.setattr(samples_with_fid, "distance_seconds", lambda: 30.0)
    figures = sampling_loops.measure("any", batch_size=2, device="cpu", precision="fp32", num_rounds=1)
    speeds = {
        name: figures[f"{name}_images_per_second"] for name in ("obvious", "obvious_reuse", "published_like", "fresh", "reuse")
    }
    assert figures["reuse_over_fresh"] == speeds["reuse"] / speeds["fresh"]
    assert figures["reuse_over_published_like"] == speeds["reuse"] / speeds["published_like"]
    assert figures["reuse_over_obvious_reuse"] == speeds["reuse"] / speeds["obvious_reuse"]
    assert not {"obvious_tflops", "obvious_reuse_tflops"} & set(figures), "it computes more than is counted"
    assert figures["macs_of_fresh_over_reuse"] > 1 > figures["macs_of_plain_over_half_given"]
    own = figures["stages_sampling_images_per_second"]
    for path, sampled in (("stages", own), ("fastest", max(own, *speeds.values()))):
        minutes = (50_000 * (1 / sampled + 1 / 5.0 + 1 / 4.0) + 30) / 60
        assert figures[f"{path}_minutes_for_50k_samples_with_fid"] == pytest.approx(minutes)
    assert figures["stages_path"] == "fp32; decoder and Inception fp32 without TF32"
    assert {"reuse_of_one_image_over_published_like", "passes_side_by_side_over_one_on_all_cores"} < set(figures)
    assert figures["reuse_share_of_matmul_peak"] == pytest.approx(figures["reuse_tflops"] / figures["matmul_tflops"])
