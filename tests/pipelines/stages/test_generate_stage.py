"""Stage generate on Ray: every sample once, with codes that do not depend on workers, batches or killed processes."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from enat import checkpoint
from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.cost import generation_cost
from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from enat.text import TextFeatures
from enat.tokenizer import VQGAN
from enat.training.averages import Average, exponent_of
from material.random_weights import randomized
from material.summaries import summary_of
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection
from pipelines.data.captions import EMPTY, CaptionFeatures, CaptionFeaturesInfo, captions_name, write_captions, write_empty
from pipelines.data.dataset import INDEX, write_index
from pipelines.data.samples import Samples, SamplesSummary, read_samples, sample_seed, shard_name
from pipelines.data.sources.base import Entry
from pipelines.data.token_map import TokenMapInfo, TokenRows, write_shard
from pipelines.sampling.fixed_batches import PassSampler
from pipelines.sampling.models import Generator
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.sample import sample_batches
from pipelines.stages import generate
from pipelines.stages.generate import GenerateConfig, GenerateExecution
from pipelines.workflow import config as configuration
from pipelines.workflow.models import ModelSummary, average_name
from services.workers import kill_a_worker

pytestmark = pytest.mark.usefixtures("ray_cluster")

SAMPLER = SamplerConfig(num_steps=4, guidance_scale=2.0)
CONFIG = GenerateConfig(num_samples=20, shard_size=8, sampler=SAMPLER, seed=3)
SIZES = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2, "grid_size": 4, "codebook_size": 32}
CAPTIONS_PER_IMAGE = (2, 0, 1, 3, 2, 1)  # one image has none
NUM_CAPTIONS = sum(CAPTIONS_PER_IMAGE)
FIELDS: dict[str, Any] = {"stage_version": 1, "config": {}, "inputs": {}}


def random_model(**sizes: Any) -> ENAT:
    return randomized(ENAT(ENATConfig(**{**SIZES, **sizes})))


@pytest.fixture(scope="module")
def model() -> ENAT:
    return random_model(num_classes=3)


@pytest.fixture(scope="module")
def text_model() -> ENAT:
    return random_model(num_classes=0, text_width=8, num_text_tokens=3)


@dataclass
class Made:
    """A stage's inputs and result in a store of its own."""

    store: ArtifactStore
    inputs: dict[str, Manifest]
    manifest: Manifest
    metrics: dict[str, float]
    worker_seconds: float


def keep_model(store: ArtifactStore, folder: Path, model: ENAT) -> Manifest:
    save_weights(folder / "weights", model)
    record = store.put_file("train", "m", "model.safetensors", folder / "weights")
    summary = summary_of("train", model=model.config)
    return store.commit(Manifest(stage="train", key="m", files=(record,), summary=summary, **FIELDS))


def keep_captions(store: ArtifactStore, folder: Path) -> Manifest:
    """Features of the captions of six images, in files of four captions."""
    entries = [Entry(str(i), f"{i}.png", 0, 1, captions=(f"of {i}",) * count) for i, count in enumerate(CAPTIONS_PER_IMAGE)]
    write_index(folder / INDEX, entries)
    record = store.put_file("dataset", "d", INDEX, folder / INDEX)
    index = store.commit(Manifest(stage="dataset", key="d", files=(record,), **FIELDS))
    info = CaptionFeaturesInfo(num_captions=NUM_CAPTIONS, captions_per_file=4, num_positions=3, width=8, encoder_digest="e")
    generator = torch.Generator().manual_seed(1)

    def features(count: int) -> TextFeatures:
        hidden = torch.randn(count, 3, 8, generator=generator).half()
        return TextFeatures(hidden, hidden[:, 0], torch.full((count,), 3))

    records = []
    for number in range(info.num_files):
        name, start = captions_name(number), number * info.captions_per_file
        write_captions(folder / name, info, start, features(info.captions_from(start)))
        records.append(store.put_file("captions", "c", name, folder / name))
    write_empty(folder / EMPTY, info, features(1))
    records.append(store.put_file("captions", "c", EMPTY, folder / EMPTY))
    source = {"dataset": {"stage": "dataset", "key": "d", "digest": index.digest}}
    summary = summary_of("captions", info=info)
    return store.commit(Manifest(stage="captions", key="c", files=tuple(records), summary=summary, **{**FIELDS, "inputs": source}))


def keep_token_map(store: ArtifactStore, folder: Path, tokenizer_digest: str = "t") -> Manifest:
    """Thirty rows of random codes, labels 0 to 2, the last one without a label."""
    info = TokenMapInfo(
        dataset="random", resolution=16, grid_size=4, codebook_size=32, num_classes=3, tokenizer_digest=tokenizer_digest
    )
    codes = np.random.default_rng(0).integers(0, 32, (30, 16))
    labels = [*(row % 3 for row in range(29)), -1]
    rows = TokenRows(
        codes=codes, codes_flipped=codes, keys=[str(i) for i in range(30)], labels=labels, source_sha256=[b"0" * 32] * 30
    )
    write_shard(folder / "map", info, rows)
    record = store.put_file("token_map", "t", "part-00000.parquet", folder / "map")
    summary = summary_of("token_map", info=info, rows=30)
    return store.commit(Manifest(stage="token_map", key="t", files=(record,), summary=summary, **FIELDS))


Keep = Callable[[ArtifactStore, Path], Manifest]


def keep_inputs(store: ArtifactStore, folder: Path, model: ENAT, others: Sequence[Keep]) -> dict[str, Manifest]:
    made = [keep(store, folder) for keep in others]
    return {"model": keep_model(store, folder, model), **{manifest.stage: manifest for manifest in made}}


@pytest.fixture(scope="module")
def make(make_context: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Run the stage on Ray."""

    def run(config: GenerateConfig, model: ENAT, *others: Keep) -> Made:
        folder = tmp_path_factory.mktemp("generate")
        store = open_store(str(folder / "store"))
        return finish(config, store, keep_inputs(store, folder, model, others), make_context)

    return run


@pytest.fixture
def make_here(make_context: Callable[..., Any], tmp_path: Path) -> Callable[..., Samples]:
    """Run one worker in this process, without Ray's actors, and read the samples."""

    def run(config: GenerateConfig, model: ENAT, *others: Keep) -> Samples:
        store = open_store(tempfile.mkdtemp(dir=tmp_path))
        inputs = keep_inputs(store, tmp_path, model, others)
        context = make_context(store, "generate", "k").for_workers()
        plan = ray.put(generate._plan(config, model.config, inputs, store))
        worker = generate._Sample(generate._Task(config, inputs["model"], None, inputs.get("captions"), plan, 1, context))
        parts = -(-config.num_samples // config.shard_size)
        files = [FileRecord(**worker({"part": np.array([part])})["record"][0]["file"]) for part in range(parts)]
        summary = summary_of("generate", num_samples=config.num_samples, shard_size=config.shard_size)
        return read_samples(store, Manifest(stage="generate", key="k", files=tuple(files), summary=summary, **FIELDS))

    return run


def finish(config: GenerateConfig, store: ArtifactStore, inputs: dict[str, Manifest], make_context: Callable[..., Any]) -> Made:
    result = generate.run(config, inputs, make_context(store, "generate", "k"))
    fields = {**FIELDS, "files": tuple(result.files), "summary": result.summary.to_dict()}
    manifest = store.commit(Manifest(stage="generate", key="k", **fields))
    return Made(store, inputs, manifest, dict(result.metrics), result.worker_seconds)


@pytest.fixture(scope="module")
def samples(make: Callable[..., Made], model: ENAT) -> Made:
    return make(CONFIG, model)


def test_without_ray_the_driver_makes_the_same_files(
    make_context: Callable[..., Any], model: ENAT, samples: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "is_connected", lambda: False)
    monkeypatch.setattr(ray, "put", None)
    config = dataclasses.replace(CONFIG, execution=GenerateExecution(num_workers=2))
    store = open_store(str(tmp_path / "store"))
    made = finish(config, store, keep_inputs(store, tmp_path, model, ()), make_context)
    assert [file.sha256 for file in made.manifest.files] == [file.sha256 for file in samples.manifest.files]


@pytest.mark.slow
def test_fewer_of_the_same_samples_are_taken_over(make_context: Callable[..., Any], model: ENAT, tmp_path: Path) -> None:
    """Their full files are copied, and what is left is what a run from nothing makes. Their time does not count again."""
    store = open_store(str(tmp_path / "store"))
    inputs = keep_inputs(store, tmp_path, model, ())

    def make(key: str, config: GenerateConfig, made: dict[str, Manifest]) -> tuple[Manifest, Any]:
        result = generate.run(config, inputs, make_context(store, "generate", key, made=made))
        read = {name: {"stage": each.stage, "key": each.key, "digest": each.digest} for name, each in inputs.items()}
        fields = {"config": configuration.redacted(config), "inputs": read, "metrics": dict(result.metrics)}
        fields |= {"files": tuple(result.files), "summary": result.summary.to_dict(), "stage_version": generate.STAGE.version}
        return store.commit(Manifest(stage="generate", key=key, **fields)), result

    few, _ = make("few", dataclasses.replace(CONFIG, num_samples=18), {})
    many, of_many = make("many", CONFIG, {"few": few})
    alone, of_alone = make("alone", CONFIG, {})
    assert [file.sha256 for file in many.files] == [file.sha256 for file in alone.files]
    (work,) = of_many.work
    assert work.work.count == 4, "two files of eight samples were copied"
    assert of_alone.work[0].work.count == 20
    assert of_many.metrics["samples"] == 20 and of_many.metrics["sampling_worker_seconds_per_image"] > 0
    other, of_other = make("other", dataclasses.replace(CONFIG, seed=4), {"few": few, "many": many})
    assert of_other.work[0].work.count == 20, "samples of another seed are other samples"
    assert not {file.sha256 for file in other.files} & {file.sha256 for file in many.files}
    again, of_again = make("again", dataclasses.replace(CONFIG, num_samples=16), {"many": many})
    assert not of_again.work and [file.sha256 for file in again.files] == [file.sha256 for file in many.files][:2]
    bounded = dataclasses.replace(CONFIG, sampler=CONFIG.sampler.replaced(entropy_bound=2.0))
    few, _ = make("bounded", dataclasses.replace(bounded, num_samples=18), {})
    _, of_bounded = make("more", bounded, {"few": few})
    assert of_bounded.work[0].work.count == 20 and of_bounded.metrics["passes_per_image"] >= 1, (
        "passes are measured where they are made"
    )


@pytest.mark.slow
def test_weights_of_an_earlier_step(make_context: Callable[..., Any], model: ENAT, samples: Made, tmp_path: Path) -> None:
    """Samples are those of the other model, and a step that was not kept is refused with those that were."""
    earlier = random_model(num_classes=3).requires_grad_(False)
    for parameter in earlier.parameters():
        parameter.mul_(1.1)
    store = open_store(str(tmp_path / "store"))
    records = []
    for name, weights in (("model.safetensors", model), ("model-step-00000040.safetensors", earlier)):
        save_weights(tmp_path / name, weights)
        records.append(store.put_file("train", "m", name, tmp_path / name))
    summary = summary_of("train", model=model.config, num_steps=70)
    fields = {**FIELDS, "files": tuple(records[:1]), "records": tuple(records[1:]), "summary": summary}
    inputs = {"model": store.commit(Manifest(stage="train", key="m", **fields))}
    made = finish(dataclasses.replace(CONFIG, checkpoint=40), store, inputs, make_context)
    read, last = read_samples(store, made.manifest), read_samples(samples.store, samples.manifest)
    alone = sample(earlier, torch.tensor([1]), SAMPLER, seeds=[sample_seed(3, 7)])
    np.testing.assert_array_equal(alone[0].numpy(), read.codes[7])
    assert not np.array_equal(read.codes, last.codes) and made.manifest.summary["train_steps"] == 40
    result = generate.run(dataclasses.replace(CONFIG, guide_checkpoint=40), inputs, make_context(store, "generate", "guided"))
    fields = {**FIELDS, "files": tuple(result.files), "summary": result.summary.to_dict()}
    guided = read_samples(store, Manifest(stage="generate", key="guided", **fields))
    alone = sample(model, torch.tensor([1]), SAMPLER, seeds=[sample_seed(3, 7)], guide=earlier)
    np.testing.assert_array_equal(alone[0].numpy(), guided.codes[7])
    assert not np.array_equal(guided.codes, last.codes) and result.summary.guide_steps == 40
    with pytest.raises(ValueError, match=r"generate\.guide_checkpoint is 50, but train/m has the weights of steps 40, 70 only"):
        finish(dataclasses.replace(CONFIG, guide_checkpoint=50), store, inputs, make_context)
    with pytest.raises(ValueError, match=r"generate\.checkpoint is 50, but train/m has the weights of steps 40, 70 only"):
        finish(dataclasses.replace(CONFIG, checkpoint=50), store, inputs, make_context)


@pytest.mark.slow
def test_weights_are_put_together_to_an_average_of_the_wanted_length(
    make_context: Callable[..., Any], model: ENAT, tmp_path: Path
) -> None:
    """Averages of a model that grows linearly: that of each length is known in closed form."""
    store, records = open_store(str(tmp_path / "store")), []

    def scaled(average: Average) -> ENAT:
        """The weights of step s are 1 + s / 1,000 times those of the model."""
        exponent = exponent_of(average.length)
        grown = random_model(num_classes=3).requires_grad_(False)
        for parameter in grown.parameters():
            parameter.mul_(1 + average.step / 1000 * (exponent + 1) / (exponent + 2))
        return grown

    kept = [Average(step, length) for step in range(100, 1001, 100) for length in (0.05, 0.1)]
    for name, weights in {"model.safetensors": model, **{average_name(a.length, a.step): scaled(a) for a in kept}}.items():
        save_weights(tmp_path / name, weights)
        records.append(store.put_file("train", "m", name, tmp_path / name))
    summary = summary_of("train", model=model.config, num_steps=1000)
    fields = {**FIELDS, "files": tuple(records[:1]), "records": tuple(records[1:]), "summary": summary}
    inputs = {"model": store.commit(Manifest(stage="train", key="m", **fields))}
    result = generate.run(dataclasses.replace(CONFIG, ema_length=0.075), inputs, make_context(store, "generate", "k"))
    (record,) = result.records
    made = checkpoint.load_enat(store.fetch_file("generate", "k", record))
    for name, value in scaled(Average(1000, 0.075)).state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert 0 < result.metrics["ema_error"] < 0.02 and result.summary.ema_length == 0.075
    alone = sample(made, torch.tensor([1]), SAMPLER, seeds=[sample_seed(3, 7)])
    fields = {**FIELDS, "files": tuple(result.files), "summary": result.summary.to_dict()}
    read = read_samples(store, Manifest(stage="generate", key="k", **fields))
    np.testing.assert_array_equal(alone[0].numpy(), read.codes[7])
    with pytest.raises(ValueError, match=r"ema_length is 0\.28, which the averages of train/m cannot make at step 1000: .* off by"):
        generate.run(dataclasses.replace(CONFIG, ema_length=0.28), inputs, make_context(store, "generate", "other"))
    without = {"model": dataclasses.replace(inputs["model"], records=())}
    with pytest.raises(ValueError, match=r"train/m kept no averages to make it from"):
        generate.run(dataclasses.replace(CONFIG, ema_length=0.075), without, make_context(store, "generate", "other"))


# Classes -------------------------------------------------------------------------------------------------------------------


def test_num_samples_rows_have_classes_in_turn(samples: Made) -> None:
    assert [record.name for record in samples.manifest.files] == [f"part-{part:05d}.parquet" for part in range(3)]
    read = read_samples(samples.store, samples.manifest)
    assert read.index.tolist() == list(range(20)) and read.labels.tolist() == [index % 3 for index in range(20)]
    assert read.codes.shape == (20, 16) and read.codes.min() >= 0 and read.codes.max() < 32
    assert read.seeds.tolist() == [sample_seed(3, index) for index in range(20)]
    assert set(read.captions) == set(read.rows) == {-1}
    assert pq.read_schema(samples.store.fetch(samples.manifest, "part-00000.parquet")).names == ["index", "label", "seed", "codes"]


def test_codes_depend_only_on_seed_and_label(samples: Made, model: ENAT) -> None:
    read = read_samples(samples.store, samples.manifest)
    for index in (0, 7, 8, 19):
        alone = sample(model, torch.tensor([index % 3]), SAMPLER, seeds=[sample_seed(3, index)])
        np.testing.assert_array_equal(alone[0].numpy(), read.codes[index])
    assert len(np.unique(read.codes, axis=0)) == 20, "no two samples are the same"


@pytest.mark.slow
def test_codes_and_files_do_not_depend_on_workers_or_batch(make, model: ENAT, samples: Made) -> None:
    made = make(dataclasses.replace(CONFIG, execution=GenerateExecution(num_workers=2, worker_batch_size=3)), model)
    assert made.manifest.digest == samples.manifest.digest


def test_codes_do_not_depend_on_forward_batch_size(make_here, model: ENAT, samples: Made) -> None:
    read, whole = make_here(dataclasses.replace(CONFIG, forward_batch_size=1), model), read_samples(samples.store, samples.manifest)
    np.testing.assert_array_equal(read.codes, whole.codes)


def test_model_always_sees_equally_many_rows(make_here, model: ENAT, samples: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a file ends within a pass."""
    seen: set[int] = set()
    load = checkpoint.load_enat

    def watched(path: Path) -> ENAT:
        loaded = load(path)
        loaded.register_forward_pre_hook(lambda _, arguments: seen.add(len(arguments[0])))
        return loaded

    monkeypatch.setattr(checkpoint, "load_enat", watched)
    read = make_here(dataclasses.replace(CONFIG, forward_batch_size=6), model)
    assert seen == {2, 3, 12}, "one of each label at the first step, which is not guided, and then two passes"
    np.testing.assert_array_equal(read.codes, read_samples(samples.store, samples.manifest).codes)


def test_codes_equal_those_of_enat_sample(samples: Made, model: ENAT, vqgan: VQGAN) -> None:
    made = read_samples(samples.store, samples.manifest)
    generator = Generator(model, vqgan, origin={}, sampler=SAMPLER)
    for batch_size in (1, 7, 64):
        request = SampleRequest(num_images=20, sampler=SAMPLER, seed=3, batch_size=batch_size)
        codes = torch.cat([batch.codes for batch, _ in sample_batches(generator, request, None)])
        np.testing.assert_array_equal(codes.numpy(), made.codes)


def test_summary_and_metrics_record_what_was_measured(samples: Made) -> None:
    summary, metrics = samples.manifest.summary, samples.metrics
    assert summary["labels"] == "each class in turn" and summary["batch_size"] == 32 and summary["num_classes"] == 3
    assert summary["device"] and "," not in summary["device"], "one kind of CPU"
    assert SamplerConfig(**summary["sampler"]) == SAMPLER
    assert metrics["samples"] == 20 and metrics["sampling_device_seconds_per_image"] == 0
    per_image = metrics["sampling_worker_seconds_per_image"]
    assert metrics["sampling_images_per_second"] == pytest.approx(1 / per_image), "by one worker"
    assert samples.worker_seconds > 20 * per_image, "loading the model counts as well"
    assert 0.05 < metrics["peak_memory_gb"] < 20


@pytest.mark.slow
def test_passes_of_an_entropy_bound_are_measured(make, model: ENAT) -> None:
    """Means over all samples, of numbers that differ between them; and the codes do not depend on the batch."""
    sampler = SamplerConfig(num_steps=6, guidance_scale=2.0, entropy_bound=10.2)
    config = dataclasses.replace(CONFIG, sampler=sampler)
    made = make(config, model)
    found = read_samples(made.store, made.manifest)
    labels, seeds = torch.from_numpy(found.labels), found.seeds.tolist()
    codes, trajectory = sample(model, labels, sampler, seeds=seeds, return_trajectory=True)
    assert np.array_equal(found.codes, codes.numpy())
    counts = torch.stack([(tokens == model.config.mask_id).sum(dim=1) for tokens in trajectory], dim=1).numpy()
    costs = [generation_cost(model.config, sampler, num_masked=row) for row in counts.tolist()]
    assert len({cost.executed_total_macs for cost in costs}) > 1, "otherwise a mean would show nothing"
    measured = SamplesSummary.read(made.manifest).measured
    assert measured is not None
    assert measured.num_masked == pytest.approx(counts.mean(axis=0))
    assert measured.num_passes == made.metrics["passes_per_image"] == pytest.approx((counts > 0).sum(axis=1).mean())
    assert measured.cost.executed_total_macs == pytest.approx(np.mean([cost.executed_total_macs for cost in costs]), abs=20)
    most = generate.foresee(config, {"model": ModelSummary.read(made.inputs["model"])}).work[0]
    assert most.is_most and most.macs > measured.cost.executed_total_macs


def test_device_seconds_count_every_device_of_a_worker(samples: Made, make_context) -> None:
    """All parts are committed, so the test needs no GPU."""
    per_image = samples.metrics["sampling_worker_seconds_per_image"]
    for gpus in (0.5, 2):
        config = dataclasses.replace(CONFIG, execution=GenerateExecution(gpus_per_worker=gpus))
        result = generate.run(config, samples.inputs, make_context(samples.store, "generate", "k"))
        assert result.worker_seconds == samples.worker_seconds > 0
        assert result.device_seconds == pytest.approx(gpus * samples.worker_seconds)
        assert result.metrics["sampling_device_seconds_per_image"] == pytest.approx(gpus * per_image)


def test_a_range_of_samples_can_be_read(samples: Made) -> None:
    whole = read_samples(samples.store, samples.manifest)
    for start, stop in ((0, 20), (0, 8), (8, 16), (5, 11), (15, 20), (19, 20)):
        piece = read_samples(samples.store, samples.manifest, start, stop)
        assert piece.index.tolist() == list(range(start, stop))
        for name, values in vars(piece).items():
            np.testing.assert_array_equal(values, vars(whole)[name][start:stop])
    for start, stop in ((0, 21), (-1, 5), (20, 20), (7, 3)):
        with pytest.raises(ValueError, match=rf"generate/k has no samples {start} to {stop - 1}; .*0 to 19"):
            read_samples(samples.store, samples.manifest, start, stop)


@pytest.mark.slow
def test_replicates_are_sets_of_their_own_and_the_first_is_what_it_is_alone(make, model: ENAT, samples: Made) -> None:
    """20 samples fill two and a half files and passes, so the sets meet within both."""
    config = dataclasses.replace(CONFIG, replicates=3, forward_batch_size=8, execution=GenerateExecution(num_workers=2))
    made = make(config, model)
    assert [record.name for record in made.manifest.files] == [f"part-{part:05d}.parquet" for part in range(9)]
    assert made.manifest.files[:3] == samples.manifest.files
    assert made.metrics["samples"] == 60
    sets = [read_samples(made.store, made.manifest, replicate=number) for number in range(3)]
    for number, read in enumerate(sets):
        assert read.index.tolist() == list(range(20 * number, 20 * number + 20))
        np.testing.assert_array_equal(read.labels, sets[0].labels)
        for index in (0, 7, 19):
            alone = sample(model, torch.tensor([index % 3]), SAMPLER, seeds=[sample_seed(3, 20 * number + index)])
            np.testing.assert_array_equal(alone[0].numpy(), read.codes[index])
    assert len(np.unique(np.concatenate([read.codes for read in sets]), axis=0)) == 60
    piece = read_samples(made.store, made.manifest, 7, 17, replicate=2)
    np.testing.assert_array_equal(piece.codes, sets[2].codes[7:17])


@pytest.mark.slow
def test_replicates_of_captions_and_of_masked_rows_ask_for_the_same(make, model: ENAT, text_model: ENAT) -> None:
    for config, of_model, others in (
        (dataclasses.replace(CONFIG, num_samples=5, replicates=2), text_model, (keep_captions,)),
        (dataclasses.replace(CONFIG, num_samples=5, replicates=2, mask_ratio=0.5), model, (keep_token_map,)),
    ):
        made = make(config, of_model, *others)
        first, second = (read_samples(made.store, made.manifest, replicate=number) for number in range(2))
        np.testing.assert_array_equal(first.captions, second.captions)
        np.testing.assert_array_equal(first.rows, second.rows)
        assert not np.array_equal(first.codes, second.codes)


def test_given_labels_are_used_in_turn(make_here, model: ENAT, samples: Made) -> None:
    read = make_here(dataclasses.replace(CONFIG, labels=(2, 2, 0), num_samples=8), model)
    others = read_samples(samples.store, samples.manifest)
    assert read.labels.tolist() == [2, 2, 0, 2, 2, 0, 2, 2]
    for index, label in enumerate(read.labels):
        is_same = np.array_equal(read.codes[index], others.codes[index])
        assert is_same == (label == index % 3), "codes are equal if seed and label are"


def test_bf16_is_autocast_around_the_same_sampler(make_here, model: ENAT) -> None:
    read = make_here(dataclasses.replace(CONFIG, num_samples=60, precision="bf16"), model)
    exact = make_here(dataclasses.replace(CONFIG, num_samples=60), model)
    seeds = [sample_seed(3, index) for index in range(60)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(model, torch.arange(60) % 3, SAMPLER, seeds=seeds)
    np.testing.assert_array_equal(read.codes, expected.numpy())
    share = (read.codes == exact.codes).mean()
    assert 0.2 < share < 1, "rounding changes some codes"


def test_unconditional_model_has_label_0(make_here) -> None:
    model = random_model(num_classes=0)
    assert make_here(dataclasses.replace(CONFIG, num_samples=4), model).labels.tolist() == [0] * 4
    assert generate.label_scheme(CONFIG, model.config) == "none"


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_compiled_is_compiled_before_time_is_taken(
    make_here, model: ENAT, samples: Made, monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    """By one pass whose codes are not used."""
    monkeypatch.setattr(ENAT, "compile_blocks", lambda self: None)
    states, passes = PassSampler.states, list[int]()
    monkeypatch.setattr(PassSampler, "states", lambda self, each: passes.append(len(each)) or states(self, each))
    config = dataclasses.replace(CONFIG, num_samples=8, execution=GenerateExecution(compile=is_compiled))
    read = make_here(config, model)
    np.testing.assert_array_equal(read.codes, read_samples(samples.store, samples.manifest, 0, 8).codes)
    assert sum(passes) - 8 == (min(8, config.forward_batch_size, config.shard_size) if is_compiled else 0)


@pytest.mark.faults
def test_compiled_model_makes_the_same_codes(make_here, model: ENAT, samples: Made) -> None:
    read = make_here(dataclasses.replace(CONFIG, num_samples=8, execution=GenerateExecution(compile=True)), model)
    np.testing.assert_array_equal(read.codes, read_samples(samples.store, samples.manifest, 0, 8).codes)


# Captions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_codes_depend_only_on_seed_and_caption(make, text_model: ENAT) -> None:
    made = make(dataclasses.replace(CONFIG, num_samples=12, shard_size=5), text_model, keep_captions)
    read = read_samples(made.store, made.manifest)
    assert set(read.labels) == {-1} and made.manifest.summary["labels"] == "captions"
    assert sorted(read.captions[:NUM_CAPTIONS]) == list(range(NUM_CAPTIONS)), "each caption once before any comes twice"
    assert read.captions[NUM_CAPTIONS:].tolist() == read.captions[: 12 - NUM_CAPTIONS].tolist()
    features = CaptionFeatures.open(made.store, made.inputs["captions"])
    for index in (0, 5, 11):
        condition = TextCondition(*map(torch.from_numpy, features.take(read.captions[index : index + 1])))
        alone = sample(text_model, condition, SAMPLER, seeds=[sample_seed(3, index)])
        np.testing.assert_array_equal(alone[0].numpy(), read.codes[index])


def test_choice_of_captions(make_here, text_model: ENAT) -> None:
    in_order = make_here(dataclasses.replace(CONFIG, num_samples=12, caption_choice="in_order"), text_model, keep_captions)
    assert in_order.captions.tolist() == [*range(NUM_CAPTIONS), *range(12 - NUM_CAPTIONS)]
    few = make_here(dataclasses.replace(CONFIG, num_samples=5), text_model, keep_captions)
    images = np.repeat(np.arange(6), CAPTIONS_PER_IMAGE)[few.captions]
    assert sorted(images) == [0, 2, 3, 4, 5], "one caption of each image that has any"


# Samples that begin with codes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_masked_codes_of_the_token_map_change(make, model: ENAT) -> None:
    config = dataclasses.replace(CONFIG, mask_ratio=0.5, sampler=SamplerConfig(num_steps=1, guidance_scale=1.0))
    made = make(config, model, keep_token_map)
    read = read_samples(made.store, made.manifest)
    truth = np.random.default_rng(0).integers(0, 32, (30, 16))[read.rows]
    assert len(set(read.rows.tolist())) == 20, "each row once before any comes twice"
    row_labels = np.array([*(row % 3 for row in range(29)), 3])  # the null label of the row that has none
    assert read.labels.tolist() == row_labels[read.rows].tolist()
    kept = (read.codes == truth).sum(axis=1)
    assert kept.min() >= 8 and kept.mean() < 10, "half of the 16 codes do not change; few of the others equal the original"
    masks = {tuple(row) for row in read.codes == truth}
    assert len(masks) > 15, "every sample has its own positions"
    assert made.manifest.summary["labels"] == "token map rows" and made.manifest.summary["mask_ratio"] == 0.5


def test_a_small_mask_ratio_masks_at_least_one_code(make_here, model: ENAT) -> None:
    config = dataclasses.replace(CONFIG, mask_ratio=0.01, sampler=SamplerConfig(num_steps=1, guidance_scale=1.0))
    read = make_here(config, model, keep_token_map)
    truth = np.random.default_rng(0).integers(0, 32, (30, 16))[read.rows]
    assert ((read.codes != truth).sum(axis=1) <= 1).all() and (read.codes != truth).any()


# Configs and inputs that are refused ---------------------------------------------------------------------------------------


def test_wrong_values_are_refused() -> None:
    for wrong, sentence in (
        ({"num_samples": 1}, "num_samples is 1; it must be at least 2"),
        ({"shard_size": 0}, "shard_size is 0; it must be at least 1"),
        ({"mask_ratio": 0.0}, r"mask_ratio is 0\.0; it must be in \(0, 1\]"),
        ({"mask_ratio": 0.5, "labels": (1,)}, r"give no generate\.labels with it"),
        ({"precision": "fp8"}, r"precision is 'fp8'; choose one of fp32, bf16"),
        ({"caption_choice": "best"}, r"caption_choice is 'best'; choose one of drawn, in_order"),
        ({"forward_batch_size": 0}, "forward_batch_size is 0"),
        ({"sampler": SamplerConfig(guide_layers=1), "guide_checkpoint": 5}, "guide_layers are both given; .* leave one out"),
        (
            {"sampler": SamplerConfig(entropy_bound=1.0), "execution": GenerateExecution(gpus_per_worker=1, cuda_graph=True)},
            "cuda_graph records a sampler whose numbers of tokens are fixed, and sampler.entropy_bound chooses them",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            GenerateConfig(**wrong)


def test_requests_that_the_model_cannot_fulfil_are_refused_before_sampling(make, model: ENAT, text_model: ENAT) -> None:
    for given, requested, sentence in (
        ({"labels": (1, 3)}, model, r"generate\.labels has 3, but the classes of this model are 0 to 2"),
        ({}, text_model, r"needs their features; give captions\.encoder"),
        ({"labels": (1,)}, text_model, r"generate\.labels is for models of classes"),
        ({"mask_ratio": 0.5}, text_model, r"generate\.mask_ratio is for models of classes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make(dataclasses.replace(CONFIG, **given), requested)
    config = dataclasses.replace(CONFIG, mask_ratio=0.5)
    with pytest.raises(ValueError, match="has tokenizer other, but the model expects tokenizer t"):
        make(config, model, lambda store, folder: keep_token_map(store, folder, "other"))


# Kills ---------------------------------------------------------------------------------------------------------------------

LONG = dataclasses.replace(CONFIG, num_samples=90, shard_size=6, sampler=dataclasses.replace(SAMPLER, num_steps=16))


@pytest.fixture(scope="module")
def uninterrupted(make: Callable[..., Made], model: ENAT) -> Made:
    return make(LONG, model)


@pytest.fixture
def inputs(model: ENAT, tmp_path: Path) -> tuple[ArtifactStore, dict[str, Manifest]]:
    store = open_store(str(tmp_path / "store"))
    return store, {"model": keep_model(store, tmp_path, model)}


class _UnhurriedStore(ArtifactStore):
    """Leaves time for a kill between two parts."""

    def put_part(self, stage: str, key: str, name: str, record: Any) -> None:
        super().put_part(stage, key, name, record)
        time.sleep(0.1)


@pytest.mark.faults
def test_a_killed_worker_does_not_change_the_artifact(uninterrupted: Made, inputs, make_context: Callable[..., Any]) -> None:
    store, given = inputs
    killed: list[int] = []
    stop = threading.Event()

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while len(store.read_parts("generate", "k")) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        if kill_a_worker("MapWorker(MapBatches(_Sample)", stop.is_set):
            killed.append(len(store.read_parts("generate", "k")))

    killer = threading.Thread(target=kill_one)
    killer.start()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which workers cannot import
    try:
        made = finish(LONG, _UnhurriedStore(store.folder), given, make_context)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        stop.set()
        killer.join()
    assert killed and killed[0] < 15, "it was killed in time"
    assert made.manifest.digest == uninterrupted.manifest.digest


@pytest.mark.faults
def test_interrupted_stage_resumes_with_the_missing_parts(uninterrupted: Made, inputs, make_context: Callable[..., Any]) -> None:
    store, given = inputs
    stream, planned, place = generate.stream_records, list[int](), Path(store.place("generate", "k"))

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from islice(stream(*arguments, **options), 2)
        raise KeyboardInterrupt

    def counted(rows: Any, job: Any, **options: Any) -> Iterator[Any]:
        planned.extend(row["part"] for row in rows)
        return stream(rows, job, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "stream_records", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(LONG, store, given, make_context)
        parts = {name: (place / name).stat() for name in store.read_parts("generate", "k")}
        assert 2 <= len(parts) < 15
        patch.setattr(generate, "stream_records", counted)
        made = finish(LONG, store, given, make_context)
    assert made.manifest.digest == uninterrupted.manifest.digest
    assert planned and not {shard_name(part) for part in planned} & parts.keys()
    for name, before in parts.items():
        now = (place / name).stat()
        assert (now.st_mtime_ns, now.st_ino) == (before.st_mtime_ns, before.st_ino), "committed parts do not change"
    assert read_samples(made.store, made.manifest).index.tolist() == list(range(90))
