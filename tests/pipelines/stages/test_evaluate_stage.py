"""Stage evaluate: scores equal those of torch-fidelity and scipy on the same features, and record how they were measured."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.cost import generation_cost
from enat.images import to_uint8
from enat.metrics import extractors
from enat.metrics.errors import frechet_influence, standard_error
from enat.metrics.inception import random_inception_weights
from enat.metrics.moments import FeatureMoments, frechet_distance, load_moments
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN
from material.layouts import open_dataset
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection
from pipelines.cluster.resources import TokenizerExecution
from pipelines.data.image_sets import ImageSetConfig
from pipelines.data.samples import MeasuredPasses, SamplePlan, Samples, SamplesSummary, image_cost, shard_name, write_samples
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import features
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.evaluation.extractors import ReferenceSummary
from pipelines.evaluation.features import drawn_evenly
from pipelines.evaluation.readers import sample_reader
from pipelines.evaluation.scores import METRICS, Scores, ScoreSettings
from pipelines.registry.influences import INFLUENCES, Influences
from pipelines.registry.model_card import registered_name
from pipelines.run import graph
from pipelines.stages import evaluate, image_set, reference
from pipelines.tracking.run import TrackingConfig, start_run
from pipelines.workflow import driver
from pipelines.workflow import stage as workflow_stage
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.stage import PublishContext, Sibling, Stage, StageResult
from pipelines.workflow.work import Prices
from services.mlflow_database import mlflow_database

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_SAMPLES, NUM_REAL, SHARD = 300, 280, 128
CPUS = {1: 2, 2: 1, 4: 0.5}  # a worker, of the two that there are: one worker computes passes side by side on two threads
SETTINGS = ScoreSettings(num_splits=3, kernel_subsets=5, kernel_subset_size=60)
SAMPLER = SamplerConfig(num_steps=4, guidance_scale=2.5)
MODEL = ENATConfig(encoder_layers=2, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=10)
SAMPLING = {
    "sampling_images_per_second": 7.0,
    "sampling_worker_seconds_per_image": 0.2,
    "sampling_device_seconds_per_image": 0.1,
    "peak_memory_gb": 0.5,
}
_PROJECTION = np.random.default_rng(0).integers(-3, 4, (3 * 16 * 16, 12)).astype(np.float32)


class SumsExtractor:
    """Sums of products of small integers, which float32 holds exactly: the result does not depend on the order of summation."""

    is_thread_safe = True
    outputs = {"features": 8, "spatial": 4, "logits": 6}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        pass

    def to(self, device: str) -> SumsExtractor:
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        sums = torch.from_numpy(images.flatten(1).numpy().astype(np.float32) @ _PROJECTION)
        return {"features": sums[:, :8] / 4096, "spatial": sums[:, 8:] / 4096, "logits": sums[:, :6] / 4096}


class HalvesExtractor(SumsExtractor):
    """Other features of the same widths."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: values / 2 + values[:, :1] for name, values in super().__call__(images).items()}


class UnroundedExtractor(SumsExtractor):
    takes_float = True


@pytest.fixture(scope="module", autouse=True)
def _sums_are_registered() -> Any:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "_FACTORIES", dict(extractors._FACTORIES))
        extractors.register_extractor("sums", SumsExtractor)
        extractors.register_extractor("unrounded", UnroundedExtractor)
        extractors.register_extractor("halves", HalvesExtractor)
        yield


def _commit(store: ArtifactStore, stage: str, key: str, result: StageResult, **fields: Any) -> Manifest:
    return store.commit(
        Manifest(
            stage=stage,
            key=key,
            stage_version=1,
            config=fields.get("config", {}),
            inputs={},
            files=tuple(result.files),
            records=tuple(result.records),
            summary={} if result.summary is None else result.summary.to_dict(),
            metrics={name: float(value) for name, value in result.metrics.items()},
            provenance={
                "created": "2026-01-01T00:00:00+00:00", "code": "test", "seconds": 1.0, "worker_seconds": 2.0, "device_seconds": 0.0
            },
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Material:
    """Inputs of the stage in a store, and the codes of the samples."""

    store: ArtifactStore
    inputs: dict[str, Manifest]
    codes: np.ndarray


@pytest.fixture(scope="module")
def material(vqgan, make_context: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Samples with drawn codes, and a reference of the first real digits."""
    folder = tmp_path_factory.mktemp("material")
    store = open_store(str(folder / "store"))
    save_weights(folder / "vqgan", vqgan)
    file = store.put_file("tokenizer", "t", "vqgan.safetensors", folder / "vqgan")
    tokenizer = _commit(
        store, "tokenizer", "t", StageResult(files=[file], summary=TokenizerSummary(config=vqgan.config, is_imported=False))
    )
    codes = np.random.default_rng(1).integers(0, 32, (NUM_SAMPLES, 16)) % (1 + np.arange(NUM_SAMPLES)[:, None] % 32)
    samples = _commit(store, "generate", "g", _samples(store, folder, codes))
    summary = ModelSummary(model=MODEL, parameters=1234, tokenizer_digest="t", dataset="digits", num_steps=70, is_imported=False)
    model = _commit(store, "train", "m", StageResult(files=[], summary=summary), config={"model": {"preset": None}, "masking": {}})
    dataset = open_dataset(DatasetConfig(kind="digits"), store)
    few = replace(dataset.manifest, summary={**dataset.manifest.summary, "num_images": NUM_REAL})
    result = _reference(few, make_context(store, "reference", "r"))
    real = _commit(store, "reference", "r", result)
    inputs = {"samples": samples, "tokenizer": tokenizer, "reference": real, "model": model, "dataset": dataset.manifest}
    return Material(store, inputs, codes)


def _samples(store: ArtifactStore, folder: Path, codes: np.ndarray) -> StageResult:
    files = []
    plan = SamplePlan.of_labels(np.arange(NUM_SAMPLES) % 10)
    for part, start in enumerate(range(0, NUM_SAMPLES, SHARD)):
        index = np.arange(start, min(start + SHARD, NUM_SAMPLES))
        conditions = {name: getattr(plan, name)[index] for name in ("labels", "captions", "rows")}
        write_samples(folder / shard_name(part), Samples(index=index, codes=codes[index], seeds=index, **conditions))
        files.append(store.put_file("generate", "g", shard_name(part), folder / shard_name(part)))
    known = summary_of("generate", num_samples=NUM_SAMPLES, shard_size=SHARD, batch_size=32, sampler=SAMPLER)
    return StageResult(
        files=files, summary=SamplesSummary(**{**known, "sampler": SAMPLER}), metrics={**SAMPLING, "samples": NUM_SAMPLES}
    )


def _reference(dataset: Manifest, context: Any, **given: Any) -> StageResult:
    config = reference.ReferenceConfig(
        extractor="sums", num_kept=200, forward_batch_size=16, resolution=16, dataset=DatasetConfig(kind="digits"), seed=0, **given
    )
    return reference.run(config, {"dataset": dataset}, context)


def _key(num_workers: int = 1, batch_size: int = 64, **given: Any) -> str:
    """The key under which `evaluated` runs the stage."""
    return hashlib.sha256(repr((num_workers, batch_size, given)).encode()).hexdigest()


@pytest.fixture(scope="module")
def evaluated(
    material: Material, make_context: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., StageResult]:
    """The result for a number of workers and a batch size, computed once."""

    @functools.cache
    def run(num_workers: int = 1, batch_size: int = 64, **given: Any) -> StageResult:
        execution = TokenizerExecution(num_workers=num_workers, worker_batch_size=batch_size, cpus_per_worker=CPUS[num_workers])
        config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"), execution=execution, **given)
        return evaluate.run(
            config, material.inputs, make_context(material.store, "evaluate", _key(num_workers, batch_size, **given))
        )

    return run


@pytest.fixture(scope="module")
def outputs(material: Material, vqgan) -> dict[str, dict[str, np.ndarray]]:
    """Outputs of the extractor for all samples and all real images, without the pipeline."""
    made = to_uint8(vqgan.decode(torch.from_numpy(material.codes).view(-1, 4, 4)))
    dataset = open_dataset(DatasetConfig(kind="digits"), material.store)
    real = torch.from_numpy(dataset.load_images(16, 0, NUM_REAL)[0])
    extractor = SumsExtractor(Path())
    return {
        name: {output: values.numpy() for output, values in extractor(images).items()}
        for name, images in (("made", made), ("real", real))
    }


@pytest.mark.faults
@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 1), (1, 8), (2, 8), (2, 64), (4, 1), (4, 64)])
def test_files_and_scores_do_not_depend_on_workers_and_batches(
    evaluated: Callable[..., StageResult], num_workers: int, batch_size: int
) -> None:
    found, expected = evaluated(num_workers, batch_size), evaluated()
    assert [(file.name, file.sha256) for file in found.files] == [(file.name, file.sha256) for file in expected.files]
    assert _not_timed(found) == _not_timed(expected)
    assert found.records[0].sha256 == expected.records[0].sha256


def test_without_ray_the_driver_computes_the_same(
    evaluated: Callable[..., StageResult], material: Material, make_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluated(judge="svc")
    monkeypatch.setattr(connection, "is_connected", lambda: False)
    monkeypatch.setattr(ray, "put", None)
    execution = TokenizerExecution(num_workers=2, cpus_per_worker=0.5)
    config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"), execution=execution, judge="svc")
    found = evaluate.run(config, material.inputs, make_context(material.store, "evaluate", _key(is_without_ray=True)))
    assert [(file.name, file.sha256) for file in found.files] == [(file.name, file.sha256) for file in expected.files]
    assert _not_timed(found) == _not_timed(expected)


def test_the_driver_decodes_samples_for_the_picture_only_after_a_restart(
    material: Material, make_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = TokenizerExecution(worker_batch_size=64)
    config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"), execution=execution)

    def picture() -> str:
        return (
            evaluate.run(config, material.inputs, make_context(material.store, "evaluate", _key(is_shown=True))).records[0].sha256
        )

    with monkeypatch.context() as without:
        without.setattr(evaluation_protocol, "read_images", None)
        by_workers = picture()
    assert picture() == by_workers, "the features are there now, so the driver decodes"


@pytest.mark.slow
def test_scores_equal_those_of_torch_fidelity_and_scipy(evaluated: Callable[..., StageResult], outputs, material: Material) -> None:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    metrics, made, real = evaluated().metrics, outputs["made"], outputs["real"]
    for name, output in (("frechet_distance", "features"), ("spatial_frechet_distance", "spatial")):
        x, y = (side[output].astype(np.float64) for side in (made, real))
        shift, root = x.mean(axis=0) - y.mean(axis=0), sqrtm(np.cov(x.T) @ np.cov(y.T))
        assert metrics[name] == pytest.approx(shift @ shift + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root.real), rel=1e-6)
    kept = torch.from_numpy(real["features"][drawn_evenly(NUM_REAL, 200, 0)])
    generated = torch.from_numpy(made["features"])
    scores = isc_features_to_metric(torch.from_numpy(made["logits"]), splits=3, shuffle=True, rng_seed=2020)
    scores |= kid_features_to_metric(
        generated.double(), kept.double(), kid_subsets=5, kid_subset_size=60, rng_seed=2020, verbose=False,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
    )  # fmt: skip
    scores |= prc_features_to_metric(
        generated.double(), kept.double(), prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    for ours, theirs in (
        ("inception_score", "inception_score_mean"),
        ("inception_score_std", "inception_score_std"),
        ("kernel_distance", "kernel_inception_distance_mean"),
        ("kernel_distance_std", "kernel_inception_distance_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert metrics[ours] == pytest.approx(scores[theirs], rel=1e-6), ours
    distances = torch.cdist(kept.double(), kept.double()).kthvalue(6, dim=1).values
    holds = torch.cdist(generated.double(), kept.double()) < distances
    assert metrics["density"] == pytest.approx(holds.double().sum(dim=1).mean().item() / 5)
    assert metrics["coverage"] == pytest.approx(holds.any(dim=0).double().mean().item())
    radii = torch.cdist(kept.double(), kept.double()).kthvalue(2, dim=1).values
    nearest = torch.cdist(generated.double(), kept.double()).min(dim=1)
    assert metrics["authenticity"] == pytest.approx((nearest.values > radii[nearest.indices]).double().mean().item())
    assert 0 < metrics["authenticity"] < 1
    assert 0 < metrics["coverage"] < 1 and metrics["inception_score"] > 1, "both are in a range where equality is meaningful"


def _not_timed(result: StageResult) -> dict[str, float]:
    """Scores and counts: what does not depend on how fast a worker was."""
    return {name: value for name, value in result.metrics.items() if "second" not in name}


def test_costs_are_counted_from_the_architecture(evaluated: Callable[..., StageResult], material: Material, vqgan) -> None:
    metrics = evaluated().metrics
    cost = generation_cost(MODEL, SAMPLER, vqgan.config)
    assert metrics["gmacs_total"] == pytest.approx(cost.total_macs / 1e9)
    assert metrics["gflops_total"] == pytest.approx(2 * metrics["gmacs_total"])
    assert metrics["gmacs_transformer"] + metrics["gmacs_decoder"] == pytest.approx(metrics["gmacs_total"])
    assert metrics["gmacs_one_pass"] + metrics["gmacs_guidance"] == pytest.approx(metrics["gmacs_transformer"])
    assert metrics["gmacs_one_pass"] == metrics["gmacs_guidance"] == pytest.approx(cost.one_pass_macs / 1e9)
    assert metrics["gflops_executed"] == pytest.approx(2 * metrics["gmacs_executed"]) and "samples" not in metrics
    assert metrics["gmacs_executed"] == pytest.approx(cost.executed_total_macs / 1e9)
    samples = material.inputs["samples"]
    begun = replace(samples, summary={**samples.summary, "mask_ratio": 0.2})  # which masks 3 of 16 codes
    shorter = image_cost(begun, material.inputs["model"], material.inputs["tokenizer"])
    assert shorter.total_macs == generation_cost(MODEL, SAMPLER, vqgan.config, num_given=13).total_macs != cost.total_macs
    bounded = replace(SAMPLER, entropy_bound=2.0)
    num_masked = np.array([[16, 10, *[0] * (SAMPLER.num_steps - 2)]])
    summary = replace(SamplesSummary.read(samples), sampler=bounded, measured=MeasuredPasses.of(num_masked, MODEL, bounded, 0))
    measured = image_cost(replace(samples, summary=summary.to_dict()), material.inputs["model"], material.inputs["tokenizer"])
    assert measured == generation_cost(MODEL, bounded, vqgan.config, num_masked=num_masked[0].tolist())


def test_time_of_an_image_is_the_sum_of_sampling_and_decoding(evaluated: Callable[..., StageResult]) -> None:
    found = evaluated()
    metrics = found.metrics
    assert {name: metrics[name] for name in SAMPLING} == SAMPLING, "as stage generate measured it"
    decoding = metrics["decoding_worker_seconds_per_image"]
    assert 0 < NUM_SAMPLES * decoding < found.worker_seconds, "a part of what the workers did"
    assert metrics["worker_seconds_per_image"] == pytest.approx(0.2 + decoding)
    assert metrics["decoding_device_seconds_per_image"] == 0 and metrics["device_seconds_per_image"] == 0.1
    assert metrics["decoding_images_per_second"] == pytest.approx(1 / decoding), "by one worker"
    assert metrics["images_per_second"] == pytest.approx(1 / (1 / 7.0 + decoding)), "one after the other"


@pytest.mark.parametrize("gpus", [0.5, 2])
def test_device_seconds_include_decoding_features_and_neighbours(
    evaluated: Callable[..., StageResult], material: Material, make_context, monkeypatch: pytest.MonkeyPatch, gpus: float
) -> None:
    """All parts are committed, so the test needs no GPU. Neighbours take 10 s, other scores 7 s, the judge 100 s; the last two take
    CPUs alone."""
    evaluated()

    def scores(*given: Any) -> Scores:
        given[-1].seconds, given[-1].cpu_seconds = 10.0, 7.0
        return Scores(by_name={"frechet_distance": 1.0}, labels=np.arange(NUM_SAMPLES) % 10)

    monkeypatch.setattr(evaluate, "compute_scores", scores)
    monkeypatch.setattr(evaluate, "_judge_samples", lambda *_: 100.0)
    monkeypatch.setattr(connection, "require", lambda *_: None)
    config = evaluate.EvaluateConfig(settings=SETTINGS, judge="svc", execution=TokenizerExecution(gpus_per_worker=gpus))
    found = evaluate.run(config, material.inputs, make_context(material.store, "evaluate", _key()))
    decoding = found.metrics["decoding_worker_seconds_per_image"]
    assert found.metrics["decoding_device_seconds_per_image"] == pytest.approx(gpus * decoding)
    assert found.metrics["device_seconds_per_image"] == pytest.approx(0.1 + gpus * decoding)
    assert found.worker_seconds > 10 + 7 + 100
    assert gpus * (10 + NUM_SAMPLES * decoding) < found.device_seconds < gpus * (found.worker_seconds - 7 - 100)


@pytest.mark.faults
def test_judge_measures_how_often_it_sees_the_requested_class(evaluated: Callable[..., StageResult]) -> None:
    metrics = evaluated(judge="svc", metrics=()).metrics
    assert metrics["judge_accuracy"] > 0.9
    assert 0 < metrics["class_agreement"] < 0.3  # of drawn codes
    assert "kernel_distance" not in metrics and "spatial_frechet_distance" not in metrics
    assert metrics["frechet_distance"] == evaluated().metrics["frechet_distance"]


def test_every_score_has_its_error_and_the_influences_of_the_samples(
    evaluated: Callable[..., StageResult], outputs, material: Material
) -> None:
    """But the spatial distance, whose features are not stored."""
    result = evaluated()
    metrics, made = result.metrics, outputs["made"]["features"]
    (file,) = (file for file in result.files if file.name == INFLUENCES)
    found = Influences.parse(material.store.fetch_file("evaluate", _key(), file).read_bytes())
    np.testing.assert_array_equal(found.labels, np.arange(NUM_SAMPLES) % 10)
    neighbours = {"precision", "recall", "density", "coverage", "authenticity"}
    scores = {"frechet_distance", "inception_score", "kernel_distance", *neighbours}
    assert (
        {*found.by_score}
        == scores
        == {name.removesuffix("_se") for name in metrics if name.endswith("_se")} - {"frechet_distance_infinity"}
    )
    moments = FeatureMoments(made.shape[1]).add(made)
    influence = frechet_influence(made, moments, load_moments(_moments_of(material)))
    np.testing.assert_allclose(found.by_score["frechet_distance"], influence, rtol=1e-4, atol=1e-4 * np.abs(influence).max())
    assert metrics["frechet_distance_se"] == pytest.approx(standard_error(influence, found.labels), rel=1e-4)
    spread = metrics["kernel_distance_std"] / 5**0.5
    exact = standard_error(found.by_score["kernel_distance"], found.labels)
    assert metrics["kernel_distance_se"] == pytest.approx((exact**2 + spread**2) ** 0.5, rel=1e-4)
    gap = metrics["frechet_distance"] - metrics["frechet_distance_infinity"]
    assert abs(gap) < 3 * metrics["frechet_distance_infinity_se"], "50 samples for each feature: the distance is hardly biased"


@pytest.mark.slow
def test_scores_of_replicates_are_means_with_their_deviation(
    material: Material, evaluated: Callable[..., StageResult], make_context, tmp_path: Path
) -> None:
    """A fifth of the samples of the second set are equal."""
    store, codes = material.store, material.codes.copy()
    codes[:60] = 5
    files = [*material.inputs["samples"].files, *_samples(store, tmp_path, codes).files]
    copies = [
        store.put_file("generate", "g2", shard_name(number), store.fetch_file("generate", "g", file))
        for number, file in enumerate(files)
    ]
    summary = SamplesSummary(**{**vars(SamplesSummary.read(material.inputs["samples"])), "replicates": 2})
    times = {**SAMPLING, "samples": 2 * NUM_SAMPLES}
    both = _commit(store, "generate", "g2", StageResult(files=copies, summary=summary, metrics=times))
    config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"), judge="svc")
    result = evaluate.run(config, {**material.inputs, "samples": both}, make_context(material.store, "evaluate", "two"))
    metrics, alone = result.metrics, evaluated().metrics
    assert metrics["replicates"] == 2 and result.summary.num_samples == NUM_SAMPLES
    names = [name for name in alone if f"{name}_se" in alone]
    assert {"frechet_distance", "inception_score", "precision", "coverage", "frechet_distance_infinity"} <= {*names}
    for name in names:
        each = [metrics[f"{name}_replicate_{number}"] for number in (1, 2)]
        assert each[0] == alone[name], name
        assert metrics[name] == pytest.approx(np.mean(each))
        assert metrics[f"{name}_replicates_sd"] == pytest.approx(np.std(each, ddof=1))
    assert metrics["frechet_distance_replicate_2"] > metrics["frechet_distance_replicate_1"]
    assert 0 <= metrics["class_agreement"] <= 1 and metrics["class_agreement_replicates_sd"] >= 0
    moments = [file.name for file in result.files if "moments" in file.name]
    assert moments == [f"{prefix}{name}.safetensors" for prefix in ("", "replicate-2-") for name in ("moments", "spatial_moments")]
    (file,) = (file for file in result.files if file.name == INFLUENCES)
    found = Influences.parse(material.store.fetch_file("evaluate", "two", file).read_bytes())
    assert all(len(values) == NUM_SAMPLES for values in found.by_score.values())


@pytest.mark.slow
def test_another_protocol_takes_the_features_of_the_same_samples(
    material: Material, evaluated: Callable[..., StageResult], make_context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against other real images: the same scores as if the features were computed again, without doing so."""
    store = material.store
    names = ("samples", "tokenizer", "reference", "model", "dataset")
    made_from = {name: {"stage": m.stage, "key": m.key, "digest": m.digest} for name, m in material.inputs.items() if name in names}
    first = replace(_commit(store, "evaluate", _key(), evaluated()), inputs=made_from, stage_version=evaluate.STAGE.version)
    few = replace(material.inputs["dataset"], summary={**material.inputs["dataset"].summary, "num_images": 200})
    other = _commit(store, "reference", "r200", _reference(few, make_context(store, "reference", "r200")))
    inputs = {**material.inputs, "reference": other}
    config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"))
    again = evaluate.run(config, inputs, make_context(store, "evaluate", "again"))
    monkeypatch.setattr(evaluate, "compute_features", None)
    shared = evaluate.run(config, inputs, make_context(store, "evaluate", "shared", made={"evaluate": first}))
    assert _not_timed(shared) == _not_timed(again) != _not_timed(evaluated())
    assert [(file.name, file.sha256) for file in shared.files] == [(file.name, file.sha256) for file in again.files]
    decoding = "decoding_worker_seconds_per_image"
    assert shared.metrics[decoding] == pytest.approx(first.metrics[decoding])
    for change in ({"num_samples": 200}, {"rounding": "float"}):  # other features
        with pytest.raises(TypeError, match="NoneType"):
            evaluate.run(replace(config, **change), inputs, make_context(store, "evaluate", "x", made={"evaluate": first}))


@pytest.mark.slow
def test_protocols_with_other_extractors_share_one_pass_over_the_images(
    material: Material, evaluated: Callable[..., StageResult], make_context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation leaves the features of a later one, which only scores them; of other images it leaves none."""
    store, real = material.store, material.inputs["reference"]
    copied = [store.put_file("reference", "halves", file.name, store.fetch(real, file.name)) for file in real.files]
    summary = replace(ReferenceSummary.read(real), extractor="halves", extractor_digest="halves")
    other = _commit(store, "reference", "halves", StageResult(files=copied, summary=summary))
    config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"))
    inputs = {**material.inputs, "reference": other}
    alone = evaluate.run(config, inputs, make_context(store, "evaluate", "alone"))
    siblings = [
        Sibling(config=config, inputs=inputs, key="beside"),
        Sibling(config=config, inputs=inputs, key="same extractor again"),
        Sibling(config=replace(config, num_samples=200), inputs=inputs, key="fewer"),
        Sibling(config=config, inputs=material.inputs, key="own extractor"),
    ]
    first = evaluate.run(config, material.inputs, make_context(store, "evaluate", "earlier", siblings=siblings))
    assert _not_timed(first) == _not_timed(evaluated())
    assert {sibling.key for sibling in siblings if store.read_parts("evaluate", sibling.key)} == {"beside"}
    monkeypatch.setattr(features, "_job", None)  # nothing is left to compute
    later = evaluate.run(config, inputs, make_context(store, "evaluate", "beside"))
    assert _not_timed(later) == _not_timed(alone) != _not_timed(first)
    assert [(file.name, file.sha256) for file in later.files] == [(file.name, file.sha256) for file in alone.files]
    assert later.metrics["decoding_worker_seconds_per_image"] > 0


@pytest.mark.slow
def test_the_first_samples_are_scored_as_if_there_were_no_others(
    material: Material, outputs, make_context: Callable[..., Any]
) -> None:
    config = evaluate.EvaluateConfig(settings=SETTINGS, dataset=DatasetConfig(kind="digits"), num_samples=200)
    result = evaluate.run(config, material.inputs, make_context(material.store, "evaluate", "first"))
    moments = FeatureMoments(8).add(outputs["made"]["features"][:200])
    assert result.metrics["frechet_distance"] == pytest.approx(frechet_distance(moments, load_moments(_moments_of(material))))
    assert result.summary.num_samples == result.summary.protocol["num_samples"] == 200
    with pytest.raises(ValueError, match=r"evaluate\.num_samples is 301, but there are 300 samples"):
        evaluate.run(replace(config, num_samples=301), material.inputs, make_context(material.store, "evaluate", "more"))


def _moments_of(material: Material) -> Path:
    real = material.inputs["reference"]
    return material.store.fetch(real, "moments.safetensors")


def test_protocol_records_how_scores_were_measured(evaluated: Callable[..., StageResult], material: Material) -> None:
    summary, real = evaluated().summary.to_dict(), material.inputs["reference"]
    assert summary["protocol"] == {
        "extractor": "sums",
        "extractor_digest": real.file("extractor.safetensors").sha256,
        "reference": "digits, 16 px, adm-center",
        "reference_digest": real.digest,
        "num_samples": NUM_SAMPLES,
        "num_reference": NUM_REAL,
        "num_kept": 200,
        "rounding": "uint8",
        "labels": "10 classes, 30 each",
        "metric_version": "1, num_splits 3, kernel_subsets 5, kernel_subset_size 60",
    }
    text = json.dumps(summary["protocol"], sort_keys=True, separators=(",", ":"))
    assert summary["protocol_digest"] == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert summary["num_reference"] == NUM_REAL and summary["metrics"] == [metric for metric in METRICS if metric != "cmmd"]


@pytest.mark.slow
def test_rounding_float_scores_the_decoded_pixels(
    evaluated: Callable[..., StageResult], material: Material, vqgan, make_context
) -> None:
    real = material.inputs["reference"]
    inputs = {**material.inputs, "reference": replace(real, summary={**real.summary, "extractor": "unrounded"})}
    config = evaluate.EvaluateConfig(
        settings=SETTINGS, metrics=(), rounding="float", execution=TokenizerExecution(worker_batch_size=64)
    )
    context = make_context(material.store, "evaluate", "f" * 64)
    result = evaluate.run(config, inputs, context)
    pixels = vqgan.decode(torch.from_numpy(material.codes).view(-1, 4, 4)).clamp(0, 1) * 255
    expected = UnroundedExtractor(Path())(pixels)["features"].double().mean(dim=0).numpy()
    (file,) = (file for file in result.files if file.name == "moments.safetensors")
    mean = load_moments(material.store.fetch_file("evaluate", "f" * 64, file)).mean
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    assert result.metrics["frechet_distance"] == pytest.approx(evaluated().metrics["frechet_distance"], rel=0.05)
    assert result.metrics["frechet_distance"] != evaluated().metrics["frechet_distance"]
    assert result.summary.rounding == result.summary.protocol["rounding"] == "float"
    assert result.summary.protocol_digest != evaluated().summary.protocol_digest


@pytest.mark.slow
def test_another_precision_of_the_decoder_is_stated_with_what_it_changes(
    evaluated: Callable[..., StageResult], material: Material
) -> None:
    exact, rounded = evaluated(), evaluated(precision="bf16")
    assert 0 < rounded.metrics["pixel_change"] < 10 and "pixel_change" not in exact.metrics
    assert rounded.metrics["frechet_distance"] != exact.metrics["frechet_distance"]
    assert rounded.summary is not None and exact.summary is not None
    assert rounded.summary.to_dict()["protocol"] == exact.summary.to_dict()["protocol"] | {"decoder": "bf16"}
    keys = [evaluate.EvaluateConfig(precision=each).identity() for each in ("fp32", "bf16")]
    assert "precision" not in keys[0] and keys[1] == keys[0] | {"precision": "bf16"}
    with pytest.raises(ValueError, match="precision is 'fp64'; choose one of fp32, tf32, bf16"):
        evaluate.EvaluateConfig(precision="fp64")


@pytest.mark.slow
def test_everything_is_decoded_in_the_stated_precision(
    material: Material, make_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features, the judge's images and the picture: the protocol states one."""
    used: list[str] = []

    def reader(*places: Any, precision: str = "fp32", **given: Any) -> Any:
        used.append(precision)
        return sample_reader(*places, precision=precision, **given)

    monkeypatch.setattr(evaluate, "sample_reader", reader)
    config = evaluate.EvaluateConfig(metrics=(), judge="svc", precision="bf16", dataset=DatasetConfig(kind="digits"))
    evaluate.run(config, material.inputs, make_context(material.store, "evaluate", "8" * 64))
    assert used == ["bf16"] * 2, "for the features, with the picture, and for the judge"


def test_a_compiled_decoder_is_compared_with_one_that_is_not(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(VQGAN, "compile_networks", lambda vqgan: calls.append("compiled"))
    places = (material.store, material.inputs["samples"], material.inputs["tokenizer"], None)
    reader = sample_reader(*places, is_compiled=True)
    reader.decoder("cpu")
    assert calls == ["compiled"] and reader != reader.exact() == sample_reader(*places)
    reader.exact().decoder("cpu")
    assert calls == ["compiled"]
    config = evaluate.EvaluateConfig()
    object.__setattr__(config.execution, "compile", True)
    assert evaluate._decoding(config) == {"precision": "fp32", "is_compiled": True}
    assert config.identity() == evaluate.EvaluateConfig().identity()


@pytest.mark.slow
def test_another_precision_of_the_extractor_belongs_to_the_reference(material: Material, make_context: Callable[..., Any]) -> None:
    few = replace(material.inputs["dataset"], summary={**material.inputs["dataset"].summary, "num_images": 60})
    config = reference.ReferenceConfig(
        extractor="classifier", num_epochs=1, resolution=16, seed=0, precision="bf16", dataset=DatasetConfig(kind="digits")
    )
    result = reference.run(config, {"dataset": few}, make_context(material.store, "reference", "7" * 64))
    assert 0 < result.metrics["feature_change"] < 0.2
    assert result.summary is not None and result.summary.to_dict()["precision"] == "bf16"
    exact = replace(config, precision="fp32")
    assert config.identity() == exact.identity() | {"precision": "bf16"} and "precision" not in exact.identity()


@pytest.mark.slow
def test_rounding_float_needs_codes_and_an_extractor_that_takes_floats(material: Material, make_context) -> None:
    config = evaluate.EvaluateConfig(settings=SETTINGS, metrics=(), rounding="float")
    with pytest.raises((ValueError, ray.exceptions.RayTaskError), match=r"SumsExtractor .*evaluate\.rounding"):
        evaluate.run(config, material.inputs, make_context(material.store, "evaluate", "e" * 64))
    elsewhere = replace(material.inputs["samples"], stage="images")
    with pytest.raises(ValueError, match=r"8 bits.*evaluate\.rounding"):
        sample_reader(material.store, elsewhere, None, ImageSetConfig(path="images", name="other"), rounding="float")


def test_picture_has_a_column_for_every_class(evaluated: Callable[..., StageResult], material: Material, vqgan) -> None:
    picture = Image.open(material.store.fetch_file("evaluate", _key(), evaluated().records[0]))
    made = to_uint8(vqgan.decode(torch.from_numpy(material.codes[10:11]).view(-1, 4, 4)))[0]
    tile, gap, scale = 16 * 4, 2, 4
    assert picture.width == 10 * (tile + gap) + gap
    below_the_first = np.asarray(picture)[gap + tile + gap :: scale, gap::scale][:16, :16]
    np.testing.assert_array_equal(below_the_first, made.permute(1, 2, 0).numpy())


def test_tags_and_picture_are_published(evaluated: Callable[..., StageResult], material: Material, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    manifest = _commit(material.store, "evaluate", _key(), evaluated())
    uri = mlflow_database(tmp_path)
    for node, variant, prices in (
        ("evaluate", "main", Prices(device_hour=2.0, currency="EUR")),
        ("evaluate@untrained", "untrained", None),
    ):
        run = start_run(uri, TrackingConfig(), node, {})
        context = PublishContext(
            store=material.store, run=run, tracking=TrackingConfig(), node=node, prices=prices, stages=graph.stages()
        )
        client = MlflowClient(tracking_uri=uri)
        before = client.get_run(run.run_id).data.tags
        evaluate.STAGE.publish(manifest, material.inputs, context)
        tags = {name: value for name, value in client.get_run(run.run_id).data.tags.items() if name not in before}
        protocol = manifest.summary["protocol"]
        assert tags == {
            "enat.model": registered_name(material.inputs["model"]),
            "enat.variant": variant,
            "enat.dataset": "digits",
            "enat.reference": "digits",
            "enat.resolution": "16",
            "enat.parameters": "1234",
            "enat.train_steps": "70",
            "enat.num_steps": "4",
            "enat.guidance_scale": "2.5",
            "enat.device": "a CPU",
            "enat.images_per_pass": "32",
            "enat.precision": "fp32",
            **({"enat.currency": "EUR"} if prices else {}),
            "enat.num_samples": str(NUM_SAMPLES),
            "enat.protocol": json.dumps(protocol, sort_keys=True, separators=(",", ":")),
            "enat.protocol_digest": manifest.summary["protocol_digest"],
            "enat.samples": "generate/g",
        }
        logged = client.download_artifacts(run.run_id, "samples.png", str(tmp_path))
        assert Image.open(logged).format == "PNG"


# Samples of other generators -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_of_another_generator_get_the_scores_of_equal_codes(
    evaluated: Callable[..., StageResult], material: Material, make_context, vqgan, tmp_path: Path
) -> None:
    images = to_uint8(vqgan.decode(torch.from_numpy(material.codes).view(-1, 4, 4)))
    shuffled = np.random.default_rng(0).permutation(NUM_SAMPLES) % 10  # in any order, equally many of each
    np.savez(tmp_path / "others.npz", images.permute(0, 2, 3, 1).numpy(), shuffled)
    config = ImageSetConfig(path=str(tmp_path / "others.npz"), name="other-model")
    indexed = image_set.run(config, {}, make_context(material.store, "images", "i"))
    samples = _commit(material.store, "images", "i", indexed)
    inputs = {"samples": samples, "reference": material.inputs["reference"]}
    given = evaluate.EvaluateConfig(settings=SETTINGS, images=config)
    result = evaluate.run(given, inputs, make_context(material.store, "evaluate", "o" * 64))
    ours = evaluated()
    assert result.metrics == _not_timed(result) and {*result.metrics} <= {*ours.metrics}
    errors = {name for name in result.metrics if name.endswith("_se") or "_infinity" in name}
    scores = result.metrics.keys() - errors
    assert {name: result.metrics[name] for name in scores} == {name: ours.metrics[name] for name in scores}
    for name in errors:  # it is not known for which labels they were drawn
        assert result.metrics[name] == pytest.approx(ours.metrics[name], rel=0.1), name
    assert {"frechet_distance", "recall", "inception_score"} <= set(result.metrics) and "gmacs_total" not in result.metrics
    assert result.summary.protocol == ours.summary.protocol and result.summary.num_samples == NUM_SAMPLES
    assert result.summary.protocol_digest == ours.summary.protocol_digest, "both are in one table of a comparison"
    manifest = _commit(material.store, "evaluate", "o" * 64, result)
    tags = evaluation_protocol.tags_of(manifest, inputs, "evaluate", {})
    assert tags["enat.model"] == "other-model" and tags["enat.dataset"] == "digits" and tags["enat.samples"] == "images/i"
    assert tags["enat.resolution"] == "16" and not {"enat.parameters", "enat.num_steps", "enat.train_steps"} & set(tags)
    with pytest.raises(ValueError, match="judge needs samples of classes"):
        evaluate.run(replace(given, judge="svc"), inputs, make_context(material.store, "evaluate", "o" * 64))


# Configs and inputs that are refused ---------------------------------------------------------------------------------------


def test_wrong_configs_and_inputs_that_do_not_fit_are_refused(material: Material, make_context) -> None:
    for wrong, reason in (
        ({"judge": "forest"}, "judge is 'forest'; choose one of svc"),
        ({"metrics": ("fid",)}, "names 'fid'; choose from frechet_distance"),
        ({"rounding": "int8"}, "rounding is 'int8'; choose one of uint8, float"),
    ):
        with pytest.raises(ValueError, match=reason):
            evaluate.EvaluateConfig(**wrong)
    real = material.inputs["reference"]
    version_1 = {name: value for name, value in real.summary.items() if name != "features_version"}
    for summary, reason in (
        ({**real.summary, "resolution": 32}, "the samples have 16 px and the reference 32 px"),
        (version_1, "reference/r has features of version 1"),
        ({**real.summary, "extractor": "unheard-of"}, "feature extractor 'unheard-of'"),
    ):
        inputs = {**material.inputs, "reference": replace(real, summary=summary)}
        with pytest.raises(ValueError, match=reason):
            evaluate.run(evaluate.EvaluateConfig(), inputs, make_context(material.store, "evaluate", "s" * 64))


def test_key_does_not_depend_on_execution(material: Material) -> None:
    def key(**given: Any) -> str:
        stage = Stage("evaluate", 1, evaluate.run)
        return driver.stage_key(workflow_stage.Node("evaluate", stage, evaluate.EvaluateConfig(**given)), {})

    assert key() == key(execution=TokenizerExecution(num_workers=2, worker_batch_size=1), dataset=DatasetConfig(kind="digits"))
    assert key(metrics=()) == key(metrics=("frechet_distance",)) != key()
    assert key() == key(rounding="uint8")
    others = ({"judge": "svc"}, {"settings": SETTINGS}, {"metrics": ("inception_score",)}, {"rounding": "float"})
    assert len({key(), *(key(**given) for given in others)}) == 5


# The gate ------------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_scores_of_real_files_equal_those_of_torch_fidelity(
    photographs: dict[str, Image.Image], make_context: Callable[..., Any], local_store: ArtifactStore, tmp_path: Path
) -> None:
    """Two folders of PNGs through torch-fidelity's own command, and through the stages, with the same weights of InceptionV3.

    The weights are random: published ones cannot be had everywhere. Batch norms are set so that activations stay near 1.
    """
    from torch_fidelity import calculate_metrics

    weights = tmp_path / "inception.pth"
    torch.save(random_inception_weights(), weights)
    for folder, name, seed in (("made", "china", 0), ("real", "flower", 1)):
        (tmp_path / folder).mkdir()
        rng = np.random.default_rng(seed)
        for number in range(40):
            left, top = rng.integers(0, 640 - 64), rng.integers(0, 427 - 64)
            photographs[name].crop((left, top, left + 64, top + 64)).save(tmp_path / folder / f"{number:03d}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "made"), input2=str(tmp_path / "real"), cuda=False, batch_size=8, verbose=False, save_cpu_ram=True,
        isc=True, fid=True, kid=True, prc=True, isc_splits=4, kid_subsets=10, kid_subset_size=20, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
    )  # fmt: skip

    source = ImageSetConfig(path=str(tmp_path / "made"), name="made")
    samples = _commit(local_store, "images", "i", image_set.run(source, {}, make_context(local_store, "images", "i")))
    dataset = open_dataset(DatasetConfig(kind="images", path=str(tmp_path / "real")), local_store)
    config = reference.ReferenceConfig(
        extractor="inception", weights=str(weights), resolution=64, forward_batch_size=8, dataset=dataset.config, seed=0
    )
    made = reference.run(config, {"dataset": dataset.manifest}, make_context(local_store, "reference", "r"))
    inputs = {"samples": samples, "reference": _commit(local_store, "reference", "r", made)}
    settings = ScoreSettings(num_splits=4, kernel_subsets=10, kernel_subset_size=20)
    given = evaluate.EvaluateConfig(settings=settings, images=source)
    ours = evaluate.run(given, inputs, make_context(local_store, "evaluate", "g" * 64)).metrics
    assert theirs["frechet_inception_distance"] > 1 and theirs["kernel_inception_distance_mean"] > 0.01
    for name, tolerance, theirs_name in (
        ("fid", 1e-5, "frechet_inception_distance"),
        ("kid", 1e-4, "kernel_inception_distance_mean"),
        ("kid_std", 1e-4, "kernel_inception_distance_std"),
        ("inception_score", 1e-4, "inception_score_mean"),
        ("inception_score_std", 1e-4, "inception_score_std"),
        ("precision", 1e-4, "precision"),
        ("recall", 1e-4, "recall"),
    ):
        assert ours[name] == pytest.approx(theirs[theirs_name], rel=tolerance, abs=tolerance), name
    assert ours["sfid"] > 0
