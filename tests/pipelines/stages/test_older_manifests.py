"""Summaries in manifests: those of an earlier version can be read; others are refused with the field and a remedy.

manifests/ holds artifacts of commit 9a09855, when summaries had no version.
"""

from __future__ import annotations

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.run import graph
from pipelines.workflow.summary import SummaryError

OLDER = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "manifests").glob("*.json"))}


@pytest.mark.parametrize("stage", OLDER)
def test_an_older_manifest_is_read_and_described(stage: str) -> None:
    fields, known = json.loads(OLDER[stage]), graph.stages()[stage]
    manifest = Manifest.read(OLDER[stage], stage, fields["stage"], fields["key"])
    assert "summary_version" not in manifest.summary
    summary = known.summary.read(manifest)
    assert _older(summary.to_dict(), manifest.summary) == manifest.summary
    assert known.summary.read(dataclasses.replace(manifest, summary=summary.to_dict())) == summary
    assert graph.describe(manifest)
    for file in (*manifest.files, *manifest.records):
        assert any(fnmatchcase(file.name, pattern) for pattern in known.files), file.name


def _manifest(stage: str, summary: dict[str, Any]) -> Manifest:
    return Manifest(stage=stage, key="a" * 64, stage_version=1, config={}, inputs={}, files=(), summary=summary)


def test_a_summary_with_other_fields_or_of_another_version_is_refused() -> None:
    for stage, known in graph.stages().items():
        complete = summary_of(stage)
        assert known.summary.read(_manifest(stage, complete))
        wrong = [({**complete, "summary_version": 2}, "version 2"), ({**complete, "colour": 1}, "colour")]
        required = [field.name for field in dataclasses.fields(known.summary) if field.default is field.default_factory]  # MISSING
        wrong += [({name: value for name, value in complete.items() if name != missing}, missing) for missing in required]
        for summary, problem in wrong:
            with pytest.raises(SummaryError, match=rf"{stage}/aaaaaaaaaaaa .*{problem}.* Remove this artifact"):
                known.summary.read(_manifest(stage, summary))


def test_summaries_name_their_dataset_and_state_whether_they_are_imported() -> None:
    names = {stage: graph.dataset_name(_manifest(stage, summary_of(stage))) for stage in graph.stages()}
    assert {stage for stage, name in names.items() if name == "digits"} == {"dataset", "token_map", "reference", "train"}
    for stage in ("tokenizer", "reference", "train"):
        for is_imported in (True, False):
            manifest = _manifest(stage, summary_of(stage, is_imported=is_imported))
            assert graph.stages()[stage].summary.read(manifest).is_from_outside is is_imported


def _older(values: Any, known: Any) -> Any:
    """Without the fields that a later version added."""
    if not isinstance(values, dict) or not isinstance(known, dict):
        return values
    return {name: _older(value, known[name]) for name, value in values.items() if name in known}
