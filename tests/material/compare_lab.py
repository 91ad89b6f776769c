"""Shared by tests of comparisons: MLflow with runs as `enat run` logs them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from pipelines.comparison import query, table
from pipelines.comparison.query import Comparison, Query
from pipelines.comparison.sections import Row
from pipelines.registry.influences import INFLUENCES
from pipelines.storage.base import canonical_json
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle, TrackingConfig
from services.mlflow_database import mlflow_database

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
PROTOCOL = {
    "extractor": "inception",
    "extractor_digest": "e" * 64,
    "reference": "imagenet, 256 px, adm-center",
    "reference_digest": "f" * 64,
    "num_samples": 50_000,
    "num_reference": 1_281_167,
    "rounding": "uint8",
    "labels": "each class in turn",
    "metric_version": 1,
}


@dataclass
class Lab:
    """One experiment with runs as `enat run` logs them."""

    uri: str
    experiment: str
    client: Any  # of MLflow

    def start(self, name: str, tags: Mapping[str, str] | None = None, parent: RunHandle | None = None) -> RunHandle:
        return tracking.start_run(self.uri, TrackingConfig(experiment=self.experiment), name, tags or {}, parent)

    def generate(
        self,
        samples: str,
        parent: RunHandle | None = None,
        *,
        mask_ratio: float | str | None = None,
        ema_length: float | None = None,
        **params: Any,
    ) -> None:
        key = samples.partition("/")[2]
        run = self.start("generate", {"enat.stage": "generate", "enat.key": key}, parent)
        drawn = {"mask_ratio": mask_ratio, "ema_length": ema_length}
        run.log_params({"seed": 0, **drawn, "sampler": params, "execution": {"num_workers": 3}})
        run.finish()

    def evaluate(
        self,
        metrics: Mapping[str, float] | None = None,
        *,
        samples: str | None = "generate/" + "a1" * 32,
        protocol: Mapping[str, Any] | str | None = PROTOCOL,
        parent: RunHandle | None = None,
        status: str = "FINISHED",
        grid: bytes | None = None,
        influences: bytes | None = None,
        **tags: Any,
    ) -> str:
        """Log a run of stage evaluate. Tags have no "enat." prefix; None leaves one out."""
        text = canonical_json(dict(protocol)).decode() if isinstance(protocol, Mapping) else protocol
        values = {
            "stage": "evaluate",
            "node": "evaluate",
            "model": "enat-l-imagenet",
            "variant": "main",
            "dataset": "imagenet",
            "resolution": 256,
            "parameters": 574_300_000,
            "train_steps": 500_000,
            "num_steps": 8,
            "guidance_scale": 3.5,
            "num_samples": protocol.get("num_samples") if isinstance(protocol, Mapping) else None,
            "protocol": text,
            "protocol_digest": hashlib.sha256(text.encode()).hexdigest()[:12] if text else None,
            "samples": samples,
            "digest": "d" * 64,
            **tags,
        }
        run = self.start("evaluate", {f"enat.{name}": str(v) for name, v in values.items() if v is not None}, parent)
        run.log_metrics({"fid": 2.79, "gmacs_total": 347.0} if metrics is None else metrics)
        if grid is not None:
            run.log_bytes(grid, "samples.png")
        if influences is not None:
            run.log_bytes(influences, INFLUENCES)
        if status != "RUNNING":
            run.finish(status)
        assert run.run_id is not None
        return run.run_id

    def compare(self, *runs: str, filter: str | None = None, published: str = "none") -> Comparison:
        return query.compare(self.uri, Query(experiments=(self.experiment,), filter=filter, runs=runs), published)

    def rows(self, *runs: str, filter: str | None = None) -> list[Row]:
        return self.compare(*runs, filter=filter).rows


@pytest.fixture(scope="session")
def lab_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_database(tmp_path_factory.mktemp("compare"))


_numbers = count()


@pytest.fixture
def lab(lab_uri: str) -> Lab:
    """An empty experiment of one test."""
    from mlflow import MlflowClient

    lab = Lab(lab_uri, f"lab-{next(_numbers)}", MlflowClient(lab_uri))
    run = lab.start("empty")
    lab.client.delete_run(run.run_id)
    return lab


def key_of(number: int) -> str:
    return f"generate/{number:064x}"


def text_of(comparison: Comparison, width: int = 1000) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    table.show(comparison, console)
    with closing(console.file) as file:
        assert isinstance(file, io.StringIO)
        return file.getvalue()
