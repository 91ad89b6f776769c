"""Predictions of stages and of whole runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.hardware import parse_cluster
from pipelines.cluster.resources import Workers
from pipelines.prediction import show
from pipelines.prediction.predict import Prediction, predict
from pipelines.prediction.rates import Rates
from pipelines.run import prediction as run_prediction
from pipelines.run.loading import load_run
from pipelines.workflow.stage import Node, PlannedStage, Stage, StageResult
from pipelines.workflow.summary import Summary
from pipelines.workflow.work import Foreseen, Prices, UnforeseeableError, Work

CONFIGS = Path(__file__).parents[3] / "configs"
_START = 5.0  # seconds of a stage with workers that was never measured


@dataclass(frozen=True, kw_only=True)
class WaitConfig:
    """execution: of so many workers.   seconds: of all work, on one CPU."""

    seconds: float = 60.0
    num_parts: int = 0
    execution: Workers = field(default_factory=Workers)


def _never(*arguments: Any) -> StageResult:
    raise AssertionError("a prediction runs nothing")


def _wait(config: WaitConfig, inputs: Mapping[str, Any]) -> Foreseen:
    work = Work(name="waiting", count=1, cpu_seconds=config.seconds, workers=config.execution)
    return Foreseen(summary=Summary(), work=[work], size=10.0, num_parts=config.num_parts)


STAGE = Stage("wait", 1, _never, foresee=_wait)


def _node(id: str, reads: Sequence[str] = (), stage: Stage = STAGE, **config: Any) -> Node:
    return Node(id, stage, WaitConfig(**config), {name: name for name in reads})


def _predict(nodes: Sequence[Node], cluster: str = "1x2xCPU", *, parts_done: int = 0, **options: Any) -> Prediction:
    planned = [PlannedStage(node, None, None, parts_done) for node in nodes]
    return predict(planned, Rates({}), parse_cluster(cluster), **options)


def test_workers_share_work() -> None:
    one = _predict([_node("a")]).stages["a"].seconds
    assert one.value == _START + 60 and one.low < one.value < one.high
    two = _predict([_node("a", execution=Workers(num_workers=2))])
    assert two.stages["a"].seconds.value == _START + 30
    assert two.worker_hours.value == pytest.approx(2 * (_START + 30) / 3600)
    assert two.device_hours.value == 0 and two.size == 10.0


def test_an_upper_bound_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    def most(config: WaitConfig, inputs: Mapping[str, Any]) -> Foreseen:
        return Foreseen(work=[replace(_wait(config, inputs).work[0], is_most=True)])

    predicted = _predict([_node("a", stage=Stage("most", 1, _never, foresee=most)), _node("b")])
    assert {node: stage.is_most for node, stage in predicted.stages.items()} == {"a": True, "b": False}
    show.show_total(predicted, Console(width=200))
    assert "! a: an upper bound, because sampler.entropy_bound chooses the passes of each image\n" in capsys.readouterr().out
    assert [show.stage_to_json(stage)["is_upper_bound"] for stage in predicted.stages.values()] == [True, False]


def test_all_workers_are_as_many_as_have_room() -> None:
    assert _predict([_node("a", execution=Workers(num_workers="all"))], "3x2xCPU").stages["a"].seconds.value == _START + 10


def test_parts_that_are_done_are_not_counted_again() -> None:
    assert _predict([_node("a", num_parts=4)], parts_done=3).stages["a"].seconds.value == _START + 15


def test_money_is_that_of_workers_and_devices() -> None:
    prices = Prices(worker_hour=1.0, currency="EUR")
    predicted = _predict([_node("a")], prices=prices)
    assert predicted.money is not None and predicted.money.value == pytest.approx(65 / 3600) and predicted.currency == "EUR"


# The whole run -------------------------------------------------------------------------------------------------------------


def test_stages_side_by_side_take_the_longest_path() -> None:
    nodes = [_node("a"), _node("b", seconds=10), _node("c", ["a"], seconds=20), _node("d", ["b"], seconds=30)]
    predicted = _predict(nodes)
    assert predicted.seconds.value == 65 + 25 and predicted.critical == ("a", "c")
    assert _predict(nodes, num_jobs=1).seconds.value == 65 + 15 + 25 + 35
    assert _predict(nodes, "1x1xCPU").seconds.value == 65 + 15 + 25 + 35, "one CPU has room for one of them"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_run_takes_at_least_its_longest_chain_and_at_most_all_stages(data: st.DataObject) -> None:
    nodes: list[Node] = []
    for number in range(data.draw(st.integers(1, 8))):
        reads = data.draw(st.sets(st.sampled_from([node.id for node in nodes]))) if nodes else set()
        nodes.append(_node(str(number), sorted(reads), seconds=data.draw(st.integers(1, 50))))
    predicted = _predict(nodes, f"1x{data.draw(st.integers(1, 4))}xCPU")
    ends: dict[str, float] = {}
    for node in nodes:
        start = max((ends[id] for id in node.inputs.values()), default=0.0)
        ends[node.id] = start + predicted.stages[node.id].seconds.value
    total = sum(stage.seconds.value for stage in predicted.stages.values())
    assert max(ends.values()) - 1e-9 <= predicted.seconds.value <= total + 1e-9
    on_path = sum(predicted.stages[id].seconds.value for id in predicted.critical)
    assert on_path == pytest.approx(predicted.seconds.value), "the critical path has no gaps"


# What is not known ---------------------------------------------------------------------------------------------------------


def _unknown(config: WaitConfig, inputs: Mapping[str, Any]) -> Foreseen:
    raise UnforeseeableError("nobody knows")


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (Stage("odd", 1, _never, foresee=_unknown), "nobody knows"),
        (Stage("odd", 1, _never), "stage odd does not state its work"),
    ],
)
def test_what_is_not_known_is_said_and_so_is_what_depends_on_it(stage: Stage, problem: str) -> None:
    predicted = _predict([_node("a", stage=stage), _node("b", ["a"]), _node("c", seconds=10)])
    problems = {id: found.problem for id, found in predicted.stages.items()}
    assert problems == {"a": problem, "b": "depends on a, which is not known yet", "c": None}
    assert not predicted.is_complete and predicted.seconds.value == 15


def test_an_artifact_that_cannot_be_read_is_not_known() -> None:
    made = Manifest(stage="wait", key="a" * 64, stage_version=1, config={}, inputs={}, files=(), summary={"summary_version": 99})
    planned = [PlannedStage(_node("a"), made.key, made), PlannedStage(_node("b", ["a"]), None, None)]
    predicted = predict(planned, Rates({}), parse_cluster("1x2xCPU"))
    assert predicted.stages["b"].problem == "depends on a, which is not known yet"


def test_stages_without_room_are_not_predicted() -> None:
    predicted = _predict([_node("a", execution=Workers(num_workers=3))])
    assert predicted.stages["a"].problem == "needs 3 workers, and 1 node with 2 CPUs has room for 2"


# The stages of the pipeline ------------------------------------------------------------------------------------------------


def _of_config(name: str, cluster: str, *overrides: str, images: int = 1_281_167, captions: int | None = None) -> Prediction:
    run = load_run(CONFIGS / name, overrides, is_dataset_here=False)
    planned = run_prediction.unread_plan(run)
    foreseen_by = run_prediction.foreseen_by(images, None, captions)
    return predict(planned, Rates({}), parse_cluster(cluster), foreseen_by=foreseen_by)


@pytest.mark.parametrize(
    "name", ["imagenet256.yaml", "imagenet512.yaml", "imagenet256-sizes.yaml", "imagenet256-ablations.yaml", "coco256.yaml"]
)
def test_every_stage_of_the_gpu_configs_can_be_foreseen_without_data(name: str) -> None:
    predicted = _of_config(name, "1x8xH200")
    assert predicted.is_complete, {id: stage.problem for id, stage in predicted.stages.items() if stage.problem}
    assert all(stage.seconds.value > 0 for stage in predicted.stages.values())


def test_training_takes_most_of_a_run_and_grows_with_the_model() -> None:
    hours = []
    for preset in ("enat-s", "enat-b", "enat-l", "enat-xl"):
        predicted = _of_config("imagenet256.yaml", "1x8xH200", f"train.model.preset={preset}")
        assert predicted.stages["train"].seconds.value > 0.8 * predicted.seconds.value
        hours.append(predicted.stages["train"].seconds.value / 3600)
    assert hours == sorted(hours) and hours[0] > 1 and hours[-1] < 48


def test_the_token_map_of_imagenet_is_smaller_than_its_config_says() -> None:
    """The config says: less than 0.9 GB."""
    assert 0.7e9 < _of_config("imagenet256.yaml", "1x8xH200").stages["token_map"].size < 0.9e9


def test_captions_are_counted() -> None:
    predicted = _of_config("coco256.yaml", "1x8xH200", images=82_783, captions=414_113)
    assert predicted.stages["captions"].size == pytest.approx(49e9, rel=0.01)  # as the config says


def test_no_stage_of_the_pipeline_is_left_out(all_stages: Mapping[str, Stage]) -> None:
    assert [name for name, stage in all_stages.items() if stage.foresee is None] == ["images"]


@pytest.fixture
def all_stages() -> Mapping[str, Stage]:
    from pipelines.run import graph

    return graph.stages()
