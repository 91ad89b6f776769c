"""Buckets that refuse or fail while workers of a run use them: one sentence, exit code 1, and the traceback in the log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from material.layouts import Layouts


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["image_folder", "tar"])
def test_a_refusal_that_a_worker_meets_is_one_sentence(
    enat: Callable[..., Any], layouts: Layouts, layouts_bucket: Any, s3_endpoint: Any, tokenizer_weights: Path, tmp_path: Path, kind
) -> None:
    """Of images, in tasks of Ray Data; of shards, in tasks of Ray, of which others fail after the first."""
    config = {
        "name": "refused",
        "workspace": str(tmp_path / "runs"),
        "targets": ["token_map"],
        "dataset": {"kind": kind, "path": f"{layouts_bucket.uri}/{kind}"},
        "tokenizer": {"codebook_size": 32, "weights": str(tokenizer_weights)},
        "tracking": {"enabled": False},
        "cluster": {"num_cpus": 2},
    }
    (tmp_path / "refused.yaml").write_text(json.dumps(config))
    with s3_endpoint.fault("GET", "", status="403 Forbidden", code="AccessDenied", times=999) as fault:
        fault.matches = lambda environ: f"/data/sets/{kind}/" in environ["PATH_INFO"]
        process = enat("run", tmp_path / "refused.yaml")
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    bucket = layouts_bucket.uri.split("/")[2]
    assert process.stderr.startswith(f"enat: {layouts_bucket.uri}/{kind}/") and "attempts" not in process.stderr
    assert f"no permission to read it (s3:GetObject on bucket {bucket}, with the credentials in use)" in process.stderr
    (log,) = (tmp_path / "runs" / "logs").iterdir()
    assert f"(traceback in {log})" in process.stderr and "Traceback" in log.read_text()
