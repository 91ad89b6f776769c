"""Number formats of sampling, encoding and decoding, and the sampler as one graph."""

from __future__ import annotations

import pytest
import torch

from enat.config import VQGANConfig
from enat.execution.precision import computing_in
from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.cuda_graph import GraphedLoop
from enat.sampling.sampler import sample
from enat.tokenizer import VQGAN
from material.random_weights import randomized
from material.small_models import small_config

TEXT = {"text_width": 24, "num_text_tokens": 5, "num_classes": 0}


def _vqgan() -> VQGAN:
    return randomized(VQGAN(VQGANConfig.preset("vqgan-small")), std=0.1)


def test_tf32_is_allowed_inside_only():
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]

    def fail() -> None:
        with computing_in("tf32", "cpu"):
            assert all(backend.allow_tf32 for backend in backends)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [backend.allow_tf32 for backend in backends] == before
    with computing_in("fp32", "cpu"):
        assert [backend.allow_tf32 for backend in backends] == before


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="fp64"), computing_in("fp64", "cpu"):
        pass


def test_bf16_changes_images_a_little_and_codes_rarely():
    vqgan, generator = _vqgan(), torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=generator)
    codes = vqgan.encode(images)
    flips = (vqgan.encode(images, "bf16") != codes).float().mean()
    exact, rounded = vqgan.decode(codes), vqgan.decode(codes, "bf16")
    assert rounded.dtype == exact.dtype == torch.float32
    assert flips < 0.2 and 0 < (exact - rounded).abs().mean() < 0.05
    assert torch.equal(vqgan.encode(images, "tf32"), codes), "on CPUs it is fp32"


@pytest.mark.parametrize("architecture", [{}, TEXT, {"qk_norm": True}, {"reused_features": "all"}], ids=str)
def test_weights_in_bf16_give_the_same_bits_as_autocast(architecture):
    config = SamplerConfig(num_steps=4)
    model = randomized(ENAT(small_config(**architecture)))
    held = randomized(ENAT(small_config(**architecture))).hold_bf16()
    assert any(parameter.dtype == torch.bfloat16 for parameter in held.parameters())
    labels = TextCondition(torch.randn(6, 5, 24), torch.randn(6, 24)) if architecture is TEXT else torch.arange(6) % 3

    def outputs(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(torch.full((6, 16), model.config.mask_id), labels, num_masked=16, logits="masked").logits

    assert torch.equal(outputs(model), outputs(held))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*(sample(each, labels, config, seeds=range(6)) for each in (model, held)))


# One graph -------------------------------------------------------------------------------------------------------------------


class _Recorder:
    """In place of a CUDA graph: a replay repeats the recorded function and writes into the tensors that it returned first."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def __call__(self, function):
        self.num_recorded += 1
        made = function()

        def replay():
            for place, again in zip(made, function(), strict=True):
                place.copy_(again)
            return made

        return replay


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ({}, {}),
        (TEXT, {}),
        ({}, {"reveal_order": "halton", "remask_temperature": 0.0}),
        ({"reuse": False}, {"reuse": False}),
        ({}, {"guide_layers": 1}),
        (
            {"encoder_layers": 0, "decoder_layers": 3, "decoder_attention": "full", "reuse": False},
            {"local_steps": 1, "reuse": False, "guidance_schedule": "constant"},
        ),
    ],
    ids=str,
)
def test_a_recorded_loop_gives_the_samples_of_the_loop(architecture, options):
    config, model = SamplerConfig(num_steps=4, **options), randomized(ENAT(small_config(**architecture)))
    recorder = _Recorder()
    loop = GraphedLoop(recorder)

    def conditions(seed):
        generator = torch.Generator().manual_seed(seed)
        if architecture is TEXT:
            return TextCondition(torch.randn(3, 5, 24, generator=generator), torch.randn(3, 24, generator=generator))
        return torch.randint(3, (3,), generator=generator)

    made = [sample(model, conditions(n), config, seeds=range(n, n + 3), loop=loop, return_trajectory=True) for n in range(3)]
    assert recorder.num_recorded == 1
    for number, (codes, trajectory) in enumerate(made):  # after all replays: none overwrote an earlier one
        expected, steps = sample(model, conditions(number), config, seeds=range(number, number + 3), return_trajectory=True)
        assert torch.equal(codes, expected) and all(map(torch.equal, trajectory, steps))


def test_other_shapes_and_settings_are_recorded_again():
    model, recorder = randomized(ENAT(small_config())), _Recorder()
    loop, config = GraphedLoop(recorder), SamplerConfig(num_steps=3)
    start = torch.full((2, 16), model.config.mask_id)
    start[:, :5] = 1
    for settings, labels, given in [
        (config, 2, None),
        (config, 3, None),
        (SamplerConfig(num_steps=4), 2, None),
        (config, 2, start),
    ]:
        codes = sample(model, torch.zeros(labels, dtype=torch.int64), settings, seeds=range(labels), start=given, loop=loop)
        assert torch.equal(codes, sample(model, torch.zeros(labels, dtype=torch.int64), settings, seeds=range(labels), start=given))
    assert recorder.num_recorded == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_samples_of_the_loop():
    model, config = randomized(ENAT(small_config())).cuda(), SamplerConfig(num_steps=4)
    loop, labels = GraphedLoop(), torch.arange(3)
    for first in (0, 10):
        seeds = range(first, first + 3)
        assert torch.equal(sample(model, labels, config, seeds=seeds, loop=loop), sample(model, labels, config, seeds=seeds))
