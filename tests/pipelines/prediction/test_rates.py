"""Rates: earlier work of the same kind on the same hardware counts, the most similar first; else peaks of the hardware."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.capacity import Capacity
from pipelines.cluster.hardware import Machines, parse_cluster
from pipelines.cluster.resources import Workers
from pipelines.prediction import rates
from pipelines.prediction.rates import Rates, computed_rate, read_rates
from pipelines.workflow.work import Done, MeasuredWork, Work, busy_seconds, measured_work, read_prediction, to_provenance, to_tag
from services.mlflow_database import mlflow_database

HERE = Machines(capacity=Capacity(({"CPU": 2.0},)), cpu="Abacus", gpu=None, described="this machine")
WORK = Work(name="encoding", count=1000, macs=1e9, workers=Workers(cpus_per_worker=2))
MEASURED = MeasuredWork(
    stage="token_map",
    name="encoding",
    hardware="Abacus",
    cpus=2,
    count=1000,
    macs=1e9,
    precision="fp32",
    batch_size=1,
    seconds=20.0,
    num_workers=1,
    start_seconds=3.0,
)
GPU_WORK = replace(WORK, workers=Workers(gpus_per_worker=1), precision="bf16", macs=1e12)


def _rate(measured: list[MeasuredWork], work: Work = WORK, machines: Machines = HERE) -> rates.Rate:
    return Rates({"token_map": measured}).rate_of("token_map", work, machines)


# Measured ------------------------------------------------------------------------------------------------------------------


def test_the_same_work_takes_what_it_took() -> None:
    rate = _rate([MEASURED])
    assert (rate.seconds, rate.num_measured, rate.start_seconds) == (0.02, 1, 3.0)
    assert rate.factor == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        ({"macs": 2e9}, 0.04),  # in proportion to MACs
        ({"count": 10}, 0.02),
        ({"workers": Workers(cpus_per_worker=1)}, 0.04),  # half the CPUs
        ({"workers": Workers(num_workers=4, cpus_per_worker=2)}, 0.02),  # of one worker
    ],
)
def test_other_work_takes_its_share_and_is_less_certain(change: dict[str, Any], seconds: float) -> None:
    rate = _rate([MEASURED], replace(WORK, **change))
    assert rate.seconds == pytest.approx(seconds) and rate.factor > 1.15


def test_the_most_similar_work_decides() -> None:
    far, near = replace(MEASURED, macs=5e9, seconds=500.0), replace(MEASURED, macs=1.1e9, seconds=22.0)
    rate = _rate([far, near])
    assert rate.seconds == pytest.approx(0.02) and rate.num_measured == 1


def test_equal_work_is_the_median_of_the_newest_and_its_spread_is_the_range() -> None:
    newest_first = [replace(MEASURED, seconds=value) for value in (20.0, 22.0, 30.0, 21.0, 23.0, 9000.0)]
    rate = _rate(newest_first)
    assert (rate.seconds, rate.num_measured) == (0.022, 5)
    assert rate.factor == pytest.approx(30 / 22)


@pytest.mark.parametrize("change", [{"hardware": "Other"}, {"name": "decoding"}, {"macs": 1e13}, {"macs": 0.0}])
def test_what_is_not_comparable_does_not_count(change: dict[str, Any]) -> None:
    assert _rate([replace(MEASURED, **change)]).num_measured == 0


def test_measurements_of_a_gpu_count_by_its_short_name() -> None:
    measured = replace(MEASURED, hardware="NVIDIA H100 80GB HBM3", macs=1e12, precision="bf16")
    assert _rate([measured], GPU_WORK, parse_cluster("1x8xH100")).num_measured == 1
    assert _rate([measured], GPU_WORK, parse_cluster("1x8xH200")).num_measured == 0


def test_cpus_of_a_described_cluster_may_be_any() -> None:
    assert _rate([MEASURED], WORK, parse_cluster("2x16xCPU")).num_measured == 1


# Computed ------------------------------------------------------------------------------------------------------------------


def test_a_gpu_reaches_a_share_of_its_peak() -> None:
    seconds = computed_rate(GPU_WORK, parse_cluster("1x1xH200")).seconds
    assert 2e12 / 989e12 < seconds < 10e12 / 989e12


def test_small_models_are_bound_by_launches() -> None:
    tiny = replace(GPU_WORK, macs=1.0, num_blocks=2.0)
    assert computed_rate(tiny, parse_cluster("1x1xH200")).seconds == pytest.approx(2 * 0.3e-3)


def test_workers_exchange_gradients_faster_inside_a_node() -> None:
    def seconds(cluster: str, num_workers: int) -> float:
        work = replace(GPU_WORK, synced_bytes=1e6, workers=Workers(num_workers=num_workers, gpus_per_worker=1))
        return computed_rate(work, parse_cluster(cluster)).seconds - computed_rate(GPU_WORK, parse_cluster(cluster)).seconds

    assert seconds("1x8xH200", 1) == 0
    inside, between = seconds("1x8xH200", 8), seconds("8x8xH200", 64)
    # An all-reduce sends 2 (n - 1) / n of the bytes through each of n workers.
    assert inside == pytest.approx(2 * 7 * 1e6 / (450e9 * 0.7))
    assert between == pytest.approx(2 * 63 * 1e6 / (8 * 50e9 * 0.7))


def test_an_unknown_gpu_is_named() -> None:
    machines = Machines(capacity=Capacity(({"GPU": 1.0},)), cpu=None, gpu="Voodoo 2", described="")
    with pytest.raises(ValueError, match="the speed of Voodoo 2 is not known; give --cluster"):
        computed_rate(GPU_WORK, machines)


def test_this_machine_reaches_a_share_of_what_it_can_multiply() -> None:
    own = rates.cpu_peak()
    assert 1e9 < own < 1e13
    assert computed_rate(WORK, HERE).seconds == pytest.approx(2e9 / (own * 2 * 0.3))


# Kept with artifacts -------------------------------------------------------------------------------------------------------


def _manifest(provenance: dict[str, Any]) -> Manifest:
    return Manifest(
        stage="token_map",
        key="a" * 64,
        stage_version=1,
        config={},
        inputs={},
        files=(),
        provenance={"created": "2026"} | provenance,
    )


PROVENANCE = to_provenance([Done(WORK, 20.0, 1)], 23.0, {"cpu": "Abacus"}, {"value": 1.0, "low": 0.5, "high": 2.0})


def test_a_manifest_keeps_what_its_work_took(local_store: ArtifactStore) -> None:
    assert measured_work("token_map", json.loads(json.dumps(PROVENANCE))) == [MEASURED]
    assert read_prediction(PROVENANCE) == {"value": 1.0, "low": 0.5, "high": 2.0}
    local_store.commit(_manifest(PROVENANCE))
    rate = read_rates(local_store, ["token_map", "train"]).rate_of("token_map", WORK, HERE)
    assert (rate.seconds, rate.num_measured) == (0.02, 1)


@pytest.mark.parametrize(
    "work",
    [
        None,
        "text",
        [1],
        [{**PROVENANCE["work"][0], "count": 0}],
        [{**PROVENANCE["work"][0], "seconds": "many"}],
        [{**PROVENANCE["work"][0], "hardware": 7}],
        [{**PROVENANCE["work"][0], "more": 1}],
    ],
)
def test_what_others_wrote_wrongly_is_left_out(work: Any, local_store: ArtifactStore) -> None:
    provenance = {**PROVENANCE, "work": work, "predicted_seconds": work}
    assert measured_work("token_map", provenance) == [] and read_prediction(provenance) is None
    local_store.commit(_manifest(provenance))
    assert read_rates(local_store, ["token_map"]).rate_of("token_map", WORK, HERE).num_measured == 0


def test_a_sample_of_many_artifacts_is_read(local_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        local_store.commit(replace(_manifest(PROVENANCE), key=f"{number:064x}"))
    read: list[str] = []
    own = local_store.read_manifest
    monkeypatch.setattr(local_store, "read_manifest", lambda stage, key: read.append(key) or own(stage, key))
    assert read_rates(local_store, ["token_map"]).rate_of("token_map", WORK, HERE).num_measured == 5
    assert 30 <= len(read) <= 48 and max(read) > f"{190:064x}"


def test_tracked_runs_count_where_the_store_has_nothing(local_store: ArtifactStore, tmp_path: Any) -> None:
    from pipelines.tracking import run as tracking

    uri = mlflow_database(tmp_path)
    tag = to_tag(_manifest(PROVENANCE))
    assert tag is not None
    started = tracking.start_run(uri, tracking.TrackingConfig(), "token_map", {"enat.stage": "token_map", "enat.work": tag})
    started.finish()
    rate = read_rates(local_store, ["token_map"], uri).rate_of("token_map", WORK, HERE)
    assert (rate.seconds, rate.num_measured) == (0.02, 1)
    missing = f"sqlite:///{tmp_path / 'none.db'}"
    assert read_rates(local_store, ["token_map"], missing).rate_of("token_map", WORK, HERE).num_measured == 0


def test_work_beside_other_work_takes_no_time_of_its_own() -> None:
    assert busy_seconds([(5.0, False), (3.0, True), (2.0, False), (4.0, True)]) == 5.0 + 4.0
