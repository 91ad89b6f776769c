"""Stages audit and memorization on Ray: planted copies are found, their distances are scipy's, and nothing depends on workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.spatial.distance import cdist

from enat.checkpoint import save_weights
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution
from pipelines.data.samples import SamplePlan, Samples, write_samples
from pipelines.data.sources.config import DatasetConfig
from pipelines.data.token_map import TokenMapInfo, TokenRows, write_shard
from pipelines.evaluation import nearest
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.stages import audit, memorization
from pipelines.workflow.stage import StageResult

pytestmark = pytest.mark.usefixtures("ray_cluster")

INFO = TokenMapInfo(dataset="random", resolution=16, grid_size=4, codebook_size=32, num_classes=3, tokenizer_digest="t")
NUM_ROWS, NUM_SAMPLES, LENGTH = 90, 20, 16
FIELDS: dict[str, Any] = {"stage_version": 1, "config": {}, "inputs": {}}


@pytest.fixture
def codes() -> np.ndarray:
    """Ninety rows with a row that equals another, the mirror image of one, and one that is near another: uint16 (90, 2, 16)."""
    made = np.random.default_rng(0).integers(0, 32, (NUM_ROWS, 2, LENGTH)).astype(np.uint16)
    made[50] = made[10]
    made[60] = made[20, ::-1]
    made[70, 0] = made[30, 0]
    made[70, 0, :3] = (made[70, 0, :3] + 1) % 32
    return made


@pytest.fixture
def sampled(codes: np.ndarray) -> np.ndarray:
    """Twenty samples: the third copies row 40, the fifth the mirror image of row 80."""
    made = np.random.default_rng(1).integers(0, 32, (NUM_SAMPLES, LENGTH))
    made[2], made[4] = codes[40, 0], codes[80, 1]
    return made


@pytest.fixture
def inputs(codes: np.ndarray, sampled: np.ndarray, local_store: ArtifactStore, vqgan: Any, tmp_path: Path) -> dict[str, Manifest]:
    def keep(stage: str, name: str, write: Callable[[Path], Any], **summary: Any) -> Manifest:
        write(tmp_path / name)
        record = local_store.put_file(stage, "k", name, tmp_path / name)
        return local_store.commit(Manifest(stage=stage, key="k", files=(record,), summary=summary_of(stage, **summary), **FIELDS))

    labels = [row % 3 for row in range(NUM_ROWS)]
    files = [b"%032d" % (10 if row == 50 else row) for row in range(NUM_ROWS)]
    rows = TokenRows(
        codes=codes[:, 0],
        codes_flipped=codes[:, 1],
        keys=[f"{row}.png" for row in range(NUM_ROWS)],
        labels=labels,
        source_sha256=files,
    )
    plan = SamplePlan.of_labels(np.arange(NUM_SAMPLES) % 3)
    index = np.arange(NUM_SAMPLES)
    samples = Samples(index=index, codes=sampled, seeds=index, labels=plan.labels, captions=plan.captions, rows=plan.rows)
    return {
        "token_map": keep("token_map", "part-00000.parquet", lambda path: write_shard(path, INFO, rows), info=INFO, rows=NUM_ROWS),
        "tokenizer": keep("tokenizer", "vqgan.safetensors", lambda path: save_weights(path, vqgan), config=vqgan.config),
        "samples": keep(
            "generate",
            "part-00000.parquet",
            lambda path: write_samples(path, samples),
            num_samples=NUM_SAMPLES,
            shard_size=NUM_SAMPLES,
        ),
    }


def _table(result: StageResult, store: ArtifactStore, stage: str, name: str) -> dict[str, list[Any]]:
    file = next(file for file in result.files if file.name == name)
    columns: dict[str, list[Any]] = pq.read_table(store.fetch_file(stage, "k", file)).to_pydict()
    return columns


def _run(
    stage: Any, config: Any, inputs: dict[str, Manifest], store: ArtifactStore, make_context: Callable[..., Any]
) -> StageResult:
    result: StageResult = stage.run(config, inputs, make_context(store, stage.STAGE.name, "k"))
    return result


def test_planted_duplicates_are_found(
    codes: np.ndarray, inputs: dict[str, Manifest], local_store: ArtifactStore, make_context: Callable[..., Any]
) -> None:
    result = _run(audit, audit.AuditConfig(seed=0, near=0.25), inputs, local_store, make_context)
    equal = _table(result, local_store, "audit", audit.EQUAL)
    assert list(zip(equal["row"], equal["first_row"], strict=True)) == [(50, 10), (60, 20)]
    assert (equal["key"], equal["first_key"]) == (["50.png", "60.png"], ["10.png", "20.png"])
    assert equal["is_equal_file"] == [True, False]
    found = _table(result, local_store, "audit", audit.NEAREST)
    distances = np.minimum(*(cdist(codes[:, 0], codes[:, side], "hamming") for side in (0, 1)))
    np.fill_diagonal(distances, np.inf)
    assert found["row"] == [*range(NUM_ROWS)]
    np.testing.assert_allclose(found["distance"], distances.min(axis=1) * LENGTH)
    assert (found["nearest_row"][70], found["distance"][70], found["is_flipped"][70]) == (30, 3, False)
    assert (found["nearest_row"][60], found["distance"][60], found["is_flipped"][60]) == (20, 0, True)
    assert result.metrics["equal_rows"] == 2 and result.metrics["equal_files"] == 1
    assert result.metrics["equal_rows_with_other_label"] == 2  # 50 and 10, 60 and 20 have other labels
    assert result.metrics["near_duplicates"] == pytest.approx(6 / NUM_ROWS)
    assert result.metrics["nearest_distance"] == pytest.approx(distances.min(axis=1).mean())


def test_copies_of_training_images_are_found(
    codes: np.ndarray,
    sampled: np.ndarray,
    inputs: dict[str, Manifest],
    local_store: ArtifactStore,
    make_context: Callable[..., Any],
) -> None:
    summary = summary_of("audit", rows=NUM_ROWS, num_audited=NUM_ROWS, close_distance=13)
    inputs["audit"] = Manifest(stage="audit", key="a", files=(), summary=summary, **FIELDS)
    result = _run(memorization, memorization.MemorizationConfig(), inputs, local_store, make_context)
    found = _table(result, local_store, "memorization", memorization.NEAREST)
    distances = np.minimum(*(cdist(sampled, codes[:, side], "hamming").min(axis=1) for side in (0, 1))) * LENGTH
    np.testing.assert_allclose(found["distance"], distances)
    assert (found["nearest_key"][2], found["distance"][2], found["is_flipped"][2]) == ("40.png", 0, False)
    assert (found["nearest_key"][4], found["distance"][4], found["is_flipped"][4]) == ("80.png", 0, True)
    assert result.metrics["copies"] == 2 / NUM_SAMPLES
    assert result.metrics["close_copies"] == (distances < 13).mean() and 2 < (distances < 13).sum() < NUM_SAMPLES
    assert result.metrics["nearest_distance"] == pytest.approx(distances.mean() / LENGTH)
    assert 0 < result.metrics["nearest_distance_se"] < 0.1


@pytest.mark.slow
def test_nothing_depends_on_the_number_of_workers(
    inputs: dict[str, Manifest], local_store: ArtifactStore, make_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(audit, audit.AuditConfig(seed=0, num_rows=30), inputs, local_store, make_context)
    monkeypatch.setattr(nearest, "_FEWEST_ROWS", 1)
    config = audit.AuditConfig(seed=0, num_rows=30, execution=Execution(num_workers=2))
    parts = _run(audit, config, inputs, local_store, make_context)
    assert parts.metrics == whole.metrics and parts.summary == whole.summary
    assert [file.sha256 for file in (*parts.files, *parts.records)] == [file.sha256 for file in (*whole.files, *whole.records)]


def test_memorization_brings_its_audit() -> None:
    def stages(**sections: Any) -> set[str]:
        return {node.id for node in graph.build(RunConfig(name="a", dataset=DatasetConfig(kind="digits"), **sections))}

    assert {"audit", "memorization"}.isdisjoint(stages())
    assert {"audit", "memorization"} <= stages(memorization=memorization.MemorizationConfig())
    found = stages(audit=audit.AuditConfig())
    assert "audit" in found and "memorization" not in found
