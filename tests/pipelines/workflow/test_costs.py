"""What a result took: everything it was made from, once; what is not known is said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from summaries import summary_of

import pipelines
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.evaluation.protocol import SCORES
from pipelines.run import graph
from pipelines.storage.base import digest_of
from pipelines.storage.s3 import S3Folder
from pipelines.workflow import config as configuration
from pipelines.workflow import costs
from pipelines.workflow.costs import KINDS, LineageCost, Prices


def cost_metrics(store: ArtifactStore, manifest: Manifest, prices: Prices | None = None) -> dict[str, float]:
    return costs.cost_metrics(store, manifest, graph.stages(), prices)


def lineage_cost(store: ArtifactStore, manifest: Manifest) -> LineageCost:
    return costs.lineage_cost(store, manifest, graph.stages())


def _commit(
    store: ArtifactStore, stage: str, inputs: Mapping[str, Manifest], worker: float, device: float = 0.0, **summary: Any
) -> Manifest:
    key = digest_of([stage, worker, device])
    return store.commit(
        Manifest(
            stage=stage,
            key=key,
            stage_version=1,
            config={},
            inputs={name: {"stage": m.stage, "key": m.key, "digest": m.digest} for name, m in inputs.items()},
            files=(),
            summary=summary_of(stage, **summary) if stage in graph.stages() else {},
            provenance={"seconds": 1e6, "worker_seconds": worker, "device_seconds": device},
        )
    )


def _pipeline(store: ArtifactStore, *, is_imported: bool = False, is_reference_imported: bool = False) -> dict[str, Manifest]:
    """A whole pipeline whose stages took powers of two seconds, so that every sum tells what went into it."""
    made: dict[str, Manifest] = {}
    made["dataset"] = _commit(store, "dataset", {}, 1)
    made["tokenizer"] = _commit(store, "tokenizer", {"dataset": made["dataset"]}, 2, 1, is_imported=False)
    made["token_map"] = _commit(store, "token_map", {name: made[name] for name in ("dataset", "tokenizer")}, 4, 2)
    made["captions"] = _commit(store, "captions", {"dataset": made["dataset"]}, 8)
    learned_from = {name: made[name] for name in ("token_map", "captions", "tokenizer")}
    made["model"] = _commit(store, "train", {} if is_imported else learned_from, 16, 16, is_imported=is_imported)
    made["samples"] = _commit(store, "generate", {"model": made["model"]}, 32, 8)
    made["reference"] = _commit(store, "reference", {"dataset": made["dataset"]}, 64, is_imported=is_reference_imported)
    scored = {name: made[name] for name in ("samples", "tokenizer", "reference", "model", "dataset")}
    made["evaluation"] = _commit(store, "evaluate", scored, 128, 4)
    return made


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    folder: S3Folder = request.getfixturevalue("make_bucket")()
    return open_store(folder.uri, folder.config)


@pytest.fixture
def local(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


def _hours(seconds: float) -> Any:
    return pytest.approx(seconds / 3600)


def test_every_ancestor_counts_once_and_by_its_kind(store: ArtifactStore) -> None:
    """The dataset is reached over five ways, the tokenizer over three."""
    metrics = cost_metrics(store, _pipeline(store)["evaluation"])
    assert {name: metrics[f"cost/{name}_worker_hours"] for name in (*KINDS, "total")} == {
        "training": _hours(16),
        "tokenizing": _hours(1 + 2 + 4 + 8),
        "generation": _hours(32),
        "evaluation": _hours(64 + 128),
        "total": _hours(255),
    }
    assert {name: metrics[f"cost/{name}_device_hours"] for name in (*KINDS, "total")} == {
        "training": _hours(16),
        "tokenizing": _hours(3),
        "generation": _hours(8),
        "evaluation": _hours(4),
        "total": _hours(31),
    }
    assert metrics["cost/missing_artifacts"] == 0 == metrics["cost/imported_artifacts"]


def test_an_artifact_in_the_middle_costs_what_lies_before_it(local: ArtifactStore) -> None:
    metrics = cost_metrics(local, _pipeline(local)["model"])
    assert metrics["cost/total_worker_hours"] == _hours(1 + 2 + 4 + 8 + 16)
    assert metrics["cost/generation_worker_hours"] == 0 == metrics["cost/evaluation_device_hours"]


def test_there_is_money_only_where_there_are_prices(local: ArtifactStore) -> None:
    evaluation = _pipeline(local)["evaluation"]
    assert not [name for name in cost_metrics(local, evaluation) if "money" in name]
    priced = cost_metrics(local, evaluation, Prices(device_hour=3600.0, worker_hour=36.0))
    assert priced["cost/total_money"] == pytest.approx(31 * 1.0 + 255 * 0.01)


def test_imported_weights_cost_nothing_and_are_counted(local: ArtifactStore) -> None:
    """What the import took to run is not what training took."""
    evaluation = _pipeline(local, is_imported=True)["evaluation"]
    metrics, cost = cost_metrics(local, evaluation), lineage_cost(local, evaluation)
    assert metrics["cost/training_worker_hours"] == 0 == metrics["cost/training_device_hours"]
    assert metrics["cost/imported_artifacts"] == 1 and cost.imported == (f"train/{digest_of(['train', 16, 16])}",)
    assert metrics["cost/total_worker_hours"] == _hours(255 - 16 - 4 - 8), "what led to other weights is no part of it"


def test_what_was_computed_here_of_an_imported_reference_counts(local: ArtifactStore) -> None:
    """Its statistics came with a file, the features of its images did not."""
    evaluation = _pipeline(local, is_reference_imported=True)["evaluation"]
    metrics = cost_metrics(local, evaluation)
    assert metrics["cost/evaluation_worker_hours"] == _hours(64 + 128) and metrics["cost/imported_artifacts"] == 1
    assert metrics["cost/missing_artifacts"] == 0


def test_a_reconstruction_tells_what_it_took_with_all_before_it(local: ArtifactStore) -> None:
    made = _pipeline(local)
    inputs = {name: made[name] for name in ("token_map", "reference", "tokenizer", "dataset")}
    metrics = cost_metrics(local, _commit(local, "reconstruction", inputs, 256, 32))
    assert metrics["cost/evaluation_worker_hours"] == _hours(64 + 256) and metrics["cost/evaluation_device_hours"] == _hours(32)
    assert metrics["cost/total_worker_hours"] == _hours(1 + 2 + 4 + 64 + 256)


def test_what_was_removed_is_counted_as_missing(store: ArtifactStore) -> None:
    """The token map alone leads to no other artifact that is not reached otherwise; the captions do not either."""
    made = _pipeline(store)
    store.delete_manifest("token_map", made["token_map"].key)
    metrics, cost = cost_metrics(store, made["evaluation"]), lineage_cost(store, made["evaluation"])
    assert metrics["cost/missing_artifacts"] == 1 and cost.missing == (f"token_map/{made['token_map'].key}",)
    assert metrics["cost/total_worker_hours"] == _hours(255 - 4)


@pytest.mark.parametrize("damage", ["no JSON", "no seconds", "text", "negative", "NaN", "another summary"])
def test_a_manifest_that_does_not_say_what_it_took_is_counted_as_missing(local: ArtifactStore, damage: str) -> None:
    made = _pipeline(local)
    manifest = Path(local.place("token_map", made["token_map"].key)) / "manifest.json"
    fields = json.loads(manifest.read_text())
    if damage == "no seconds":
        del fields["provenance"]["worker_seconds"]
    elif damage == "another summary":
        fields["summary"] = {"rows": "many"}
    else:
        fields["provenance"]["worker_seconds"] = {"text": "much", "negative": -1.0, "NaN": math.nan}.get(damage)
    manifest.write_text("{" if damage == "no JSON" else json.dumps(fields))
    metrics = cost_metrics(local, made["evaluation"])
    assert metrics["cost/missing_artifacts"] == 1 and metrics["cost/total_worker_hours"] == _hours(255 - 4)


def test_the_artifact_itself_need_not_be_committed(local: ArtifactStore, tmp_path: Path) -> None:
    """A stage asks before its own manifest exists."""
    elsewhere = open_store(str(tmp_path / "elsewhere"))
    made = _pipeline(local)
    own = _commit(elsewhere, "evaluate", {"samples": made["samples"]}, 512)
    assert cost_metrics(local, own)["cost/evaluation_worker_hours"] == _hours(512)
    assert cost_metrics(local, own)["cost/missing_artifacts"] == 0


def test_a_stage_of_no_known_kind_is_in_the_total_and_named_apart(local: ArtifactStore) -> None:
    made = _pipeline(local)
    metrics = cost_metrics(local, _commit(local, "upscale", {"samples": made["samples"]}, 1024))
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
    counted = {name for name in evaluation.metrics if name.removesuffix("_std") not in scores}
    hours = cost_metrics(digits_run.store, evaluation, Prices(device_hour=1.0))
    guide = (Path(pipelines.__file__).parent / "guide" / "evaluate.md").read_text()
    named = set(re.findall(r"`([\w/]+)`", guide))
    named |= {name.replace("_device_", "_worker_") for name in named if name.startswith("cost/")}
    assert len(counted) == 18 and not (counted | set(hours)) - named


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"device_hour": -1.0}, "prices.device_hour is -1"),
        ({"worker_hour": math.inf}, "prices.worker_hour is inf"),
        ({"device_hour": math.nan}, "prices.device_hour is nan"),
        ({"device_hour": 1.0, "currency": "dollars"}, "prices.currency is 'dollars'"),
        ({}, "neither device_hour nor worker_hour"),
    ],
)
def test_prices_that_are_none_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Prices(**values)


def test_prices_can_be_given_in_a_config(make_prices: Callable[[dict[str, Any]], Prices]) -> None:
    assert make_prices({"device_hour": 2, "currency": "EUR"}) == Prices(device_hour=2.0, currency="EUR")


@pytest.fixture
def make_prices() -> Callable[[dict[str, Any]], Prices]:
    from omegaconf import OmegaConf

    return lambda values: configuration.merge(Prices, [("a test", OmegaConf.create(values))])
