"""A short run of the benchmark of stages side by side. No times are asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import side_by_side

from pipelines.artifacts.open import open_store


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_every_stage_of_a_chain_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.cloudpickle.register_pickle_by_value(side_by_side)  # workers do not find this folder
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # connected already
    monkeypatch.setattr(side_by_side, "_CHAINS", {"s": 0.01, "xl": 0.02})
    assert side_by_side.wait(tmp_path, ["s", "xl"], 2) > 0
    made = [(manifest.stage, manifest.config["seconds"]) for manifest in open_store(str(tmp_path)).manifests()]
    assert len(made) == 6 and {stage for stage, _ in made} == {"train", "generate", "evaluate"}
