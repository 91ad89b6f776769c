"""The cost of a result: everything it was made from counts once, and unknown costs are counted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import pipelines
from material.places import make
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.evaluation.protocol import SCORES
from pipelines.run import graph
from pipelines.workflow import config as configuration
from pipelines.workflow import costs
from pipelines.workflow.costs import KINDS, LineageCost
from pipelines.workflow.work import Prices


def cost_metrics(store: ArtifactStore, manifest: Manifest, prices: Prices | None = None) -> dict[str, float]:
    return costs.cost_metrics(store, manifest, graph.stages(), prices)


def lineage_cost(store: ArtifactStore, manifest: Manifest) -> LineageCost:
    return costs.lineage_cost(store, manifest, graph.stages())


def _commit(
    store: ArtifactStore, stage: str, inputs: Sequence[Manifest], worker: float, device: float = 0, **summary: Any
) -> Manifest:
    fields = {"summary": summary_of(stage, **summary) if stage in graph.stages() else {}}
    provenance = {"seconds": 1e6, "worker_seconds": worker, "device_seconds": device}
    return make(store, f"{stage}/{worker}", *inputs, files={}, provenance=provenance, **fields)


def _pipeline(store: ArtifactStore, *, is_imported: bool = False, is_reference_imported: bool = False) -> dict[str, Manifest]:
    """A whole pipeline whose stages took powers of two seconds, so that every sum identifies its terms."""
    dataset = _commit(store, "dataset", [], 1)
    tokenizer = _commit(store, "tokenizer", [dataset], 2, 1, is_imported=False)
    token_map = _commit(store, "token_map", [dataset, tokenizer], 4, 2)
    learned_from = [] if is_imported else [token_map, _commit(store, "captions", [dataset], 8), tokenizer]
    model = _commit(store, "train", learned_from, 16, 16, is_imported=is_imported)
    samples = _commit(store, "generate", [model], 32, 8)
    reference = _commit(store, "reference", [dataset], 64, is_imported=is_reference_imported)
    evaluation = _commit(store, "evaluate", [samples, tokenizer, reference, model, dataset], 128, 4)
    made = [dataset, tokenizer, token_map, model, samples, reference, evaluation]
    return {each.stage: each for each in made}


def _hours(seconds: float) -> Any:
    return pytest.approx(seconds / 3600)


def test_every_ancestor_counts_once_and_by_its_kind(local_store: ArtifactStore) -> None:
    """The dataset is reached over five ways, the tokenizer over three."""
    made = _pipeline(local_store)
    metrics = cost_metrics(local_store, made["evaluate"])
    for unit, seconds in (
        ("worker", {"training": 16, "tokenizing": 1 + 2 + 4 + 8, "generation": 32, "evaluation": 64 + 128, "total": 255}),
        ("device", {"training": 16, "tokenizing": 3, "generation": 8, "evaluation": 4, "total": 31}),
    ):
        assert {kind: metrics[f"cost/{kind}_{unit}_hours"] for kind in (*KINDS, "total")} == {
            kind: _hours(value) for kind, value in seconds.items()
        }
    assert metrics["cost/missing_artifacts"] == 0 == metrics["cost/imported_artifacts"]
    metrics = cost_metrics(local_store, made["train"])
    assert metrics["cost/total_worker_hours"] == _hours(1 + 2 + 4 + 8 + 16)
    assert metrics["cost/generation_worker_hours"] == 0 == metrics["cost/evaluation_device_hours"]


def test_money_is_reported_only_if_prices_are_given(local_store: ArtifactStore) -> None:
    evaluation = _pipeline(local_store)["evaluate"]
    assert not [name for name in cost_metrics(local_store, evaluation) if "money" in name]
    priced = cost_metrics(local_store, evaluation, Prices(device_hour=3600.0, worker_hour=36.0))
    assert priced["cost/total_money"] == pytest.approx(31 * 1.0 + 255 * 0.01)


def test_imported_weights_cost_nothing_and_are_counted_as_imported(local_store: ArtifactStore) -> None:
    """What the import took to run is not what training took."""
    evaluation = _pipeline(local_store, is_imported=True)["evaluate"]
    metrics, cost = cost_metrics(local_store, evaluation), lineage_cost(local_store, evaluation)
    assert metrics["cost/training_worker_hours"] == 0 == metrics["cost/training_device_hours"]
    assert metrics["cost/imported_artifacts"] == 1 and len(cost.imported) == 1 and cost.imported[0].startswith("train/")
    assert metrics["cost/total_worker_hours"] == _hours(255 - 16 - 4 - 8), "what led to other weights does not count"


def test_features_of_an_imported_reference_count(local_store: ArtifactStore) -> None:
    """Its statistics came with a file, the features of its images did not."""
    evaluation = _pipeline(local_store, is_reference_imported=True)["evaluate"]
    metrics = cost_metrics(local_store, evaluation)
    assert metrics["cost/evaluation_worker_hours"] == _hours(64 + 128) and metrics["cost/imported_artifacts"] == 1
    assert metrics["cost/missing_artifacts"] == 0


def test_a_reconstruction_costs_itself_and_its_ancestors(local_store: ArtifactStore) -> None:
    made = _pipeline(local_store)
    inputs = [made[stage] for stage in ("token_map", "reference", "tokenizer", "dataset")]
    metrics = cost_metrics(local_store, _commit(local_store, "reconstruction", inputs, 256, 32))
    assert metrics["cost/evaluation_worker_hours"] == _hours(64 + 256) and metrics["cost/evaluation_device_hours"] == _hours(32)
    assert metrics["cost/total_worker_hours"] == _hours(1 + 2 + 4 + 64 + 256)


@pytest.mark.parametrize("damage", ["removed", "no JSON", "no seconds", "text", "negative", "NaN", "another summary"])
def test_an_artifact_whose_cost_is_unknown_is_counted_as_missing(local_store: ArtifactStore, damage: str) -> None:
    """All other artifacts are also reached without the token map."""
    made = _pipeline(local_store)
    manifest = Path(local_store.place("token_map", made["token_map"].key)) / "manifest.json"
    fields = json.loads(manifest.read_text())
    if damage == "no seconds":
        del fields["provenance"]["worker_seconds"]
    elif damage == "another summary":
        fields["summary"] = {"rows": "many"}
    else:
        fields["provenance"]["worker_seconds"] = {"text": "much", "negative": -1.0, "NaN": math.nan}.get(damage)
    manifest.write_text("{" if damage == "no JSON" else json.dumps(fields))
    if damage == "removed":
        manifest.unlink()
    metrics, cost = cost_metrics(local_store, made["evaluate"]), lineage_cost(local_store, made["evaluate"])
    assert metrics["cost/missing_artifacts"] == 1 and cost.missing == (f"token_map/{made['token_map'].key}",)
    assert metrics["cost/total_worker_hours"] == _hours(255 - 4)


def test_the_artifact_itself_need_not_be_committed(local_store: ArtifactStore, tmp_path: Path) -> None:
    """A stage asks before its own manifest exists."""
    elsewhere = open_store(str(tmp_path / "elsewhere"))
    made = _pipeline(local_store)
    own = _commit(elsewhere, "evaluate", [made["generate"]], 512)
    assert cost_metrics(local_store, own)["cost/evaluation_worker_hours"] == _hours(512)
    assert cost_metrics(local_store, own)["cost/missing_artifacts"] == 0


def test_a_stage_of_unknown_kind_is_in_the_total_and_listed_separately(local_store: ArtifactStore) -> None:
    made = _pipeline(local_store)
    metrics = cost_metrics(local_store, _commit(local_store, "upscale", [made["generate"]], 1024))
    assert metrics["cost/other_worker_hours"] == _hours(1024)
    assert metrics["cost/total_worker_hours"] == _hours(1024 + 32 + 16 + 8 + 4 + 2 + 1)


def test_a_real_run_costs_what_its_manifests_say(digits_run) -> None:
    planned = digits_run.planned()
    evaluation = planned["evaluate"].manifest
    metrics = cost_metrics(digits_run.store, evaluation)
    ids = ("dataset", "tokenizer", "token_map", "reference", "train", "generate", "evaluate")
    total = sum(planned[id].manifest.provenance["worker_seconds"] for id in ids)
    assert metrics["cost/total_worker_hours"] == _hours(total) and total > 0
    assert metrics["cost/training_worker_hours"] == _hours(planned["train"].manifest.provenance["worker_seconds"])


def test_the_guide_names_every_metric_of_cost(digits_run) -> None:
    """Names are fixed: dashboards are built on them."""
    evaluation = digits_run.planned()["evaluate"].manifest
    scores = {*SCORES, "judge_accuracy"}
    counted = {name for name in evaluation.metrics if re.sub(r"_(std|infinity|infinity_se|se)$", "", name) not in scores}
    hours = cost_metrics(digits_run.store, evaluation, Prices(device_hour=1.0))
    guide = (Path(pipelines.__file__).parent / "guide" / "evaluate.md").read_text()
    named = set(re.findall(r"`([\w/]+)`", guide))
    named |= {name.replace("_device_", "_worker_") for name in named if name.startswith("cost/")}
    assert len(counted) == 18 and not (counted | set(hours)) - named


def test_prices_are_checked_and_read_from_a_config() -> None:
    for values, sentence in (
        ({"device_hour": -1.0}, "device_hour is -1"),
        ({"worker_hour": math.inf}, "worker_hour is inf"),
        ({"device_hour": math.nan}, "device_hour is nan"),
        ({"device_hour": 1.0, "currency": "dollars"}, "currency is 'dollars'"),
        ({}, "neither device_hour nor worker_hour"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Prices(**values)  # type: ignore[arg-type]
    values = OmegaConf.create({"device_hour": 2, "currency": "EUR"})
    assert configuration.merge(Prices, [("a test", values)]) == Prices(device_hour=2.0, currency="EUR")
