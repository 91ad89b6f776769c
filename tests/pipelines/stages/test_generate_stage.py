"""Stage generate on Ray: every sample once, and the same codes whoever makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from enat import ENAT, ENATConfig, SamplerConfig, sample
from enat.checkpoint import save_weights
from pipelines.artifacts import LocalStore, Manifest
from pipelines.samples import read_codes, sample_seed
from pipelines.stages import generate
from pipelines.workflow import Execution

pytestmark = pytest.mark.usefixtures("ray_cluster")

SAMPLER = SamplerConfig(num_steps=4, guidance_scale=2.0)
CONFIG = generate.GenerateConfig(num_samples=20, shard_size=8, sampler=SAMPLER, seed=3)


@pytest.fixture(scope="module")
def model() -> ENAT:
    """Every weight random: a model as it is initialised would give all classes the same logits."""
    made = ENAT(
        ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=3)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return made.eval()


@pytest.fixture(scope="module")
def make_samples(
    model: ENAT, make_context: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[generate.GenerateConfig], tuple[LocalStore, Manifest]]:
    def make(config: generate.GenerateConfig) -> tuple[LocalStore, Manifest]:
        folder = tmp_path_factory.mktemp("generate")
        store = LocalStore(folder / "store")
        save_weights(folder / "weights", model)
        record = store.put_file("train", "m", "model.safetensors", folder / "weights")
        summary = {"model": dataclasses.asdict(model.config)}
        fields: dict[str, Any] = {"stage_version": 1, "config": {}, "inputs": {}}
        inputs = {"model": store.commit(Manifest(stage="train", key="m", files=(record,), summary=summary, **fields))}
        result = generate.run(config, inputs, make_context(store, "generate", "k"))
        return store, store.commit(
            Manifest(stage="generate", key="k", files=tuple(result.files), summary=dict(result.summary), **fields)
        )

    return make


@pytest.fixture(scope="module")
def samples(make_samples) -> tuple[LocalStore, Manifest]:
    return make_samples(CONFIG)


def test_there_are_exactly_num_samples_rows_with_classes_in_turn(samples) -> None:
    store, manifest = samples
    assert [record.name for record in manifest.files] == [f"part-{part:05d}.parquet" for part in range(3)]
    read = read_codes(store, manifest)
    assert read.index.tolist() == list(range(20)) and read.labels.tolist() == [index % 3 for index in range(20)]
    assert read.codes.shape == (20, 16) and read.codes.min() >= 0 and read.codes.max() < 32


def test_the_codes_of_a_sample_are_the_sampler_s_for_its_seed_and_label_alone(samples, model: ENAT) -> None:
    read = read_codes(*samples)
    for index in (0, 7, 8, 19):
        alone = sample(model, torch.tensor([index % 3]), SAMPLER, seeds=[sample_seed(3, index)])
        np.testing.assert_array_equal(alone[0].numpy(), read.codes[index])
    assert len(np.unique(read.codes, axis=0)) == 20, "no two samples are the same"


@pytest.mark.parametrize("execution", [Execution(num_workers=2, batch_size=3), Execution(batch_size=1)])
def test_codes_and_files_do_not_depend_on_workers_or_batch(make_samples, samples, execution: Execution) -> None:
    assert make_samples(dataclasses.replace(CONFIG, execution=execution))[1].digest == samples[1].digest


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 8), (8, 16), (5, 11), (15, 20), (19, 20)])
def test_a_range_of_samples_is_a_piece_of_the_whole(samples, start: int, stop: int) -> None:
    whole, piece = read_codes(*samples), read_codes(*samples, start, stop)
    assert piece.index.tolist() == list(range(start, stop))
    np.testing.assert_array_equal(piece.codes, whole.codes[start:stop])
    np.testing.assert_array_equal(piece.labels, whole.labels[start:stop])


def test_seeds_of_neighbouring_samples_and_runs_share_nothing() -> None:
    seeds = [sample_seed(run, index) for run in range(20) for index in range(500)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.03  # six standard deviations


@pytest.mark.parametrize("wrong", [{"num_samples": 1}, {"shard_size": 0}])
def test_a_number_of_samples_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"generate\.num_samples must be at least 2 and shard_size at least 1"):
        generate.GenerateConfig(**wrong)
