"""`enat artifacts`: output, JSON and exit codes; nothing is removed before it is known what must be kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from material.places import Place, folder_place, key_of, make, open_place
from material.summaries import summary_of
from pipelines.artifacts.manifest import MANIFEST, Manifest, name_of
from pipelines.cli.artifacts import artifacts
from pipelines.cli.options import s3_options
from pipelines.cli.sample import sample
from pipelines.cli.sharing import import_weights
from pipelines.storage.base import StorageError
from pipelines.storage.s3_client import S3Config
from pipelines.tracking import run as tracking
from pipelines.tracking import search
from services.mlflow_database import mlflow_database
from services.s3_server import S3Endpoint

DAY = 86400.0


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return open_place(request, tmp_path, monkeypatch)


@pytest.fixture
def chain(place: Place) -> SimpleNamespace:
    """A dataset, a model of one megabyte and its samples, created two days ago."""
    store, made = place.store, SimpleNamespace()
    created = {"created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 2 * DAY))}
    summary = summary_of("dataset", num_images=9)
    made.dataset = make(store, "dataset/d", summary=summary, provenance=created)
    made.train = make(store, "train/x", made.dataset, files={"model.bin": bytes(1_000_000)}, provenance=created)
    made.samples = make(store, "generate/g", made.train, provenance=created)
    place.age("", 2 * DAY)
    return made


def _ask(place: Place, *arguments: object) -> Result:
    return CliRunner().invoke(artifacts, [*map(str, arguments), "--store", place.store.uri])


def _json(place: Place, *arguments: object) -> Any:
    answer = _ask(place, *arguments, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def _key(manifest: Manifest) -> str:
    return f"{manifest.stage}/{manifest.key[:8]}"


# ls ------------------------------------------------------------------------------------------------------------------------


def test_ls_shows_size_age_key_dataset_and_description(place: Place, chain) -> None:
    lines = [" ".join(line.split()) for line in _ask(place, "ls").stdout.splitlines()]
    assert f"1.0 MB 2 d train/{chain.train.key[:12]} digits" in lines
    assert f"9 B 2 d dataset/{chain.dataset.key[:12]} digits 9 images" in lines
    assert lines[-1] == f"3 artifacts, 1.0 MB, in {place.store.uri}"
    rows = _json(place, "ls", "--larger-than", "500kB", "--older-than", "1d", "--dataset", "digits")["artifacts"]
    assert [(row["stage"], row["key"], row["size"], row["dataset"]) for row in rows] == [
        ("train", chain.train.key, 10**6, "digits")
    ]
    assert next(row["stage"] for row in _json(place, "ls", "--sort", "size")["artifacts"]) == "train"
    assert _json(place, "ls", "--newer-than", "36h")["artifacts"] == []


def test_ls_unfinished(place: Place, chain) -> None:
    place.store.put_part("train", key_of("cut off"), "checkpoint-1", {"step": 1})
    (row,) = _json(place, "ls", "--unfinished")["unfinished"]
    assert (row["stage"], row["key"], row["parts"]) == ("train", key_of("cut off"), 1)
    assert f"train/{key_of('cut off')[:12]}" in _ask(place, "ls", "--unfinished").stdout
    assert _ask(place, "ls", "--unfinished", "--stage", "train").exit_code == 2


def test_ls_warns_of_a_damaged_manifest(place: Place, chain, caplog: pytest.LogCaptureFixture) -> None:
    place.damage(f"train/{chain.train.key}/{MANIFEST}", b"<html>")
    assert [row["stage"] for row in _json(place, "ls")["artifacts"]] == ["dataset", "generate"]
    assert f"train/{chain.train.key}/{MANIFEST} is not a manifest" in caplog.text


def test_bad_options_are_refused(place: Place, chain) -> None:
    before = place.contents()
    for arguments, named in (
        (("ls", "--larger-than", "big"), "'big' is not a size"),
        (("ls", "--older-than", "30"), "'30' is not an age"),
        (("verify",), "give --all"),
        (("gc", "--older-than", "5m"), "--older-than must be at least 1h"),
        (("pull", "train/", "--files", "x", "--with-inputs"), "remove --with-inputs"),
    ):
        answer = _ask(place, *arguments)
        assert answer.exit_code == 2 and named in answer.output and place.contents() == before


# show, pull, verify --------------------------------------------------------------------------------------------------------


def test_show_lineage(place: Place, chain) -> None:
    text = _ask(place, "show", _key(chain.train), "--lineage").stdout
    assert "was made from" in text and f"dataset/{chain.dataset.key[:12]}" in text and f"generate/{chain.samples.key[:12]}" in text
    answer = _json(place, "show", _key(chain.train), "--lineage")
    assert [entry["artifact"] for entry in answer["lineage"]["ancestors"]] == [f"dataset/{chain.dataset.key}"]
    assert answer["key"] == chain.train.key and "lineage" not in _json(place, "show", _key(chain.train))


def test_pull_with_inputs_makes_a_complete_store(place: Place, chain, tmp_path: Path) -> None:
    answer = _json(place, "pull", _key(chain.samples), "--to", tmp_path / "mine", "--with-inputs")
    assert [row["artifact"] for row in answer["pulled"]] == [
        "/".join(name_of(m)) for m in (chain.dataset, chain.train, chain.samples)
    ]
    mine = folder_place(tmp_path / "mine")
    verified = _json(mine, "verify", "--all")
    assert verified["is_whole"] and len(verified["artifacts"]) == 3
    again = _ask(place, "pull", _key(chain.samples), "--to", tmp_path / "mine", "--with-inputs").stdout
    assert again.count("already there") == 3
    files = _ask(place, "pull", _key(chain.train), "--files", tmp_path / "files").stdout
    assert "1 file, 1.0 MB fetched" in files and (tmp_path / "files" / "model.bin").stat().st_size == 10**6
    assert _ask(place, "pull", _key(chain.train), "--to", place.store.uri).exit_code == 2


def test_verify_reports_damage_and_fails(place: Place, chain) -> None:
    place.damage(f"train/{chain.train.key}/model.bin", bytes(999_999) + b"x")
    answer = _ask(place, "verify", "--all")
    assert answer.exit_code == 1 and "DAMAGED model.bin holds other bytes" in answer.stdout
    assert "damaged: 1 of 3 artifacts" in answer.stdout
    assert answer.stdout.endswith(f"{place.store.place(*name_of(chain.train))}\n")
    assert _ask(place, "verify", _key(chain.dataset), _key(chain.samples)).exit_code == 0
    place.damage(f"train/{chain.train.key}/{MANIFEST}", b"{")
    answer = _ask(place, "verify", _key(chain.train), "--json")
    assert answer.exit_code == 1 and not json.loads(answer.stdout)["artifacts"][0]["is_whole"]


def test_verify_reports_unreadable_files_and_fails(place: Place, chain, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(place.store).read_chunks

    def failing(self: Any, stage: str, *rest: str) -> Any:
        if stage == "dataset":
            raise StorageError("file.bin cannot be read") from OSError(5, "Input/output error")
        return original(self, stage, *rest)

    monkeypatch.setattr(type(place.store), "read_chunks", failing)
    answer = _ask(place, "verify", "--all")
    assert answer.exit_code == 1 and "DAMAGED file.bin cannot be read (Input/output error)" in answer.stdout
    assert answer.stdout.count("whole 1 file,") == 2 and "cannot be read may be whole" in answer.stdout


# Access to buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_public_bucket_needs_no_credentials(
    place: Place, chain, s3_endpoint: S3Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor any variable: the options are enough."""
    bucket = place.store.uri.split("/")[2]
    s3_endpoint.boto.put_bucket_acl(Bucket=bucket, ACL="public-read")
    for entry in s3_endpoint.boto.list_objects_v2(Bucket=bucket)["Contents"]:
        s3_endpoint.boto.put_object_acl(Bucket=bucket, Key=entry["Key"], ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    public = ("--s3-endpoint", s3_endpoint.url, "--s3-region", "eu-north-1", "--s3-anonymous", "--s3-path-style")
    before = len(s3_endpoint.requests)
    assert len(_json(place, "ls", *public)["artifacts"]) == 3
    assert _json(place, "show", _key(chain.train), *public)["key"] == chain.train.key
    assert _json(place, "verify", "--all", *public)["is_whole"]
    answer = _json(place, "pull", _key(chain.samples), "--to", tmp_path / "mine", "--with-inputs", *public)
    assert len(answer["pulled"]) == 3 and folder_place(tmp_path / "mine").store.read_manifest(*name_of(chain.samples))
    asked = s3_endpoint.requests[before:]
    assert asked and all("AUTHORIZATION" not in headers and target.startswith(f"/{bucket}") for _, target, headers in asked)


def test_every_command_that_opens_a_store_without_a_config_has_options_for_buckets() -> None:
    given: list[S3Config] = []

    @click.command()
    @s3_options
    def command(s3: S3Config) -> None:
        given.append(s3)

    options = ["--s3-endpoint", "http://host", "--s3-region", "eu-north-1", "--s3-anonymous", "--s3-path-style"]
    for arguments in ([], options):
        assert CliRunner().invoke(command, arguments).exit_code == 0
    assert given == [S3Config(), S3Config(endpoint_url="http://host", region="eu-north-1", anonymous=True, path_style=True)]
    for each in [*artifacts.commands.values(), *import_weights.commands.values(), sample]:
        known = {option for parameter in each.params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known, each.name


# gc ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real tracking store with one model of this program and one other model."""
    uri = mlflow_database(tmp_path_factory.mktemp("mlflow"))
    run = tracking.start_run(uri, tracking.TrackingConfig(uri=uri), "training", {})
    tags = {"enat.digest": "d", "enat.created": "2026", "enat.artifact": f"train/{key_of('x')}", "enat.store": "/elsewhere"}
    tags["enat.evaluation"] = f"evaluate/{key_of('scores')}"
    assert run.register_model("enat-s-digits", {"README.md": b""}, tags, "a card", None) == "1"
    assert run.register_model("other", {"README.md": b""}, {"enat.digest": "e", "enat.created": "2026"}, "", None) == "1"
    return uri


@pytest.mark.slow
def test_registered_artifacts_are_models_and_their_evaluations(registry: str) -> None:
    names = (f"train/{key_of('x')}", f"evaluate/{key_of('scores')}")
    assert search.registered_artifacts(registry) == dict.fromkeys(names, "enat-s-digits version 1")


@pytest.mark.slow
def test_gc_keeps_the_evaluation_of_a_registered_model(place: Place, chain, registry: str) -> None:
    """The next evaluation is compared with it."""
    scores = make(place.store, "evaluate/scores", chain.samples, chain.train, provenance={})
    make(place.store, "evaluate/others", chain.samples, provenance={})
    place.age("", 2 * DAY)
    answer = _json(place, "gc", "--older-than", "1d", "--tracking-uri", registry, "--delete")
    assert [(row["stage"], row["key"]) for row in answer["removals"]] == [("evaluate", key_of("others"))]
    assert answer["kept"]["/".join(name_of(scores))] == "registered"
    assert answer["kept"]["/".join(name_of(chain.samples))] == "needed"


def test_gc_without_delete_only_lists(place: Place, chain, registry: str) -> None:
    before = place.contents()
    answer = _json(place, "gc", "--older-than", "1d", "--tracking-uri", registry)
    assert [(row["stage"], row["kind"]) for row in answer["removals"]] == [("generate", "artifact")] and not answer["deleted"]
    assert answer["kept"] == {f"train/{chain.train.key}": "registered", f"dataset/{chain.dataset.key}": "needed"}
    text = _ask(place, "gc", "--older-than", "1d", "--tracking-uri", registry).stdout
    assert "would be freed; --delete removes it" in text and "kept 2 artifacts (1 needed, 1 registered)" in text
    assert place.contents() == before


def test_gc_delete_reports_what_was_freed(place: Place, chain, registry: str) -> None:
    size = sum(len(content) for name, content in place.contents().items() if name.startswith("generate/"))
    first = _json(place, "gc", "--older-than", "1d", "--tracking-uri", registry, "--delete")
    assert first["deleted"] and first["bytes_by_stage"] == {"generate": size} and first["bytes"] == size
    assert not any(name.startswith("generate/") for name in place.contents())
    assert "0 B freed" in _ask(place, "gc", "--older-than", "1d", "--tracking-uri", registry, "--delete").stdout
    assert place.store.fetch(chain.train, "model.bin").stat().st_size == 10**6


def test_gc_keep_and_a_wrong_key(place: Place, chain) -> None:
    before = place.contents()
    options = ("gc", "--older-than", "1d", "--ignore-registry", "--delete")
    assert _ask(place, *options, "--keep", "f00d").exit_code != 0 and place.contents() == before
    answer = _json(place, *options, "--keep", _key(chain.train))
    assert [row["stage"] for row in answer["removals"]] == ["generate"]


@pytest.mark.faults
@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_gc_deletes_nothing_while_the_registry_cannot_be_read(
    place: Place, chain, enat: Callable[..., Any], tmp_path: Path
) -> None:
    before = place.contents()
    options = ("artifacts", "gc", "--store", place.store.uri, "--older-than", "1d")
    for uri in ("http://127.0.0.1:9", f"sqlite:///{tmp_path}/none.db"):
        answer = enat(*options, "--tracking-uri", uri, "--delete")
        assert answer.returncode == 1 and answer.stderr.count("\n") == 1 and place.contents() == before
        assert "nothing is removed" in answer.stderr and "--ignore-registry" in answer.stderr
    assert enat("artifacts", "verify", "--all", "--store", place.store.uri).returncode == 0
    answer = enat(*options, "--ignore-registry", "--delete")
    assert answer.returncode == 0 and place.contents() == {}


def test_gc_keeps_the_folder_of_a_damaged_manifest(place: Place, chain) -> None:
    place.damage(f"train/{chain.train.key}/{MANIFEST}", b"<html>")
    place.age("", 2 * DAY)
    answer = _ask(place, "gc", "--older-than", "1d", "--ignore-registry", "--delete")
    assert answer.exit_code == 0 and f"{MANIFEST} is not a manifest" in answer.stderr and "it is kept" in answer.stderr
    assert {name.split("/")[0] for name in place.contents()} == {"train"}


def test_mistyped_stores_and_stages_are_errors_not_empty_lists(place: Place, chain: SimpleNamespace, tmp_path: Path) -> None:
    for arguments in (["ls"], ["verify", "--all"], ["gc"], ["show", "train/x"]):
        answer = CliRunner().invoke(artifacts, [*arguments, "--store", str(tmp_path / "mistyped")])
        assert isinstance(answer.exception, ValueError) and "does not exist; name another" in str(answer.exception)
    assert not (tmp_path / "mistyped").exists()
    answer = _ask(place, "ls", "--stage", "tarin")
    assert isinstance(answer.exception, ValueError) and "unknown stage tarin; did you mean train?" in str(answer.exception)
    assert [row["stage"] for row in _json(place, "ls", "--stage", "train")["artifacts"]] == ["train"]
    empty = folder_place(tmp_path / "empty")
    empty.store.check_writable()
    answer = _ask(empty, "verify", "--all")
    assert isinstance(answer.exception, ValueError) and "nothing was verified" in str(answer.exception)
