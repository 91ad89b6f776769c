"""Scores of a model while it trains: those of its weights at that step, computed once, without a change of the training."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rich.console import Console
from safetensors.numpy import save_file

from enat.images import to_uint8
from enat.metrics.classifier import ClassifierExtractor
from enat.metrics.moments import FeatureMoments, frechet_distance
from enat.metrics.sliced import sliced_distance
from enat.sampling.sampler import sample
from material.summaries import summary_of
from material.tiny_training import (
    CLASSES,
    CONFIG,
    Material,
    Trained,
    assert_same_bits,
    changed,
    read_weights,
    train,
    worker_context,
)
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.capacity import Capacity
from pipelines.cluster.resources import Workers
from pipelines.data.samples import sample_seed
from pipelines.evaluation.training_scores import BesideTraining, BetweenSteps, ScoringTask, start_scoring
from pipelines.stages import train as train_stage
from pipelines.training.config import ScoresConfig
from pipelines.training.task import initial_model, read_scores, score_part

SCORES = ScoresConfig(every=4, num_samples=40)
WITH_SCORES = changed(scores=SCORES, execution={"keep_every": 4})


@pytest.fixture(scope="module")
def extractor() -> ClassifierExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassifierExtractor(CLASSES).requires_grad_(False)


@pytest.fixture(scope="module")
def real(extractor: ClassifierExtractor) -> np.ndarray:
    """Features of 60 images of noise."""
    images = torch.randint(0, 256, (60, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return extractor(images)["features"].numpy()


@pytest.fixture(scope="module")
def reference(
    material: Material, extractor: ClassifierExtractor, real: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Manifest:
    folder, files = tmp_path_factory.mktemp("reference"), []
    for name, write in {
        "extractor.safetensors": extractor.save,
        "moments.safetensors": FeatureMoments(real.shape[1]).add(real).save,
        "features-00000.safetensors": lambda path: save_file({"features": real}, path),
    }.items():
        write(folder / name)
        files.append(material.store.put_file("reference", "scored", name, folder / name))
    summary = summary_of(
        "reference", extractor="classifier", outputs=extractor.outputs, images_per_pass=32, num_kept=60, features_version=2
    )
    fields = {"stage_version": 1, "config": {}, "inputs": {}, "summary": summary}
    return material.store.commit(Manifest(stage="reference", key="scored", files=tuple(files), **fields))


def task_of(material: Material, reference: Manifest, key: str, **changes: Any) -> ScoringTask:
    assert CONFIG.sampler is not None
    task = ScoringTask(
        config=SCORES,
        architecture=material.architecture(CONFIG),
        sampler=CONFIG.sampler,
        seed=0,
        is_bf16=False,
        context=worker_context(material, key),
        tokenizer=material.inputs["tokenizer"],
        reference=reference,
        captions=None,
    )
    return replace(task, **changes)


def scores_of(material: Material, key: str) -> dict[int, dict[str, Any]]:
    found = read_scores(worker_context(material, key))
    return {step: {name: value for name, value in row.items() if name != "seconds"} for step, row in found.items()}


@pytest.fixture(scope="module")
def trained(material: Material, reference: Manifest) -> Trained:
    """By two ranks, with scores between steps."""
    scoring = BetweenSteps(task_of(material, reference, "scored"))
    return train(material, WITH_SCORES, "scored", world_size=2, scoring=scoring)


@pytest.mark.slow
def test_scores_are_those_of_the_weights_and_change_no_bit(trained, material, real, extractor, vqgan) -> None:
    assert_same_bits(trained, train(material, changed(execution={"keep_every": 4}), "not scored", world_size=2))
    found = scores_of(material, "scored")
    assert [*found] == [4, 8, 12] and all(row["step"] == step for step, row in found.items())
    assert trained.result is not None
    model = initial_model(material.architecture(CONFIG), 0).eval()
    for step, record in zip((4, 8), trained.result.milestones, strict=True):
        model.load_state_dict(read_weights(material, "scored", record))
        labels, seeds = torch.arange(40) % CLASSES, [sample_seed(0, index) for index in range(40)]
        codes = sample(model, labels, CONFIG.sampler, seeds=seeds)
        features = extractor(to_uint8(vqgan.decode(codes.view(-1, 4, 4))))["features"].numpy()
        moments = [FeatureMoments(real.shape[1]).add(each) for each in (features, real)]
        assert found[step]["frechet_distance"] == pytest.approx(frechet_distance(*moments), rel=1e-4)
        assert found[step]["sliced_distance"] == pytest.approx(sliced_distance(features, real), rel=1e-4)
        assert 0 < found[step]["frechet_distance_se"] < found[step]["frechet_distance"]


@pytest.mark.slow
def test_a_resumed_run_scores_every_step_once(trained, material, reference) -> None:
    """Step 4 was scored and saved before the stop. A score of step 8 is of weights that are lost, so it is computed again."""
    scoring = BetweenSteps(task_of(material, reference, "stopped"))
    train(material, WITH_SCORES, "stopped", world_size=2, scoring=scoring, stop_at=5)
    context = worker_context(material, "stopped")
    before = read_scores(context)
    assert [*before] == [4]
    material.store.put_part("train", "stopped", score_part(8), {"step": 8, "frechet_distance": -1.0, "seconds": 0.0})
    train(material, WITH_SCORES, "stopped", world_size=2, scoring=scoring)
    assert read_scores(context)[4] == before[4], "computed once"
    assert scores_of(material, "stopped") == scores_of(material, "scored")


@pytest.mark.slow
def test_scores_that_fail_do_not_stop_the_training(material, reference) -> None:
    damaged = replace(reference, files=tuple(file for file in reference.files if file.name != "extractor.safetensors"))
    scoring = BetweenSteps(task_of(material, damaged, "failing"))
    trained = train(material, WITH_SCORES, "failing", scoring=scoring)
    assert trained.column("step") == list(range(1, 13))
    found = scores_of(material, "failing")
    assert [*found] == [4, 8, 12] and all("extractor.safetensors" in row["error"] for row in found.values())


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_beside_the_training_computes_the_same(trained, material, reference, make_context) -> None:
    console = Console(file=io.StringIO(), width=500)
    config = replace(WITH_SCORES, scores=replace(SCORES, execution=Workers(cpus_per_worker=0.5)))
    inputs = {name: material.inputs[name] for name in ("tokenizer", "token_map")} | {"reference": reference}
    made = train_stage.run(config, inputs, make_context(material.store, "train", "beside", console=console))
    assert "between steps" not in console.file.getvalue()  # type: ignore[attr-defined]
    (record,) = (record for record in made.records if record.name == "scores.json")
    content = json.loads(material.store.fetch_file("train", "beside", record).read_text())
    assert (content["reference"], content["num_samples"]) == ("reference/scored", 40)
    rows = content["rows"]
    alone = scores_of(material, "scored")
    for row, expected in zip(rows, alone.values(), strict=True):
        assert row["step"] == expected["step"]
        assert row["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=0.02), "another number of workers"
    assert made.metrics["scoring_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.faults
def test_training_does_not_wait_for_an_actor_that_falls_behind(material, reference, tmp_path: Path) -> None:
    """The third step is left out, with a reason, and the end waits for the two that were taken."""
    gate = tmp_path / "gate"

    class Slow:
        def score(self, step: int, weights: dict[str, torch.Tensor]) -> None:
            while not gate.exists():
                time.sleep(0.05)
            (tmp_path / f"scored-{step}").write_text(str(len(weights)))

        def flush(self) -> None:
            pass

    task = task_of(material, reference, "behind")
    scoring = BesideTraining(ray.remote(num_cpus=0)(Slow).remote(), task.context)
    model = initial_model(task.architecture, 0)
    for step in (4, 8, 12):
        scoring.submit(step, model)
    assert scores_of(material, "behind") == {12: {"error": "scores take longer than train.scores.every steps; set it higher"}}
    gate.touch()
    scoring.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"gate", "scored-4", "scored-8"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_actor_has_the_resources_of_a_training_worker(material, reference) -> None:
    task = task_of(material, reference, "resources")
    few = start_scoring(task, Workers(cpus_per_worker=0.25))
    assert isinstance(few, BesideTraining)
    ray.kill(few._actor)
    assert isinstance(start_scoring(task, Workers(cpus_per_worker=0.25, gpus_per_worker=1.0)), BetweenSteps), "there is no GPU"


def test_room_beside_the_training() -> None:
    two, other = Workers(num_workers=2), Workers(cpus_per_worker=0.5)
    assert not Capacity(({"CPU": 2.0},)).has_room_beside(two, other)
    assert Capacity(({"CPU": 2.5},)).has_room_beside(two, other)
    assert Capacity(({"CPU": 2.0}, {"CPU": 1.0})).has_room_beside(two, other)
    assert not Capacity(({"CPU": 1.2}, {"CPU": 1.3})).has_room_beside(two, other)
    gpu = Workers(gpus_per_worker=1.0)
    assert not Capacity(({"CPU": 8.0, "GPU": 1.0},)).has_room_beside(gpu, gpu)
    assert Capacity(({"CPU": 8.0, "GPU": 1.0},)).has_room_beside(gpu, other)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"metrics": ("fid",)}, r"train\.scores\.metrics names 'fid'"),
        ({"metrics": ()}, r"train\.scores\.metrics is empty"),
        ({"every": 0}, "every is 0"),
        ({"num_samples": 1}, "num_samples is 1"),
        ({"execution": Workers(num_workers=2)}, r"train\.scores\.execution\.num_workers must be 1"),
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScoresConfig(**wrong)


def test_sliced_distance_needs_features_of_single_images(material, reference, make_context, tmp_path: Path) -> None:
    moments_only = replace(reference, summary={**reference.summary, "num_kept": 0})
    inputs = {name: material.inputs[name] for name in ("tokenizer", "token_map")} | {"reference": moments_only}
    with pytest.raises(ValueError, match=r"sliced_distance.*reference\.num_kept"):
        train_stage._scoring(WITH_SCORES, material.architecture(CONFIG), inputs, make_context(material.store, "train", "refused"))
