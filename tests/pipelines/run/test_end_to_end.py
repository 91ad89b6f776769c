"""The demonstration with few steps, through the command line: everything is made, then reused, and survives being killed."""

from __future__ import annotations

import io
import ipaddress
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf
from PIL import Image

from pipelines.artifacts.open import open_store
from pipelines.data.token_map import TokenMap

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"
STAGES = ["dataset", "tokenizer", "token_map", "reference", "audit", "train", "generate", "memorization", "evaluate"]
STAGES += ["train@untrained", "generate@untrained", "memorization@untrained", "evaluate@untrained", "report"]


# The whole run -------------------------------------------------------------------------------------------------------------


def test_run_succeeds_and_prints_only_its_own_lines(digits_run) -> None:
    assert digits_run.process.returncode == 0, digits_run.process.stderr
    assert digits_run.process.stderr == ""
    lines = digits_run.process.stdout.splitlines()
    made = [re.fullmatch(r"✓ (\S+) +[0-9a-f]{12}  made in [0-9.]+ s", line) for line in lines[: len(STAGES)]]
    assert [match and match[1] for match in made] == STAGES
    rest = "\n".join(lines[len(STAGES) :])
    assert not re.search(r"\x1b|INFO|WARN|ERROR|Traceback|pid=|(?i:deprecat|deepspeed|raylet)", rest)
    for expected in ("What was made", "frechet_distance", "14 stages, 0 reused", f"report    {digits_run.workspace}/digits.html"):
        assert expected in rest


def test_every_stage_commits_the_files_of_its_manifest(digits_run) -> None:
    planned = digits_run.planned()
    assert list(planned) == STAGES and all(item.is_reused for item in planned.values())
    store = digits_run.store
    for manifest in store.manifests():
        for record in (*manifest.files, *manifest.records):
            store.fetch(manifest, record.name)
        folder = Path(store.place(manifest.stage, manifest.key))
        files = {record.path for record in (*manifest.files, *manifest.records)}
        assert {path.name for path in folder.iterdir()} == files | {"manifest.json", ".used"}, "no temporary files"
    assert len(list(store.manifests())) == len(STAGES)


def test_artifacts_describe_the_digits(digits_run) -> None:
    manifests = {id: item.manifest for id, item in digits_run.planned().items()}
    assert manifests["token_map"].summary["rows"] == 1797 and manifests["token_map"].summary["quarantined"] == 0
    assert manifests["reference"].metrics["images"] == 1797 and manifests["reference"].metrics["held_out_accuracy"] > 0.5
    assert manifests["train"].metrics["final/step"] == 20
    assert manifests["evaluate"].summary["num_samples"] == 40 and manifests["evaluate"].summary["num_reference"] == 1797
    assert manifests["evaluate"].metrics["judge_accuracy"] > 0.95, "the judge reads real digits"
    assert manifests["evaluate"].metrics["frechet_distance"] > 0
    for id in ("evaluate", "evaluate@untrained"):
        assert manifests[id].metrics["gmacs_total"] > manifests[id].metrics["gmacs_decoder"] > 0


@pytest.mark.slow
def test_a_second_run_reuses_everything(digits_run, enat: Callable[..., Any]) -> None:
    def listing() -> dict[str, int]:
        files = (path for path in (digits_run.workspace / "store").rglob("*") if path.is_file() and path.name != ".used")
        files = (path for path in files if not {"test-report", ".logs"} & {*path.parts})  # tests beside this one write there
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = listing()
    process = enat("run", DIGITS, f"workspace={digits_run.workspace}", *digits_run.overrides, "--json")
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert [(stage["stage"], stage["reused"]) for stage in answer["stages"]] == [(id, True) for id in STAGES]
    assert answer["seconds"] < 25
    assert listing() == before
    planned = digits_run.planned()
    for stage in answer["stages"]:
        assert stage["key"] == planned[stage["stage"]].key and Path(stage["place"], "manifest.json").is_file()
    scores = {"main": "evaluate", "untrained": "evaluate@untrained"}
    assert answer["scores"] == {variant: dict(planned[id].manifest.metrics) for variant, id in scores.items()}
    assert Path(answer["report"]).read_bytes() == digits_run.store.fetch(planned["report"].manifest, "report.html").read_bytes()


def test_a_local_run_listens_on_the_loopback_interface_only(digits_run) -> None:
    outside = {found for found in digits_run.listeners if not ipaddress.ip_address(found[2]).is_loopback}
    assert not outside
    in_training = {process for done, process, _ in digits_run.listeners if done == "audit"}
    assert any(process.startswith(("ray::execute", "ray::RayTrain")) for process in in_training), "the rendezvous"
    in_stages_after = {done for done, *_ in digits_run.listeners}
    followed_by_short_ones = {"reference", "evaluate", "generate", "generate@untrained"}
    assert in_stages_after >= {*STAGES[:-1]} - followed_by_short_ones, "audit, train@untrained and memorization may not be seen"


# Tracking ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(digits_run) -> tuple[MlflowClient, dict[str, Any]]:
    """The runs in MLflow by name, of the first command, which computed everything."""
    client = MlflowClient(f"sqlite:///{digits_run.workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("enat")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    return client, {_name(run): run for run in runs}


def _name(run: Any) -> str:
    """Of a stage its node; of a model the config and the variant, without the overrides of the command."""
    tags = run.data.tags
    return run.info.run_name if tags.get("enat.kind") != "model" else f"{tags['enat.name']} {tags['enat.variant']}"


def test_run_and_stages_are_in_mlflow(tracked, digits_run) -> None:
    client, runs = tracked
    assert set(runs) == {"digits main", "digits untrained", *STAGES} and {run.info.status for run in runs.values()} == {"FINISHED"}
    planned = digits_run.planned()
    for id in STAGES:
        tags = runs[id].data.tags
        model = runs["digits untrained" if id.endswith("@untrained") else "digits main"]
        assert tags["mlflow.parentRunId"] == model.info.run_id and tags["enat.reused"] == "false"
        assert tags["enat.key"] == planned[id].key and tags["enat.digest"] == planned[id].manifest.digest
    main, untrained = (runs[f"digits {variant}"] for variant in ("main", "untrained"))
    assert main.data.params["train.num_steps"] == "20" and untrained.data.params["train.num_steps"] == "0"
    assert untrained.data.tags["mlflow.note.content"].endswith("except for `train.num_steps` = 0.")
    assert untrained.data.tags["enat.run.reference"] == runs["reference"].info.run_id, "made by a stage of the other model"
    assert "None" not in main.data.params.values() and "train.scores.rounding" not in main.data.params
    compared = {"model", "parameters", "train_steps", "num_steps", "guidance_scale", "dataset", "tokenizer", "protocol"}
    assert compared <= main.data.params.keys() and main.data.params["num_steps"] == "8"
    assert {"train/loss", "gmacs_total", "images_per_second", "frechet_distance_se"} <= main.data.metrics.keys()
    assert {each.dataset.name for each in main.inputs.dataset_inputs} == {"digits", "digits token_map", "digits reference"}
    hours = runs["evaluate"].data.metrics
    of_scores = [id for id in STAGES if "@" not in id and id not in ("audit", "memorization", "report")]
    made = sum(planned[id].manifest.provenance["worker_seconds"] for id in of_scores) / 3600
    assert hours["cost/total_worker_hours"] == pytest.approx(made) and hours["cost/missing_artifacts"] == 0
    for run, id, own in ((main, "evaluate", {"run.log"}), (untrained, "evaluate@untrained", set())):
        assert run.data.metrics["frechet_distance"] == pytest.approx(planned[id].manifest.metrics["frechet_distance"])
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"digits.html", "samples.png"} | own
    assert {file.path for file in client.list_artifacts(runs["report"].info.run_id)} == {"report.html", "loss.png"}


def test_checkpoints_are_listed_with_their_scores(tracked, digits_run) -> None:
    client, runs = tracked
    planned = digits_run.planned()
    models = {model.tags["enat.variant"]: model for model in client.search_logged_models([runs["train"].info.experiment_id])}
    assert set(models) == {"main", "untrained"} and models["untrained"].name.startswith("untrained · enat-")
    reference = planned["reference"].manifest.digest[:12]
    for variant, suffix in (("main", ""), ("untrained", "@untrained")):
        model, evaluated = models[variant], planned[f"evaluate{suffix}"].manifest
        assert (
            model.source_run_id == runs[f"train{suffix}"].info.run_id and model.params["key"] == planned[f"train{suffix}"].key[:12]
        )
        scores = {each.key: each for each in model.metrics if not each.key.startswith("scores/")}
        assert {name: each.value for name, each in scores.items()} == pytest.approx(evaluated.metrics)
        assert {(each.dataset_name, each.dataset_digest) for each in scores.values()} == {("digits reference", reference)}
        for reader in ("generate", "evaluate"):
            read = client.get_run(runs[reader + suffix].info.run_id).inputs.model_inputs
            assert [each.model_id for each in read] == [model.model_id]
    assert "mlflow.modelVersions" in models["main"].tags and "mlflow.modelVersions" not in models["untrained"].tags


def test_what_was_predicted_is_beside_what_was_measured(tracked, digits_run) -> None:
    _, runs = tracked
    assert re.search(r"\n[0-9.]+ s were predicted \(\d+ to \d+\), [0-9.]+ were taken\n", digits_run.process.stdout)
    page = (digits_run.workspace / "digits.html").read_text()
    assert "seconds predicted before the run" in page
    for id, item in digits_run.planned().items():
        predicted, data = item.manifest.provenance["predicted_seconds"], runs[id].data
        of_curves = {name.removeprefix("enat.value."): value for name, value in data.tags.items() if name.startswith("enat.value.")}
        metrics = {name: float(value) for name, value in (of_curves or data.metrics).items()}
        assert 0 < predicted["low"] < predicted["value"] < predicted["high"]
        assert metrics["cost/predicted_seconds"] == pytest.approx(predicted["value"]) and metrics["cost/seconds"] > 0
        if id in ("tokenizer", "token_map", "reference"):
            assert f"({predicted['low']:.3g} to {predicted['high']:.3g})" in page
        has_work = id != "train@untrained"  # no step is trained
        assert bool(item.manifest.provenance["work"]) == has_work and ("enat.work" in runs[id].data.tags) == has_work
    assert runs["digits main"].data.metrics["cost/predicted_run_seconds_value"] > 0


@pytest.mark.slow
def test_the_name_of_the_dataset_can_be_corrected(digits_run, enat: Callable[..., Any], tmp_path: Path) -> None:
    """Only the report is made again. Model, runs and comparison have the new name."""
    shutil.copytree(digits_run.workspace, tmp_path / "runs")
    overrides = (*digits_run.overrides, f"workspace={tmp_path / 'runs'}", "dataset.name=handwritten")
    process = enat("run", DIGITS, *overrides, "--json")
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert [stage["stage"] for stage in answer["stages"] if not stage["reused"]] == ["report"]
    page = Path(answer["report"]).read_text()
    assert "digits: handwritten" in page and "digits: digits" not in page
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    client = MlflowClient(uri)
    registered = {
        model.name: client.get_model_version_by_alias(model.name, "newest") for model in client.search_registered_models()
    }
    (was,), (now,) = ([each for name, each in registered.items() if name.endswith(f"-{end}")] for end in ("digits", "handwritten"))
    assert was.tags["enat.key"] == now.tags["enat.key"] and now.tags["enat.dataset"] == "handwritten"
    assert "enat.score.frechet_distance" in now.tags and "trained on handwritten at" in now.description
    assert client.get_run(answer["tracking"]["run_id"]).data.params["dataset"] == "handwritten"
    compared = enat("compare", "digits", "--tracking-uri", uri, "--json")
    (section,) = json.loads(compared.stdout)["sections"]
    assert section["dataset"] == "handwritten" and {row["dataset"] for row in section["rows"]} == {"handwritten"}


def test_training_logs_steps_and_pictures(tracked, digits_run, tmp_path: Path) -> None:
    client, runs = tracked
    run = runs["train"]
    history = json.loads(digits_run.store.fetch(digits_run.planned()["train"].manifest, "history.json").read_text())
    logged = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in logged] == [(row["step"], pytest.approx(row["loss"])) for row in history]
    assert [row["step"] for row in history] == [5, 10, 15, 20]
    assert {"learning_rate", "gradient_norm", "images_per_second"} <= run.data.metrics.keys()
    assert not [name for name in run.data.metrics if name.startswith(("cost/", "final/"))], "charts of one point"
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert pictures == ["samples/step-00000010.png", "samples/step-00000020.png"]
    for picture in pictures:
        content = Path(client.download_artifacts(run.info.run_id, picture, str(tmp_path))).read_bytes()
        image = Image.open(io.BytesIO(content))
        image.load()
        assert image.size == (10 * (64 + 2) + 2, 2 * (64 + 2) + 2), "ten classes, two samples each"


# A bucket ------------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_token_map_in_a_bucket_is_reused(
    enat: Callable[..., Any],
    make_bucket: Callable[..., Any],
    s3_endpoint: Any,
    image_folder: Path,
    tokenizer_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second run has an empty workspace and cache. Credentials and endpoint are only in the environment."""
    images, store = make_bucket("team/photographs"), make_bucket("team/store")
    files = {path.relative_to(image_folder).as_posix(): path for path in image_folder.rglob("*") if path.is_file()}
    s3_endpoint.fill(images, {name: path.read_bytes() for name, path in files.items()})
    config = {
        "name": "bucket",
        "store": store.uri,
        "targets": ["token_map"],
        "dataset": {"kind": "image_folder", "name": "photographs", "path": images.uri},
        "tokenizer": {"codebook_size": 32, "weights": str(tokenizer_weights)},
        "token_map": {"shard_size": 5},
        "tracking": {"enabled": False},
    }
    (tmp_path / "bucket.yaml").write_text(json.dumps(config))

    def run(name: str) -> dict[str, Any]:
        monkeypatch.setenv("ENAT_CACHE", str(tmp_path / name / "cache"))
        process = enat("run", tmp_path / "bucket.yaml", f"workspace={tmp_path / name / 'runs'}", "--json")
        assert process.returncode == 0, process.stderr
        assert "test-secret" not in process.stdout + process.stderr
        return json.loads(process.stdout)

    first = run("first")
    assert {stage["stage"]: stage["reused"] for stage in first["stages"]} == dict.fromkeys(
        ("dataset", "tokenizer", "token_map"), False
    )
    assert first["stages"][-1]["metrics"]["rows"] == len(files) == 12 and first["store"] == store.uri
    objects = {file.name: file.version for file in store.list()}
    second = run("second")
    assert all(stage["reused"] for stage in second["stages"])
    assert [stage["key"] for stage in second["stages"]] == [stage["key"] for stage in first["stages"]]
    assert {file.name: file.version for file in store.list()} == objects, "every object is written once"
    assert not any("/.parts/" in name or "/.work/" in name for name in objects)
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "third" / "cache"))
    opened = open_store(store.uri)
    manifest = opened.read_manifest("token_map", second["stages"][-1]["key"])
    assert manifest is not None and len(TokenMap.open(opened, manifest)) == 12
    assert all(content.find(b"test-secret") < 0 for content in map(store.read, objects))


# Kills ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_twice(
    digits_run, enat: Callable[..., Any], kill_enat_when: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The same run in another store, killed during stages token_map and train, then completed.

    The index, the tokenizer and the reference are copied from the first store.
    """
    folder = tmp_path_factory.mktemp("killed")
    store = folder / "runs" / "store"
    for stage in ("dataset", "tokenizer", "reference"):
        shutil.copytree(digits_run.workspace / "store" / stage, store / stage)
    values = OmegaConf.load(DIGITS)
    del values["variants"]
    OmegaConf.save(values, folder / "digits.yaml")
    command = ("run", folder / "digits.yaml", f"workspace={folder / 'runs'}", *digits_run.overrides)

    kill_enat_when(lambda: any(store.glob("token_map/*/.parts/*.json")), *command)
    was_unfinished = not any(store.glob("token_map/*/manifest.json"))
    (token_map,) = store.glob("token_map/*")
    recorded = [path.stem for path in token_map.glob(".parts/*.json")]
    parts = {name: (token_map / name).stat() for name in recorded}

    kill_enat_when(lambda: any(store.glob("train/*/.parts/checkpoint-*.json")), *command)
    was_untrained = not any(store.glob("train/*/manifest.json"))
    checkpoints = sorted(path.name for path in store.glob("train/*/.work/step-*"))
    process = enat(*command)
    return {
        "store": open_store(str(store)),
        "token map was unfinished": was_unfinished,
        "parts": parts,
        "part files": {name: token_map / name for name in recorded},
        "model was unfinished": was_untrained,
        "checkpoints": checkpoints,
        "process": process,
        "tracking": MlflowClient(f"sqlite:///{folder}/runs/mlflow.db"),
    }


@pytest.mark.faults
def test_a_killed_run_is_completed_by_the_same_command(killed_twice: dict[str, Any], digits_run) -> None:
    assert killed_twice["token map was unfinished"] and killed_twice["model was unfinished"], "both kills came in time"
    process, store = killed_twice["process"], killed_twice["store"]
    assert process.returncode == 0 and process.stderr == "", process.stderr
    reused = [line.split()[1] for line in process.stdout.splitlines() if line.startswith("✓") and line.endswith("reused")]
    # The audit waits for no model: whether it was complete at the second kill is chance.
    assert [stage for stage in reused if stage != "audit"] == ["dataset", "tokenizer", "token_map", "reference"]
    assert 1 <= len(killed_twice["parts"]) < 29
    for name, before in killed_twice["parts"].items():
        now = killed_twice["part files"][name].stat()
        assert (now.st_mtime_ns, now.st_ino, now.st_size) == (before.st_mtime_ns, before.st_ino, before.st_size)
    for stage in ("token_map", "train", "generate", "evaluate"):
        uninterrupted = digits_run.planned()[stage].manifest
        manifest = store.read_manifest(stage, uninterrupted.key)
        assert manifest is not None and manifest.digest == uninterrupted.digest
        for record in manifest.files:
            assert (
                store.fetch(manifest, record.name).read_bytes() == digits_run.store.fetch(uninterrupted, record.name).read_bytes()
            )
    assert not [path for path in Path(store.uri).rglob("*") if path.name in (".parts", ".work")]
    assert len(list(store.manifests())) == len([stage for stage in STAGES if "@" not in stage])


@pytest.mark.faults
def test_training_resumes_from_a_checkpoint_after_the_kill(killed_twice: dict[str, Any]) -> None:
    assert killed_twice["checkpoints"][0].startswith("step-0000")
    client = killed_twice["tracking"]
    experiment = client.get_experiment_by_name("enat")
    runs = client.search_runs([experiment.experiment_id], "run_name = 'train'", order_by=["attributes.start_time ASC"])
    killed, resumed = (client.get_metric_history(run.info.run_id, "loss") for run in runs)
    taken_over = [point.step for point in resumed if point.timestamp == resumed[0].timestamp]  # logged all at once
    assert killed[0].step == 5 and taken_over[0] == 5
    assert [point.step for point in resumed] == [5, 10, 15, 20] and taken_over[-1] < 20
    assert len({point.timestamp for point in killed} & {point.timestamp for point in resumed}) == 0
