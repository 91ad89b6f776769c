"""Registered models are evaluated again when they are due, and drift is reported. With real MLflow, Ray and stages."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_lab import CARD_SAMPLER, LONG_AGO, NAME, Lab, Light, replace_stage

from pipelines.cli.reevaluate import reevaluate as command
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.reevaluation import plan as reevaluation_plan
from pipelines.reevaluation import report
from pipelines.reevaluation.reevaluate import LEASE, Outcome, exit_code
from pipelines.registry import evaluation_record, model_card
from pipelines.registry.evaluation_record import EvaluationRecord
from pipelines.stages import evaluate, generate
from pipelines.tracking import run as tracking
from pipelines.tracking import search
from pipelines.tracking.run import TrackingConfig
from pipelines.workflow import driver
from pipelines.workflow import provenance as workflow_provenance
from pipelines.workflow.model_runs import LINK
from pipelines.workflow.stage import Node, PublishContext

# Evaluating ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_registered_model_without_an_evaluation_is_evaluated(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    assert (outcome.verdict, outcome.note, outcome.num_computed) == ("evaluated", "never evaluated", 4), outcome.note
    assert outcome.worker_seconds > 0 and outcome.was == {}
    manifest = lab.store.read_manifest(*outcome.evaluation.split("/"))
    assert manifest.inputs["model"]["key"] == "1" * 64 and manifest.summary["num_samples"] == 16
    assert outcome.now == {name: value for name, value in manifest.metrics.items() if name in evaluation_protocol.SCORES}
    assert outcome.now["frechet_distance"] > 0
    assert {path.name for path in (lab.root / "store" / "train").iterdir()} == {"1" * 64}, "nothing is trained"
    # A run with the same config finds the samples by their key.
    run = lab.request().config
    node = Node("generate", generate.STAGE, replace(run.generate, seed=0, dataset=run.dataset), {"model": "train"})
    assert manifest.inputs["samples"]["key"] == driver.stage_key(node, {"model": lab.store.read_manifest("train", "1" * 64)})


@pytest.mark.slow
def test_evaluation_is_recorded_in_tags_and_tracked(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    tags = lab.tags()
    recorded = EvaluationRecord.of(tags)
    assert recorded.scores == outcome.now and recorded.evaluation == outcome.evaluation and recorded.node == "evaluate"
    assert abs(datetime.now(UTC) - recorded.evaluated) < timedelta(minutes=5)
    manifest = lab.store.read_manifest(*outcome.evaluation.split("/"))
    assert tags["enat.protocol_digest"] == manifest.summary["protocol_digest"]
    assert tags["enat.artifact"] == "train/" + "1" * 64 and LEASE not in tags and "enat.drift" not in tags
    (run,) = lab.stage_runs("evaluate")
    assert run.info.status == "FINISHED" and run.data.metrics["frechet_distance"] == outcome.now["frechet_distance"]
    assert run.data.tags["enat.model_version"] == "1" and "enat.protocol" in run.data.tags
    parent = lab.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == f"{NAME}-v1"
    assert lab.client.get_run(parent.data.tags["mlflow.parentRunId"]).info.run_name == "reevaluate"


@pytest.mark.slow
def test_reused_stages_are_linked_to_the_runs_that_made_them(lab: Lab, light: Light) -> None:
    made = {name: [run.info.run_id for run in lab.stage_runs(name)] for name in ("generate", "reference", "dataset")}
    assert all(len(runs) == 1 for runs in made.values())
    lab.tag(evaluated=LONG_AGO)
    outcome = lab.one(with_config=True, older_than=30 * 86400.0)
    assert outcome.verdict == "evaluated"
    run = lab.search(f"attributes.run_name = '{NAME}-v1'", order_by=["attributes.start_time DESC"])[0]
    links = {name.removeprefix(LINK): id for name, id in run.data.tags.items() if name.startswith(LINK)}
    assert links and links.items() <= {name: id for name, (id, *_) in made.items()}.items()
    assert {name: [each.info.run_id for each in lab.stage_runs(name)] for name in links} == {name: made[name] for name in links}


@pytest.mark.slow
def test_a_fresh_evaluation_is_not_repeated(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tags = lab.files(), lab.tags()
    for with_config in (True, False):
        outcome = lab.one(with_config=with_config)
        assert outcome.verdict == "fresh" and exit_code([outcome]) == 0
    monkeypatch.setattr(DatasetConfig, "identity", None)  # which would list the files of the dataset
    assert lab.one(with_config=False).verdict == "fresh"
    assert lab.files() == before and lab.tags() == tags


@pytest.mark.slow
def test_an_old_evaluation_is_measured_again_and_compared(lab: Lab, light: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    state = workflow_provenance.CodeState(version="1.0", commit="a" * 40, diff_digest=None, digest="c" * 64)
    monkeypatch.setattr(workflow_provenance, "read_state", lambda: state)  # as in a job
    monkeypatch.setattr(workflow_provenance, "code_version", lambda: state.label)
    lab.tag(evaluated=LONG_AGO)
    recorded = EvaluationRecord.of(lab.tags())
    assert lab.one(with_config=False).verdict == "fresh", "no limit is given"
    outcome = lab.one(with_config=False, older_than=30 * 86400.0)
    assert (outcome.verdict, outcome.num_computed, light.num_runs) == ("evaluated", 2, 1), outcome.note
    assert "computed again, nothing moved" in outcome.note and outcome.was == outcome.now == recorded.scores
    found = EvaluationRecord.of(lab.tags())
    assert found == replace(recorded, evaluated=found.evaluated) and datetime.now(UTC) - found.evaluated < timedelta(minutes=5)
    assert lab.one(with_config=False, older_than=30 * 86400.0).verdict == "fresh" and light.num_runs == 1
    (run,) = lab.search("run_name = 'reevaluate'", max_results=1)
    assert state.tags.items() <= run.data.tags.items()


@pytest.mark.slow
def test_a_check_with_other_scores_is_drift(lab: Lab, light: Light) -> None:
    lab.tag(evaluated=LONG_AGO)
    recorded = EvaluationRecord.of(lab.tags())
    light.now["frechet_distance"] *= 1.1
    outcome = lab.one(with_config=False, older_than=86400.0)
    assert (outcome.verdict, exit_code([outcome])) == ("drift", 3) and "(+10 %)" in outcome.note
    found = EvaluationRecord.of(lab.tags())
    assert found.drift == outcome.note and found.scores == recorded.scores, "the recorded scores do not change"


@pytest.mark.slow
def test_a_reused_evaluation_keeps_its_age(lab: Lab, light: Light) -> None:
    stage, key = EvaluationRecord.of(lab.tags()).evaluation.split("/")
    manifest = lab.store.read_manifest(stage, key)
    lab.store.delete_manifest(stage, key)
    lab.store.commit(replace(manifest, provenance={**manifest.provenance, "created": LONG_AGO}))
    version = search.read_version(lab.uri, NAME, "1")
    search.tag_version(lab.uri, version, {name: None for name in version.tags if name.startswith("enat.eval")})
    outcome = lab.one()
    assert (outcome.verdict, outcome.num_computed, light.num_runs) == ("evaluated", 0, 0)
    assert outcome.note == "never evaluated; everything was reused"
    assert EvaluationRecord.of(lab.tags()).evaluated.isoformat() == LONG_AGO
    assert lab.one(older_than=86400.0, is_dry_run=True).verdict == "due"


@pytest.mark.slow
def test_a_name_that_was_corrected_since_stays(lab: Lab) -> None:
    (run,) = lab.stage_runs("evaluate")
    lab.client.set_tag(run.info.run_id, "enat.reference", "photographs of birds")
    version = search.read_version(lab.uri, NAME, "1")
    search.tag_version(lab.uri, version, {name: None for name in version.tags if name.startswith("enat.eval")})
    outcome = lab.one()
    assert (outcome.verdict, outcome.num_computed) == ("evaluated", 0), outcome.note
    assert lab.client.get_run(run.info.run_id).data.tags["enat.reference"] == "photographs of birds"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "moves", "verdict"),
    [
        ((), 1.1, "drift"),
        (("generate.sampler.num_steps=5",), 1.1, "evaluated"),
        (("generate.num_samples=24",), 1.1, "evaluated"),
    ],
)
def test_recorded_scores_are_compared_if_their_artifact_is_gone(
    lab: Lab, light: Light, overrides: tuple[str, ...], moves: float, verdict: str
) -> None:
    recorded = EvaluationRecord.of(lab.tags())
    lab.store.delete_manifest(*recorded.evaluation.split("/"))
    light.now["frechet_distance"] *= moves
    outcome = lab.one(*overrides)
    assert outcome.verdict == verdict and outcome.was == recorded.scores
    assert outcome.note.startswith("frechet_distance" if verdict == "drift" else "its evaluation is gone from the store")
    assert ("not comparable" in outcome.note) == bool(overrides)
    assert ("enat.drift" in lab.tags()) == (verdict == "drift")


@pytest.mark.slow
def test_looking_at_a_fresh_evaluation_counts_as_use_of_it(lab: Lab) -> None:
    stage, _, key = EvaluationRecord.of(lab.tags()).evaluation.partition("/")
    note = lab.root / "store" / stage / key / ".used"
    os.utime(note, (0, 0))
    lab.one(with_config=False, is_dry_run=True)
    assert note.stat().st_mtime == 0
    lab.one(with_config=False)
    assert time.time() - note.stat().st_mtime < 300
    assert (("train", "1" * 64)) in lab.store.recorded_inputs(stage, key)


# What is due ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluation_with_other_settings_is_due(evaluated: tuple[Lab, Outcome]) -> None:
    execution = ("generate.execution.worker_batch_size=3", "evaluate.execution.num_workers=2", "generate.execution.num_workers=2")
    for with_config in (True, False):
        for override, reason in (
            ("generate.num_samples=24", "generate.num_samples is 24, was 16"),
            ("generate.sampler.num_steps=5", "generate.sampler.num_steps is 5, was 3"),
            ("evaluate.settings.num_splits=2", "evaluate.settings.num_splits is 2, was 10"),
            ("reference.num_epochs=2", "another reference"),
        ):
            outcome = evaluated[0].one(override, with_config=with_config, is_dry_run=True)
            assert (outcome.verdict, outcome.note) == ("due", reason) and outcome.was["frechet_distance"] > 0
        assert evaluated[0].one(*execution, with_config=with_config, is_dry_run=True).verdict == "fresh"


def test_a_dry_run_writes_nothing(registered: Lab) -> None:
    before, tags = registered.files(), registered.tags()
    outcome = registered.one(is_dry_run=True)
    assert (outcome.verdict, outcome.note) == ("due", "never evaluated")
    assert registered.files() == before and registered.tags() == tags
    assert not registered.stage_runs("evaluate")


@pytest.mark.faults
def test_first_evaluation_without_a_config_uses_the_card_and_the_dataset(registered: Lab) -> None:
    request = registered.request("generate.num_samples=30", with_config=False)
    version = search.read_version(registered.uri, NAME, "1")
    model = reevaluation_plan.open_model(version, request.config)
    plan = reevaluation_plan.make_plan(model, None, request)
    by_id = {node.id: node for node in plan.nodes}
    assert sorted(node.id for node in plan.nodes[:-1]) == ["dataset", "generate", "reference"] and plan.nodes[-1].id == "evaluate"
    assert by_id["generate"].config.sampler == CARD_SAMPLER and by_id["generate"].config.num_samples == 30
    assert by_id["dataset"].config.name == "photographs" and by_id["reference"].config.resolution == 16


def test_imported_weights_need_a_config(registered: Lab) -> None:
    request = registered.request(with_config=False)
    model = reevaluation_plan.open_model(search.read_version(registered.uri, NAME, "1"), request.config)
    inputs = {"tokenizer": model.manifest.inputs["tokenizer"]}
    with pytest.raises(ValueError, match="trained on is not known here; give a CONFIG"):
        reevaluation_plan.make_plan(replace(model, manifest=replace(model.manifest, inputs=inputs)), None, request)


@pytest.mark.faults
def test_a_lost_evaluation_is_computed_again_only_with_a_config(lab: Lab) -> None:
    lab.store.delete_manifest(*EvaluationRecord.of(lab.tags()).evaluation.split("/"))
    outcome = lab.one(with_config=False)
    assert outcome.verdict == "failed" and "give a CONFIG" in outcome.note and exit_code([outcome]) == 1
    outcome = lab.one(is_dry_run=True)
    assert (outcome.verdict, outcome.note) == ("due", "its evaluation is gone from the store")


@pytest.mark.slow
def test_an_evaluation_in_another_number_format_is_as_good_as_any(lab: Lab) -> None:
    assert lab.one("evaluate.precision=bf16").num_computed == 1
    assert [lab.one("evaluate.precision=bf16").verdict, lab.one(with_config=False).verdict] == ["fresh", "fresh"]


@pytest.mark.faults
def test_scores_of_another_metric_version_are_computed_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = EvaluationRecord.of(lab.tags())
    monkeypatch.setattr(evaluation_protocol, "METRIC_VERSION", 99)
    # The stage writes its protocol in the driver, so that it sees the same version.
    outcome = lab.one(with_config=False)
    assert (outcome.verdict, outcome.num_computed, outcome.moved) == ("evaluated", 1, ())
    assert "another metric version" in outcome.note and "not comparable" in outcome.note
    after = EvaluationRecord.of(lab.tags())
    assert after.evaluation != before.evaluation
    manifest = lab.store.read_manifest(*after.evaluation.split("/"))
    assert manifest.summary["protocol"]["metric_version"] == "99"
    assert lab.one(with_config=False).verdict == "fresh"


# Checks and drift ----------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("options", [{"is_fresh": True}, {"older_than": 86400.0}])
def test_a_check_finds_the_same_scores_and_overwrites_nothing(lab: Lab, options: dict[str, Any]) -> None:
    before, recorded = lab.files(), EvaluationRecord.of(lab.tags())
    lab.tag(drift="fid 1 -> 2", evaluated=LONG_AGO)
    outcome = lab.one(with_config=False, **options)
    assert (outcome.verdict, outcome.num_computed, outcome.moved) == ("evaluated", 2, ()), outcome.note
    assert outcome.now == outcome.was == recorded.scores, "the same bits"
    after = lab.files()
    assert {path: after[path] for path in before} == before
    assert {Path(path).parts[1] for path in after.keys() - before.keys()} == {"fresh-generate", "fresh-evaluate"}
    found = EvaluationRecord.of(lab.tags())
    assert found.evaluation == recorded.evaluation and found.drift is None and found.evaluated.year > 2025
    assert lab.stage_runs("fresh-evaluate")[0].data.tags["enat.is_check"] == "true"


@pytest.mark.faults
def test_a_changed_result_is_drift(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another version of stage evaluate, whose distance of the same samples is larger."""

    def run(config: Any, inputs: Any, context: Any) -> Any:
        result = evaluate.run(config, inputs, context)
        return replace(result, metrics={**result.metrics, "frechet_distance": 1.1 * result.metrics["frechet_distance"]})

    replace_stage(monkeypatch, "evaluate", version=1000, run=run)
    recorded = EvaluationRecord.of(lab.tags())
    outcome = lab.one(with_config=False)
    assert (outcome.verdict, exit_code([outcome])) == ("drift", 3), outcome.note
    assert outcome.was == recorded.scores != outcome.now
    assert [moved.metric for moved in outcome.moved] == ["frechet_distance"]
    tags = lab.tags()
    assert tags["enat.drift"] == outcome.note and tags["enat.evaluation"] == outcome.evaluation != recorded.evaluation
    assert lab.stage_runs("evaluate")[0].data.tags["enat.drift"] == outcome.note
    again = lab.one(with_config=False)
    assert again.verdict == "fresh" and outcome.note in again.note, "the drift stays recorded until a measurement finds none"
    check = lab.one(with_config=False, older_than=0.0)
    assert check.verdict == "evaluated" and check.was == check.now == outcome.now, "the new scores are the reference now"
    assert "enat.drift" not in lab.tags()
    text = report.to_json([outcome])
    assert text["exit_code"] == 3 and json.loads(json.dumps(text, allow_nan=False)) == text
    assert text["models"][0]["drift"]["frechet_distance"]["tolerance"] == 0.01


# What a run writes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Record an evaluation as stage evaluate publishes it."""
    monkeypatch.setattr(model_card, "registered_name", lambda manifest, title=None: NAME)
    store = lab.store
    manifest = store.read_manifest(*EvaluationRecord.of(lab.tags()).evaluation.split("/"))
    inputs = {name: store.read_manifest(source["stage"], source["key"]) for name, source in manifest.inputs.items()}

    def publish(node: str = "evaluate", key: str | None = None, created: str = LONG_AGO, **metrics: float) -> None:
        made = {**manifest.provenance, "created": created}
        changed = replace(manifest, key=key or manifest.key, provenance=made, metrics=metrics or manifest.metrics)
        run = tracking.start_run(lab.uri, TrackingConfig(), node, {})
        context = PublishContext(store=store, run=run, tracking=TrackingConfig(), node=node)
        evaluation_record.record(changed, inputs, context, evaluation_protocol.SCORES)
        evaluation_record.record(
            changed, {**inputs, "model": replace(inputs["model"], files=())}, context, evaluation_protocol.SCORES
        )

    return publish


@pytest.mark.slow
def test_a_run_records_its_evaluation_but_not_one_that_it_reuses(lab: Lab, publish: Callable[..., None]) -> None:
    before = EvaluationRecord.of(lab.tags())
    publish()
    assert EvaluationRecord.of(lab.tags()) == before, "the record is newer than the evaluation"
    publish(key="8" * 64, created="2026-02-03T04:05:06+00:00", fid=3.25, images_per_second=4.0)
    after = EvaluationRecord.of(lab.tags())
    assert after.evaluation == "evaluate/" + "8" * 64 and after.scores == {"fid": 3.25}, "scores of the earlier one are gone"
    assert after.evaluated == datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.mark.slow
def test_a_variant_does_not_replace_the_evaluation_of_the_run_itself(lab: Lab, publish: Callable[..., None]) -> None:
    before = lab.tags()
    publish("evaluate@few-steps", key="8" * 64, fid=1.0)
    assert lab.tags() == before
    lab.tag(evaluation_node="evaluate@few-steps")
    publish("evaluate@few-steps", key="8" * 64, fid=1.0)
    assert EvaluationRecord.of(lab.tags()).scores == {"fid": 1.0}
    publish("evaluate@other", key="7" * 64, fid=2.0)
    assert EvaluationRecord.of(lab.tags()).scores == {"fid": 1.0}
    publish("evaluate", key="6" * 64, fid=3.0)
    assert EvaluationRecord.of(lab.tags()).scores == {"fid": 3.0}


def test_foreign_tags_are_not_a_record() -> None:
    assert (
        EvaluationRecord.of({}) is None
        and EvaluationRecord.of({"enat.evaluated": "yesterday", "enat.evaluation": "evaluate/1"}) is None
    )
    assert EvaluationRecord.of({"enat.evaluated": LONG_AGO}) is None


# The command ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_answers_as_json_or_as_a_table(evaluated: tuple[Lab, Outcome]) -> None:
    lab, outcome = evaluated
    result = CliRunner().invoke(command, [str(lab.config), "--dry-run", "--json", *lab.arguments()], catch_exceptions=False)
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["counts"] == {"fresh": 1}
    (model,) = answer["models"]
    assert (model["model"], model["version"], model["evaluation"]) == (NAME, "1", outcome.evaluation)
    assert model["was"] == outcome.now
    result = CliRunner().invoke(command, ["--dry-run", "--older-than", "0s", *lab.arguments()], catch_exceptions=False)
    assert f"{outcome.now['frechet_distance']:.5g}" in result.stdout and "due: " in result.stdout
    assert result.exit_code == 0


def test_bad_input_is_refused_in_one_sentence() -> None:
    for arguments, sentence in (
        (["a.yaml", "b.yaml"], "give one CONFIG, not a.yaml and b.yaml"),
        (["--older-than", "long"], "'long' is not an age"),
        (["--tolerance", "fid=much"], "--tolerance fid=much is not a number"),
        (["generate.num_sample=3"], "did you mean generate.num_samples?"),
        (["no-such.yaml"], "the config file no-such.yaml does not exist"),
        (["workspace=/nowhere"], "no runs are tracked at sqlite:////nowhere/mlflow.db"),
    ):
        result = CliRunner().invoke(command, ["--dry-run", *arguments])
        assert sentence in (result.stderr + str(result.exception))
        assert isinstance(result.exception, ValueError | SystemExit)


def test_exit_code_of_a_failure_wins_over_drift(registered: Lab) -> None:
    version = search.read_version(registered.uri, NAME, "1")
    outcomes = {name: Outcome(version=version, verdict=name) for name in ("fresh", "due", "busy", "evaluated", "drift", "failed")}
    assert exit_code([outcomes[name] for name in ("fresh", "due", "busy", "evaluated")]) == 0
    assert exit_code([outcomes["drift"], outcomes["evaluated"]]) == 3
    assert exit_code(list(outcomes.values())) == 1
