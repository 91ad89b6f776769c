"""Passes of fixed composition: a sample is always in the same row of equally many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from enat.config import ENATConfig
from enat.images import to_uint8
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from material.random_weights import randomized
from pipelines.sampling import sample
from pipelines.sampling.fixed_batches import fixed_numerics, in_a_pass, passes_at_once, split_into_passes
from pipelines.sampling.models import Generator
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.sample import sample_batches

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2, "grid_size": 4, "codebook_size": 32}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator(vqgan):
    return Generator(randomized(ENAT(ENATConfig(**SIZES, num_classes=5))), vqgan, origin={}, sampler=SamplerConfig(num_steps=4))


@given(start=st.integers(0, 100), count=st.integers(1, 100), images_per_pass=st.integers(1, 40))
def test_sample_pass_and_row_are_its_index_s(start, count, images_per_pass):
    passes = split_into_passes(start, start + count, images_per_pass)
    assert [index for each in passes for index in each] == list(range(start, start + count))
    assert len({each.start // images_per_pass for each in passes}) == len(passes), "none in two parts"
    for index in passes:
        seen: list[np.ndarray] = []
        result = in_a_pass(lambda samples, seen=seen: seen.append(samples) or torch.from_numpy(samples), index, images_per_pass)
        assert result.tolist() == list(index)
        assert len(seen[0]) == images_per_pass and all(seen[0][i % images_per_pass] == i for i in index)
        assert set(seen[0]) == set(index), "nothing that nobody wants"


def test_passes_run_side_by_side_on_the_threads_of_a_cpu_alone():
    sizes = {"batch_size": 100, "images_per_pass": 32}
    assert [passes_at_once(device, **sizes, num_threads=8) for device in ("cpu", "cuda", "cuda:1")] == [3, 1, 1]
    assert passes_at_once("cpu", **sizes, num_threads=2) == 2
    assert passes_at_once("cpu", batch_size=1, images_per_pass=2, num_threads=2) == 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_model_and_the_decoder_always_see_as_many_rows(generator, monkeypatch, threads, guidance_scale):
    labels: set[tuple[int, ...]] = set()
    decoded: list[int] = []
    rows: list[int] = []
    generator.model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[1])))
    prepare = generator.model.prepare
    monkeypatch.setattr(generator.model, "prepare", lambda given: labels.add(tuple(given.tolist())) or prepare(given))
    decode = generator.vqgan.decode
    monkeypatch.setattr(generator.vqgan, "decode", lambda codes: decoded.append(len(codes)) or decode(codes))
    sampler, made = SamplerConfig(num_steps=4, guidance_scale=guidance_scale), {}
    for batch_size, num_threads in ((1, 1), (8, 3), (20, 3), (64, 3)):
        threads(num_threads)
        request = SampleRequest(num_images=19, sampler=sampler, batch_size=batch_size, images_per_pass=8, seed=2)
        batches = [batch for batch, _ in sample_batches(generator, request, None)]
        assert [index for batch in batches for index in batch.index] == list(range(19))
        made[batch_size] = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("states", "images")]
        assert torch.get_num_threads() == num_threads
    assert all(torch.equal(*pair) for others in made.values() for pair in zip(made[1], others, strict=True))
    assert torch.equal(made[1][1], to_uint8(decode(made[1][0][:, -1].view(19, 4, 4)))), "as of all at once, where nothing rounds"
    assert len(decoded) == 4 * 3 and set(decoded) == {8}
    num_rows = 8 if guidance_scale == 1 else 16  # two passes where guidance is on
    assert {len(each) for each in labels} == {num_rows}
    assert Counter(rows) == {num_rows: 4 * 9, 5: 4 * 2, 3: 4}, "at the first step, one of each label"
    filled = {(0, 1, 2, 3, 4, 0, 1, 2), (3, 4, 0, 1, 2, 3, 4, 0), (1, 2, 3, 1, 1, 1, 1, 1)}
    assert {each[:8] for each in labels} == filled


def test_samples_are_made_in_full_float32(generator, monkeypatch):
    backends = (torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")
    with fixed_numerics("cpu"):  # restores the settings that are changed here
        for backend, name in backends:
            setattr(backend, name, True)
        with fixed_numerics("cuda:0"):
            assert not any(getattr(backend, name) for backend, name in backends)
            assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert all(getattr(backend, name) for backend, name in backends) and not torch.backends.cudnn.deterministic
    is_fixed = False

    @contextmanager
    def noted(device: str) -> Iterator[None]:
        nonlocal is_fixed
        with fixed_numerics(device):
            is_fixed = True
            yield
        is_fixed = False

    decode = generator.vqgan.decode
    seen: list[bool] = []
    generator.model.register_forward_pre_hook(lambda *_: seen.append(is_fixed))
    monkeypatch.setattr(generator.vqgan, "decode", lambda codes: seen.append(is_fixed) or decode(codes))
    monkeypatch.setattr(sample, "fixed_numerics", noted)
    request = SampleRequest(num_images=2, sampler=generator.sampler, images_per_pass=1)
    for _ in sample_batches(generator, request, None):
        assert not is_fixed, "what others compute meanwhile is theirs"
    assert len(seen) == 2 * 5 and all(seen)


def test_an_entropy_bound_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="--cuda-graph records a sampler whose numbers of tokens are fixed, and entropy_bound"):
        SampleRequest(num_images=2, sampler=SamplerConfig(entropy_bound=1.0), is_graphed=True)
