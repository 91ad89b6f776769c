"""A stage that the pipeline does not have: the labels of samples, counted. All that is known of it is in this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.resources import Workers
from pipelines.data.samples import SamplesSummary
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult
from pipelines.workflow.summary import Summary


@dataclass(frozen=True, kw_only=True)
class HistogramConfig:
    table: str | None = None
    seed: int | None = None
    execution: Workers = field(default_factory=lambda: Workers(num_workers=3))


@dataclass(frozen=True, kw_only=True)
class HistogramSummary(Summary):
    num_labels: int
    seed: int


def run(config: HistogramConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads samples. Writes the number of samples of each label. Measures how many labels there are."""
    samples = SamplesSummary.read(inputs["samples"])
    assert config.seed is not None
    file = context.write("histogram.json", lambda path: path.write_text(json.dumps([samples.num_samples])))
    summary = HistogramSummary(num_labels=samples.num_classes, seed=config.seed)
    return StageResult(files=[file], summary=summary, metrics={"labels": samples.num_classes}, worker_seconds=3600.0)


STAGE = Stage(
    "histogram",
    1,
    run,
    reads={"samples": Input(("generate",))},
    config=HistogramConfig,
    summary=HistogramSummary,
    kind="evaluation",
    files=("histogram.json",),
    external=("table",),
    describe=lambda manifest: f"{HistogramSummary.read(manifest).num_labels} labels counted",
    reevaluation="measured",
)
