"""Samples of others share a table with ours if, and only if, the protocols are equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.comparison import query
from pipelines.comparison.query import Query
from pipelines.data.labels import scheme_of_labels
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.evaluation.readers import Decoded
from pipelines.evaluation.scores import ScoreSettings
from pipelines.storage.base import canonical_json
from pipelines.tracking.run import TrackingConfig, start_run
from services.mlflow_database import mlflow_database

FIELDS: dict[str, Any] = {"stage_version": 1, "inputs": {}, "files": ()}
REFERENCE = Manifest(
    stage="reference",
    key="a" * 64,
    config={},
    summary=summary_of(
        "reference",
        extractor="inception",
        extractor_digest="e" * 64,
        of="imagenet, 256 px, adm-center",
        num_images=1_281_167,
        num_kept=50_000,
    ),
    **FIELDS,
)


def ours(num_samples: int = 50_000, mask_ratio: float | None = None, **config: Any) -> Manifest:
    labels = "given" if config.get("labels") else "each class in turn" if mask_ratio is None else "token map rows"
    summary = summary_of("generate", labels=labels, num_samples=num_samples, num_classes=1000, mask_ratio=mask_ratio)
    return Manifest(stage="generate", key="b" * 64, config=config, summary=summary, **FIELDS)


def outside(labels: str, num_images: int = 50_000) -> Manifest:
    summary = summary_of("images", labels=labels, num_images=num_images, resolution=256, name="ADM")
    return Manifest(stage="images", key="c" * 64, config={}, summary=summary, **FIELDS)


def protocol(samples: Manifest, **given: Any) -> dict[str, Any]:
    reference = Manifest(**{**vars(REFERENCE), "summary": {**REFERENCE.summary, **given}})
    return evaluation_protocol.protocol_of(reference, samples, ScoreSettings())


def test_samples_stored_as_jpeg_have_a_protocol_of_their_own() -> None:
    stored = outside("none")
    lossy = Manifest(**{**vars(stored), "summary": {**stored.summary, "num_jpeg": 3}})
    protocols = [protocol(samples) for samples in (stored, lossy)]
    assert [each["rounding"] for each in protocols] == ["uint8", "uint8, stored as JPEG"]
    assert len({evaluation_protocol.protocol_digest(each) for each in protocols}) == 2


@pytest.mark.slow
def test_npz_with_equal_counts_of_labels_shares_a_table_with_our_samples(tmp_path):
    """Samples without labels, fewer samples, and samples of one class do not. Samples from real codes with different mask ratios
    share a table with a column for the ratio."""
    balanced = outside(scheme_of_labels(np.random.default_rng(0).permutation(50_000) % 1000))
    measured = {
        "ours": protocol(ours()),
        "ADM": protocol(balanced),
        "no labels": protocol(outside("unknown")),
        "fewer": protocol(outside("1000 classes, 10 each", 10_000)),
        "one class": protocol(ours(labels=[207])),
        "a fifth": protocol(ours(mask_ratio=0.2)),
        "two fifths": protocol(ours(mask_ratio=0.4)),
    }
    uri = mlflow_database(tmp_path)
    for number, (name, found) in enumerate(measured.items()):
        tags = {
            "enat.stage": "evaluate",
            "enat.model": name,
            "enat.resolution": "256",
            "enat.samples": f"images/{number}",
            "enat.protocol": canonical_json(found).decode(),
        }
        run = start_run(uri, TrackingConfig(), "evaluate", tags)
        run.log_metrics({"fid": 2.0 + number})
        run.finish()
    sections = query.compare(uri, Query(), published="none").sections
    tables = sorted(sorted(row.model for row in section.rows) for section in sections)
    assert tables == [["ADM", "ours"], ["a fifth", "two fifths"], ["fewer"], ["no labels"], ["one class"]]
    assert {section.protocol["labels"] for section in sections} == {
        "1000 classes, 50 each", "1000 classes, 10 each", "unknown", "class 207 alone", "token map rows"
    }  # fmt: skip
    ratios = {row.model: row.mask_ratio for section in sections for row in section.rows}
    assert (ratios["a fifth"], ratios["two fifths"], ratios["ours"]) == (0.2, 0.4, None)
    assert measured["a fifth"] != measured["two fifths"]


def test_number_of_stored_reference_features_is_part_of_a_protocol():
    assert protocol(ours(), num_kept=49_999) != protocol(ours())
    assert protocol(ours())["num_kept"] == 50_000


@dataclass
class CountingReader:
    """Gray images. Records which of them are loaded and decoded."""

    side: int
    loaded: list[tuple[int, int]] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        self.loaded.append((start, stop))
        return {"level": np.arange(start, stop, dtype=np.uint8)}

    def decoder(self, device: str) -> Any:
        def decode(rows: dict[str, torch.Tensor]) -> Decoded:
            self.decoded.append(len(rows["level"]))
            return Decoded(rows["level"].view(-1, 1, 1, 1).expand(-1, 3, self.side, self.side).contiguous())

        return decode


@pytest.mark.parametrize(
    ("side", "num_classes", "num_samples", "images_per_pass", "shown", "passes"),
    [
        (256, 1000, 50_000, 32, 32, [32]),
        (16, 10, 500, 24, 60, [20, 20, 20]),
        (16, 10, 7, 64, 7, [7]),
    ],
)
def test_picture_decodes_only_what_it_shows(side, num_classes, num_samples, images_per_pass, shown, passes):
    reader = CountingReader(side)
    summary = summary_of("images", num_classes=num_classes, num_images=num_samples, resolution=side)
    samples = Manifest(stage="images", key="c" * 64, config={}, summary=summary, **FIELDS)
    inputs = {"samples": samples}
    images = evaluation_protocol.shown_images(reader, evaluation_protocol.num_shown(inputs), images_per_pass)
    picture = np.asarray(evaluation_protocol.sample_grid(images, inputs))
    assert reader.loaded == [(0, shown)] and reader.decoded == passes
    assert set(range(1, shown)) <= set(np.unique(picture).tolist())
