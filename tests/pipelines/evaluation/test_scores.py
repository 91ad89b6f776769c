"""The metrics of an evaluation: which of them can be computed, under which names and settings, and what they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from enat.metrics.cmmd import cmmd
from enat.metrics.errors import standard_error
from enat.metrics.moments import FeatureMoments, inception_score
from pipelines.cluster.resources import Execution
from pipelines.evaluation import protocol
from pipelines.evaluation.scores import (
    METRICS,
    Available,
    ImageStatistics,
    Scores,
    ScoreSettings,
    TaskPool,
    compute_scores,
    mean_of_replicates,
    published_name,
)
from pipelines.stages import evaluate


def _available(**given: Any) -> Available:
    known = {"extractor": "inception", "outputs": ("features", "spatial", "logits"), "has_spatial": True}
    return Available(**{**known, "num_generated": 100, "num_reference": 100, **given})


def test_all_metrics_that_can_be_computed_are_chosen() -> None:
    assert _available().chosen(None) == METRICS[:-1]
    assert _available(extractor="clip", outputs=("features",)).chosen(None) == (
        "frechet_distance",
        "kernel_distance",
        "precision_recall",
        "density_coverage",
        "authenticity",
        "cmmd",
    )
    assert _available(outputs=("features",), has_spatial=False).chosen(None) == (
        "frechet_distance",
        "kernel_distance",
        "precision_recall",
        "density_coverage",
        "authenticity",
    )
    assert _available(num_reference=0).chosen(None) == ("frechet_distance", "spatial_frechet_distance", "inception_score")
    assert "density_coverage" not in _available(num_generated=5).chosen(None)
    assert _available().chosen(("precision_recall",)) == ("frechet_distance", "precision_recall")
    refused: tuple[tuple[str, Mapping[str, Any], str], ...] = (
        ("inception_score", {"outputs": ("features",)}, "no logits"),
        ("spatial_frechet_distance", {"outputs": ("features",)}, "no spatial features"),
        ("spatial_frechet_distance", {"has_spatial": False}, "the reference has no moments of spatial features"),
        ("kernel_distance", {"num_reference": 0}, "features of single images"),
        ("density_coverage", {"num_generated": 5}, "needs 6 .*5"),
    )
    for metric, given, reason in refused:
        with pytest.raises(ValueError, match=f"evaluate.metrics names {metric}, .*{reason}"):
            _available(**given).chosen((metric,))


def test_scores_of_inception_have_their_published_names() -> None:
    assert [published_name(metric, "inception") for metric in METRICS[:4]] == ["fid", "sfid", "inception_score", "kid"]
    assert [published_name(metric, "dinov2") for metric in METRICS] == list(METRICS)
    scores = {"kernel_distance": 1.0, "kernel_distance_std": 2.0, "frechet_distance_infinity_se": 4.0, "recall": 3.0}
    influences = {"frechet_distance": np.zeros(2, np.float32)}
    named = evaluate._named(Scores(by_name=scores, influences=influences), "inception")
    assert named.by_name == {"kid": 1.0, "kid_std": 2.0, "fid_infinity_se": 4.0, "recall": 3.0} and [*named.influences] == ["fid"]


@pytest.mark.slow
def test_inception_score_of_parts_of_a_size_in_order() -> None:
    """As ADM's evaluator computes it. Samples of one class follow each other, so that shuffling makes a difference. It takes one
    CPU, whatever the workers hold."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(20, 6)) + 3 * np.eye(6)[np.arange(20) // 4]).astype(np.float32)
    features = rng.normal(size=(20, 3))
    side = ImageStatistics(moments={"features": FeatureMoments(3).add(features)}, features=features, logits=logits)
    pool = TaskPool(Execution(gpus_per_worker=2), lambda _: pytest.fail("the tasks are not spread over workers"))
    settings = ScoreSettings(split_size=8).fitted(20, 20)
    found = compute_scores(("frechet_distance", "inception_score"), side, side, settings, pool)
    expected = inception_score(logits, seed=None, split_size=8)
    assert (found.by_name["inception_score"], found.by_name["inception_score_std"]) == (expected.value, expected.std)
    for name, influence in found.influences.items():
        assert len(influence) == 20 and found.by_name[f"{name}_se"] > 0
    assert {*found.influences} == {"frechet_distance", "inception_score"}
    assert found.by_name["frechet_distance_infinity"] < found.by_name["frechet_distance"] + 1e-6
    assert expected.value != pytest.approx(inception_score(logits, 3).value, rel=1e-2)
    assert pool.cpu_seconds > 0 == pool.seconds


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_cmmd_by_tasks_is_that_of_all_samples_at_once(make_context: Any, local_store: Any) -> None:
    rng = np.random.default_rng(0)
    made, real = rng.normal(0.3, 1, (60, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    sides = [ImageStatistics(moments={"features": FeatureMoments(8).add(each)}, features=each) for each in (made, real)]
    context = make_context(local_store, "evaluate")
    pool = TaskPool(Execution(num_workers=2, cpus_per_worker=0.5), lambda total: context.bar(total, "parts"))
    scores = compute_scores(("frechet_distance", "cmmd"), *sides, ScoreSettings(), pool)
    expected = cmmd(made, real)
    assert scores.by_name["cmmd"] == pytest.approx(expected.value, rel=1e-9)
    assert scores.by_name["cmmd_se"] == pytest.approx(standard_error(expected.influence), rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("size", "has_spread"), [(40, False), (30, True)])
def test_the_kernel_distance_of_whole_sets_has_no_spread_over_subsets(
    size: int, has_spread: bool, make_context: Any, local_store: Any
) -> None:
    rng = np.random.default_rng(0)
    made, real = rng.normal(0.3, 1, (40, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    sides = [ImageStatistics(moments={"features": FeatureMoments(8).add(each)}, features=each) for each in (made, real)]
    context = make_context(local_store, "evaluate")
    pool = TaskPool(Execution(num_workers=1, cpus_per_worker=0.5), lambda total: context.bar(total, "parts"))
    settings = ScoreSettings(kernel_subsets=4, kernel_subset_size=size)
    scores = compute_scores(("frechet_distance", "kernel_distance"), *sides, settings, pool)
    of_samples = standard_error(scores.influences["kernel_distance"])
    assert ("kernel_distance_std" in scores.by_name) == has_spread
    assert (scores.by_name["kernel_distance_se"] > 1.001 * of_samples) == has_spread
    if not has_spread:
        assert scores.by_name["kernel_distance_se"] == pytest.approx(of_samples, rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_mean_of_replicates(count: int) -> None:
    """Errors come from influences of all samples, or from the deviation of enough replicates."""
    rng = np.random.default_rng(0)
    replicates = []
    for _ in range(count):
        scores = Scores()
        scores.add("fid", rng.normal(7, 0.3), rng.normal(size=50))
        scores.by_name.update({"kid_std": 2.0, "judge_accuracy": 0.9})
        replicates.append(scores)
    found = mean_of_replicates(replicates)
    values = np.array([each.by_name["fid"] for each in replicates])
    if count == 1:
        assert found is replicates[0]
        return
    by_influences = standard_error(np.mean([each.influences["fid"] for each in replicates], axis=0))
    by_deviation = values.std(ddof=1) / count**0.5
    assert found.by_name["fid_se"] == pytest.approx(by_deviation if count >= 5 else by_influences, rel=0.2)
    assert found.by_name["fid"] == pytest.approx(values.mean()) and found.by_name["replicates"] == count
    assert (found.by_name["kid_std"], found.by_name["judge_accuracy"]) == pytest.approx((2.0, 0.9))
    assert not any("kid" in name or "judge" in name for name in found.by_name if "replicate" in name)
    assert found.influences["fid"].shape == (50,)


def test_settings_are_checked_and_fitted_to_the_number_of_samples() -> None:
    assert ScoreSettings().fitted(30, 20).kernel_subset_size == 20
    assert ScoreSettings().fitted(4, 0).num_splits == 4
    assert ScoreSettings(split_size=5000).fitted(4, 0).split_size == 5000  # the last part may be smaller
    assert ScoreSettings().fitted(50_000, 50_000) == ScoreSettings()
    for name in ("num_splits", "split_size", "kernel_subsets", "precision_neighbours", "kernel_subset_size", "seed"):
        with pytest.raises(ValueError, match=rf"^{name} is -?\d+; it must be"):
            ScoreSettings(**{name: -1})
    with pytest.raises(ValueError, match="split_size replaces num_splits"):
        ScoreSettings(num_splits=5, split_size=5000)
    assert ScoreSettings(split_size=1).split_size == 1
    assert protocol.metric_version(ScoreSettings()) == "1"
    assert protocol.metric_version(ScoreSettings(split_size=5000)) == "1, split_size 5000"
