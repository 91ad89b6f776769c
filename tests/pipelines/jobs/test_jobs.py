"""What is sent to a cluster and what is refused, without a cluster: code packages, ids, room for workers, addresses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.capacity import Capacity, Need, judge, need_of
from pipelines.cluster.resources import Workers
from pipelines.jobs import submission
from pipelines.run import config as run_config
from pipelines.run import graph
from pipelines.workflow import driver
from pipelines.workflow import provenance as workflow_provenance

REPOSITORY = Path(__file__).parents[3]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
CLUSTER_STORE = ("store=s3://bucket/store",)


def _git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository laid out as this one, with files that must stay at home beside those that go."""
    root = tmp_path / "checkout"
    files = {
        "enat/__init__.py": "",
        "enat/model.py": "width = 1\n",
        "pipelines/cli.py": "print('hello')\n",
        "pipelines/templates/page.j2": "{{ title }}\n",
        "configs/digits.yaml": "name: digits\n",
        "configs/deeper/more.yaml": "name: more\n",
        "configs/digits-samples.png": "not sent",
        "README.md": "not sent",
        "tests/test_model.py": "not sent",
        ".gitignore": "runs/\n*.log\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    _git(root, "init", "--quiet")
    _git(root, "add", ".")
    _git(root, "commit", "--quiet", "-m", "first")
    return root


SENT = {"enat/__init__.py", "enat/model.py", "pipelines/cli.py", "pipelines/templates/page.j2", "configs/digits.yaml"}
SENT |= {"configs/deeper/more.yaml", "code.json"}


def _names(package: workflow_provenance.CodePackage) -> set[str]:
    return set(zipfile.ZipFile(io.BytesIO(package.content)).namelist())


# The package ---------------------------------------------------------------------------------------------------------------


def test_what_git_tracks_of_the_code_and_configs_is_sent_and_nothing_else(checkout: Path) -> None:
    for name in ("runs/mlflow.db", "pipelines/debug.log", ".env", "enat/__pycache__/model.pyc"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("private")
    package = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    assert _names(package) == SENT
    assert package.config == "configs/digits.yaml"


def test_the_commit_is_recorded_and_an_unchanged_checkout_has_no_changes(checkout: Path) -> None:
    package = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    record = json.loads(zipfile.ZipFile(io.BytesIO(package.content)).read("code.json"))
    assert record["commit"] == _git(checkout, "rev-parse", "HEAD") and record["diff_digest"] is None
    assert package.state.label == f"{package.state.version}+g{record['commit'][:12]}"


def test_changes_go_along_as_files_and_as_a_patch_that_git_can_apply(checkout: Path, tmp_path: Path) -> None:
    (checkout / "enat" / "model.py").write_text("width = 2\n")
    (checkout / "pipelines" / "templates" / "page.j2").unlink()
    package = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    archive = zipfile.ZipFile(io.BytesIO(package.content))
    assert archive.read("enat/model.py") == b"width = 2\n" and "pipelines/templates/page.j2" not in archive.namelist()
    assert package.state.diff_digest is not None and package.state.label.endswith(f"+dirty.{package.state.diff_digest[:12]}")
    clone = tmp_path / "clone"
    _git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    (tmp_path / "changes.diff").write_bytes(archive.read("changes.diff"))
    _git(clone, "apply", str(tmp_path / "changes.diff"))
    assert (clone / "enat" / "model.py").read_text() == "width = 2\n"
    assert not (clone / "pipelines" / "templates" / "page.j2").exists()


def test_the_package_unpacked_says_which_code_it_is(checkout: Path, tmp_path: Path) -> None:
    (checkout / "enat" / "model.py").write_text("width = 2\n")
    package = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    zipfile.ZipFile(io.BytesIO(package.content)).extractall(tmp_path / "unpacked")
    assert workflow_provenance.read_state(tmp_path / "unpacked") == package.state
    assert workflow_provenance.read_changes(tmp_path / "unpacked") == package.files["changes.diff"]
    assert workflow_provenance.state_of(tmp_path / "unpacked") == package.state == workflow_provenance.state_of(checkout)
    assert workflow_provenance.read_state(checkout) is None, "a checkout says so itself"
    assert workflow_provenance.read_changes(checkout) is None


def test_the_changes_are_the_same_whatever_the_user_s_own_settings(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / ".gitattributes").write_text("*.py diff=upper\n")
    model = checkout / "enat" / "model.py"
    model.write_text("".join(f"line_{number} = {number % 3}\n\n" for number in range(40)))
    _git(checkout, "add", ".")
    _git(checkout, "commit", "--quiet", "-m", "longer")
    model.write_text(model.read_text().replace("line_20 = 2\n", "").replace("line_25 = 1\n\n", "line_25 = 7\n"))
    (checkout / "pipelines" / "templates" / "page.j2").rename(checkout / "pipelines" / "templates" / "other.j2")
    _git(checkout, "add", ".")
    before = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    settings = tmp_path / "settings"
    settings.write_text(
        "[core]\nquotepath = true\n[color]\nui = always\n"
        "[diff]\nnoprefix = true\nmnemonicPrefix = true\ncontext = 1\ninterHunkContext = 9\nalgorithm = patience\n"
        f"renames = copies\nsuppressBlankEmpty = true\nexternal = false\norderFile = {tmp_path}/order\n"
        '[diff "upper"]\ntextconv = tr a-z A-Z <\n'
    )
    (tmp_path / "order").write_text("pipelines/*\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    assert (
        b"LINE_" in subprocess.run(["git", "diff", "--no-ext-diff", "HEAD"], cwd=checkout, capture_output=True, check=True).stdout
    ), "the settings are read"
    assert workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout).content == before.content


# A repository that git does not read ---------------------------------------------------------------------------------------


@pytest.fixture
def unreadable(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that git takes for someone else's."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    return checkout


def test_a_repository_of_someone_else_is_not_taken_for_none(unreadable: Path) -> None:
    with pytest.raises(ValueError, match=r"git ls-files fails in .*dubious ownership") as refused:
        workflow_provenance.pack(unreadable / "configs" / "digits.yaml", unreadable)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="dubious ownership"):
        workflow_provenance.state_of(unreadable)


def test_a_failing_diff_is_not_taken_for_no_changes(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = shutil.which("git")
    wrapper = tmp_path / "bin" / "git"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" diff "*) echo fatal: broken >&2; exit 128;; esac\nexec {git} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"^git diff fails in .*: fatal: broken$"):
        workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)


def test_a_repository_without_git_is_refused_and_installed_code_needs_none(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="is a git repository, but git cannot be started"):
        workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    shutil.rmtree(checkout / ".git")
    state = workflow_provenance.state_of(checkout)
    assert state.commit is None and state.label == f"{state.version}+code.{state.digest[:12]}"


def test_a_run_whose_code_cannot_be_told_says_so_and_warns(
    unreadable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = workflow_provenance.state_of
    monkeypatch.setattr(workflow_provenance, "state_of", lambda: read(unreadable))
    label = workflow_provenance.code_version.__wrapped__()
    assert label.endswith("+unknown") and label in caplog.text and f"git ls-files fails in {unreadable}" in caplog.text


def test_an_image_knows_the_commit_that_it_was_built_from(checkout: Path) -> None:
    state = workflow_provenance.state_of(checkout)
    shutil.rmtree(checkout / ".git")
    workflow_provenance.write_record(str(state.commit), checkout)
    recorded = workflow_provenance.state_of(checkout)
    assert recorded.commit == state.commit and len(recorded.digest) == 64 and recorded.label == state.label
    workflow_provenance.write_record("unknown", checkout)
    assert workflow_provenance.state_of(checkout).label == f"{state.version}+code.{recorded.digest[:12]}"
    for wrong in ("", "main", state.commit[:12]):
        with pytest.raises(ValueError, match=r"^REVISION is "):
            workflow_provenance.write_record(wrong, checkout)


def test_the_same_code_is_the_same_bytes_whenever_it_is_packed(checkout: Path) -> None:
    first = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    for path in checkout.glob("*/*.py"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o600)
    assert workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout).content == first.content


def test_only_changes_of_the_code_change_its_digest(checkout: Path) -> None:
    def digest() -> str:
        return workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout).state.digest

    first = digest()
    (checkout / "README.md").write_text("another text")
    _git(checkout, "commit", "--quiet", "-am", "second")
    assert digest() == first
    (checkout / "enat" / "model.py").write_text("width = 3\n")
    changed = digest()
    assert changed != first
    _git(checkout, "commit", "--quiet", "-am", "third")
    assert digest() == changed, "committed or not, it is the same code"


def test_a_config_from_elsewhere_goes_along(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    package = workflow_provenance.pack(tmp_path / "mine.yaml", checkout)
    assert package.config == "submitted/mine.yaml"
    assert zipfile.ZipFile(io.BytesIO(package.content)).read("submitted/mine.yaml") == b"name: mine\n"


def test_new_code_that_git_does_not_track_is_named(checkout: Path) -> None:
    (checkout / "pipelines" / "new.py").write_text("")
    package = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    assert package.left_behind == ("pipelines/new.py",) and "pipelines/new.py" not in _names(package)
    assert "pipelines/new.py" in workflow_provenance.describe_left_behind(package.left_behind)


def test_rayignore_holds_back_what_git_tracks(checkout: Path) -> None:
    (checkout / ".rayignore").write_text("configs/deeper/\n*.j2\n")
    package = workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)
    assert _names(package) == SENT - {"configs/deeper/more.yaml", "pipelines/templates/page.j2"}


def test_a_large_file_is_refused_by_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow_provenance, "SIZE_LIMIT", 1_000_000)
    (checkout / "pipelines" / "weights.bin").write_bytes(os.urandom(1_100_000))
    _git(checkout, "add", ".")
    _git(checkout, "commit", "--quiet", "-m", "too large")
    with pytest.raises(ValueError, match=r"is 1\.1 MB, more than 1 MB; the largest files are pipelines/weights\.bin, "):
        workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)


def test_a_link_is_refused(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (checkout / "pipelines" / "link.py").symlink_to(tmp_path / "secret")
    _git(checkout, "add", ".")
    with pytest.raises(ValueError, match=r"pipelines/link\.py is a symbolic link"):
        workflow_provenance.pack(checkout / "configs" / "digits.yaml", checkout)


def test_installed_code_is_sent_as_it_lies_there(checkout: Path, tmp_path: Path) -> None:
    """Also in a folder that some repository around it ignores."""
    installed = checkout / "runs" / "site-packages"
    for name in ("enat/model.py", "pipelines/cli.py", "pipelines/__pycache__/cli.pyc"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text("x = 1\n")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    package = workflow_provenance.pack(tmp_path / "mine.yaml", installed)
    assert _names(package) == {"enat/model.py", "pipelines/cli.py", "submitted/mine.yaml", "code.json"}
    assert package.state.commit is None and package.left_behind == ()


# What a submission is ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepare() -> Callable[..., submission.Submission]:
    """A submission of the digits; of this code, packed once."""
    packed = workflow_provenance.pack(DIGITS)

    def make(
        *overrides: str, config: Path = DIGITS, store: tuple[str, ...] = CLUSTER_STORE, **options: Any
    ) -> submission.Submission:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(submission, "pack_code", lambda _: packed)
            return submission.prepare(config, (*store, *overrides), **options)

    return make


def test_the_same_submission_has_the_same_id_and_another_one_another(prepare: Callable[..., Any]) -> None:
    first = prepare("train.num_steps=10")
    assert prepare("train.num_steps=10").run == first.run and first.run.startswith("enat-digits-")
    assert prepare("seed=0", "train.num_steps=10").run == first.run, "the resolved config counts, not how it is written"
    others = {prepare("train.num_steps=11").run, prepare().run, prepare("train.num_steps=10", image="enat:1").run}
    assert len(others | {first.run}) == 4
    assert prepare("train.num_steps=10", image="enat:2").run not in others


def test_the_job_runs_the_config_with_the_overrides_on_its_own_cluster(prepare: Callable[..., Any]) -> None:
    prepared = prepare("targets=[dataset]", "dataset.name=it's; rm -rf $HOME")
    words = shlex.split(prepared.entrypoint)
    assert words[:5] == ["python", "-m", "pipelines", "run", "configs/digits.yaml"]
    assert words[5:] == [*CLUSTER_STORE, "targets=[dataset]", "dataset.name=it's; rm -rf $HOME", "cluster.address=auto"]


def test_metadata_pins_the_code(prepare: Callable[..., Any]) -> None:
    prepared = prepare()
    state = workflow_provenance.pack(DIGITS).state
    assert prepared.metadata["enat.commit"] == (state.commit or "unknown")
    assert prepared.metadata["enat.dirty"] == ("true" if state.diff_digest else "false")
    assert prepared.metadata["enat.diff_sha256"] == (state.diff_digest or "")
    assert prepared.metadata["enat.run"] == prepared.run and all(isinstance(value, str) for value in prepared.metadata.values())
    assert prepare(image="enat:1").metadata["enat.image"] == "enat:1" and prepare(image="enat:1").package is None


@pytest.mark.faults
def test_with_an_image_the_job_writes_its_config_and_runs_it(prepare: Callable[..., Any], tmp_path: Path) -> None:
    """The shell command itself, as an image with the code would run it."""
    prepared = prepare(
        "targets=[dataset]", f"workspace={tmp_path}", "tracking.enabled=false", store=(f"store={tmp_path}/store",), image="enat:1"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", prepared.entrypoint], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{prepared.run}.yaml").read_text() == DIGITS.read_text()
    assert any((tmp_path / "store" / "dataset").glob("*/manifest.json"))


def test_a_config_is_sent_merged_with_its_bases(prepare: Callable[..., Any], checkout: Path, tmp_path: Path) -> None:
    config, sent = tmp_path / "mine.yaml", tmp_path / "sent.yaml"
    config.write_text(f"{{base: {DIGITS}, name: mine, train: {{num_steps: 7}}}}")
    package = workflow_provenance.pack(config, checkout)
    for text in (prepare(config=config, image="enat:1").config_text, package.files[package.config].decode()):
        sent.write_text(text)
        run = run_config.load_run(sent)
        assert run == run_config.load_run(config) and (run.name, run.train.num_steps) == ("mine", 7)


def test_a_credential_in_a_base_is_refused(prepare: Callable[..., Any], tmp_path: Path) -> None:
    base, config = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text(f"{DIGITS.read_text()}tracking: {{uri: 'http://user:hunter2@mlflow:5000'}}\n")
    config.write_text("{base: base.yaml, tracking: {uri: null}}")
    with pytest.raises(ValueError, match=rf"^{base}, line \d+, holds a credential"):
        prepare(config=config, image="enat:1")


@pytest.mark.parametrize("store", [(), ("store=runs/store",), ("workspace=/elsewhere",)])
def test_a_store_that_the_cluster_would_not_see_is_refused(prepare: Callable[..., Any], store: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="is a folder of this machine, which the cluster would not see; give store=s3://"):
        prepare(store=store)


def test_a_file_of_this_machine_is_refused_because_the_cluster_does_not_have_it(prepare: Callable[..., Any]) -> None:
    for override, named in (
        ("dataset={kind: images, path: photographs}", "dataset.path is photographs, a path of this machine"),
        ("reference.dataset={kind: images, path: photographs}", "reference.dataset.path is photographs"),
        ("tokenizer.weights=weights/vqgan.ckpt", "tokenizer.weights is weights/vqgan.ckpt"),
        ("variants={other: {train: {weights: enat.safetensors}}}", "variants.other.train.weights is enat.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
            prepare(override)


@pytest.mark.parametrize("place", ["/shared/photographs", "s3://datasets/photographs"])
def test_what_all_nodes_may_see_is_sent_as_it_is(prepare: Callable[..., Any], place: str) -> None:
    override = f"dataset={{kind: images, path: {place}}}"
    assert override in prepare(override).arguments


def test_a_local_store_is_kept_by_its_absolute_path_where_that_is_asked_for(
    prepare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = prepare(store=(), allow_local_store=True).arguments
    assert {f"store={tmp_path}/runs/store", f"workspace={tmp_path}/runs"} <= set(arguments)
    assert prepare(store=("store=/shared/store",)).arguments == ("store=/shared/store", "cluster.address=auto")


def test_an_image_by_its_tag_is_warned_of_and_by_its_digest_is_not(prepare: Callable[..., Any]) -> None:
    warning = prepare(image="enat:1").warning
    assert warning.startswith("the image enat:1 is named by a tag, and other code") and "\n" not in warning
    assert prepare(image="enat@sha256:" + "0" * 64).warning is None
    assert "tag" not in (prepare().warning or "")


def test_targets_that_the_run_does_not_have_are_refused_as_by_the_run_itself(prepare: Callable[..., Any]) -> None:
    for target in ("tran", "reconstruction", "captions"):
        with pytest.raises(ValueError, match=f"^targets names '{target}'; the stages of this run are") as refused:
            prepare(f"targets=[dataset, {target}]")
        with pytest.raises(ValueError, match=f"^targets names '{target}'") as by_run:
            graph.build(run_config.load_run(DIGITS, [f"targets=[{target}]"]))
        stages = [set(str(each.value).partition("are ")[2].split(", ")) for each in (refused, by_run)]
        assert stages[0] == stages[1]
    prepare("targets=[reconstruction, captions]", "reconstruction={}", "captions.encoder=hf://a/b")


def test_a_model_that_does_not_fit_is_refused_and_a_dataset_out_of_reach_is_not(prepare: Callable[..., Any]) -> None:
    far = ("dataset.kind=image_folder", "dataset.path=/only/on/the/cluster")
    assert prepare(*far).package is not None
    with pytest.raises(ValueError, match="reuse"):
        prepare(*far, "generate.sampler.reuse=true", "train.model.reuse=false")


def test_the_address_of_another_cluster_is_refused(prepare: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"cluster\.address is head:6379, but a job runs on the cluster it is sent to"):
        prepare("cluster.address=head:6379")
    assert prepare("cluster.address=auto").run == prepare().run


# Credentials ---------------------------------------------------------------------------------------------------------------


def test_a_credential_in_an_address_is_refused_and_not_repeated(prepare: Callable[..., Any]) -> None:
    for override in (
        "tracking.uri=http://user:hunter2@mlflow:5000",
        "tracking.uri=postgresql://mlflow:hunter2/with/slash@db/mlflow",
        "dataset.path=https://bucket/images.tar?X-Amz-Credential=A&X-Amz-Signature=hunter2",
        "train.weights=s3://hunter2@bucket/model",
    ):
        with pytest.raises(ValueError, match=f"^{override.partition('=')[0]} holds a credential in its address") as refused:
            prepare(override)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "overrides", "options"),
    [
        ("tracking: {uri: 'http://user:hunter2@mlflow:5000'}", ("tracking.uri=http://mlflow:5000",), {}),
        ("tracking: {uri: 'http://user:hunter2@mlflow:5000'}", (), {"image": "enat:1"}),
        ("# was http://user:hunter2@mlflow:5000", (), {}),
        ("# was http://user:hunter2@mlflow:5000", ("tracking.uri=http://mlflow:5000",), {"image": "enat:1"}),
    ],
)
def test_a_credential_in_the_config_is_refused_even_if_nothing_reads_it(
    prepare: Callable[..., Any], tmp_path: Path, line: str, overrides: tuple[str, ...], options: dict[str, str]
) -> None:
    """The file is sent as it is, even if overrides replace its values."""
    config = tmp_path / "bad.yaml"
    config.write_text(f"{DIGITS.read_text()}{line}\n")
    number = len(config.read_text().splitlines())
    with pytest.raises(ValueError, match=rf"^{config}, line {number}, holds a credential in an address") as refused:
        prepare(*overrides, config=config, **options)
    assert "hunter2" not in str(refused.value)


def test_the_value_of_a_secret_variable_in_the_config_is_refused(
    prepare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    config = tmp_path / "bad.yaml"
    config.write_text(f"# wJalrXUtnFEMI\n{DIGITS.read_text()}")
    with pytest.raises(ValueError, match=rf"^{config}, line 1, holds the value of AWS_SECRET_ACCESS_KEY") as refused:
        prepare(config=config, image="enat:1")
    assert "wJalrXUtnFEMI" not in str(refused.value)


def test_a_credential_in_another_config_and_one_that_was_committed_are_not_sent(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "pack_code", lambda config: workflow_provenance.pack(config, checkout))
    other = checkout / "configs" / "deeper" / "more.yaml"
    other.write_text("name: more\ntracking: {uri: 'http://user:hunter2@mlflow:5000'}\n")
    with pytest.raises(ValueError, match=r"^configs/deeper/more\.yaml, line 2, holds a credential in an address"):
        submission.prepare(DIGITS, CLUSTER_STORE)
    _git(checkout, "commit", "--quiet", "-am", "oh no")
    other.write_text("name: more\n")
    with pytest.raises(ValueError, match=r"^configs/deeper/more\.yaml, as it was committed or as it is now, holds a credential"):
        submission.prepare(DIGITS, CLUSTER_STORE)
    _git(checkout, "commit", "--quiet", "-am", "never mind")
    assert submission.prepare(DIGITS, CLUSTER_STORE).package is not None


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "RAY_AUTH_TOKEN"])
def test_the_value_of_a_secret_variable_is_refused_anywhere(
    prepare: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "wJalrXUtnFEMI")
    with pytest.raises(ValueError, match=f"^dataset.name holds the value of {name}; give the cluster the credential"):
        prepare("dataset.name=my-wJalrXUtnFEMI")
    assert "wJalrXUtnFEMI" not in str(dataclasses.asdict(prepare("train.num_steps=3")))


def test_a_secret_in_the_code_or_its_changes_is_not_sent(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wJalrXUtnFEMI")
    (checkout / "enat" / "model.py").write_text("token = 'hf_wJalrXUtnFEMI'\n")
    monkeypatch.setattr(submission, "pack_code", lambda config: workflow_provenance.pack(config, checkout))
    with pytest.raises(ValueError, match=r"(enat/model\.py|changes\.diff) holds the value of HF_TOKEN"):
        submission.prepare(DIGITS, CLUSTER_STORE)


@pytest.mark.parametrize(
    "value", ["s3://bucket/prefix", "hf://owner/name@revision", "https://host:8443/path", "/data/a@b", "a@b.org"]
)
def test_ordinary_addresses_are_no_credentials(prepare: Callable[..., Any], value: str) -> None:
    assert f"dataset.name={value}" in prepare(f"dataset.name={value}").arguments


# Room on a cluster ---------------------------------------------------------------------------------------------------------


def _need(num_workers: int, cpus: float = 1, gpus: float = 0, least: int | None = None) -> Need:
    workers = Workers(num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    return Need(node="train", workers=workers, least=least or num_workers)


def test_workers_are_counted_node_by_node() -> None:
    """Four nodes of six CPUs have 24, and no room for a worker with eight."""
    capacity = Capacity(({"CPU": 6.0},) * 4)
    assert judge(_need(3, cpus=8), capacity).room == 0 and judge(_need(4, cpus=6), capacity).fits
    assert "nodes have room for 0; a worker needs all of its own on one node" in (judge(_need(3, cpus=8), capacity).problem or "")
    assert not judge(_need(5, cpus=6), capacity).fits


def test_gpus_and_cpus_both_count() -> None:
    capacity = Capacity(({"CPU": 88.0, "GPU": 8.0}, {"CPU": 16.0}))
    assert judge(_need(8, cpus=8, gpus=1), capacity).fits and judge(_need(11, cpus=8), capacity).fits
    assert judge(_need(9, cpus=8, gpus=1), capacity).room == 8
    problem = judge(_need(9, cpus=8, gpus=1), capacity).problem or ""
    assert "asks for 9 GPUs (9 workers), but the cluster has 8; lower num_workers or gpus_per_worker" in problem


def test_elastic_training_needs_its_least() -> None:
    capacity = Capacity(({"CPU": 2.0},))
    assert judge(_need(8, least=2), capacity).fits and not judge(_need(8, least=3), capacity).fits


def test_an_empty_cluster_has_no_room() -> None:
    assert not judge(_need(1), Capacity(())).fits


@given(st.lists(st.integers(0, 12), max_size=5), st.integers(1, 4), st.integers(1, 5))
def test_room_is_what_placing_one_worker_after_another_finds(nodes: list[int], each: int, parts: int) -> None:
    """cpus_per_worker is a fraction, each / parts."""
    placed, free = 0, [node * parts for node in nodes]
    while any(room >= each for room in free):
        free[next(index for index, room in enumerate(free) if room >= each)] -= each
        placed += 1
    workers = Workers(num_workers=1, cpus_per_worker=each / parts)
    assert Capacity(tuple({"CPU": float(node)} for node in nodes)).room_for(workers) == placed


def test_stages_that_ask_for_nothing_need_nothing(prepare: Callable[..., Any]) -> None:
    run = run_config.load_run(DIGITS)
    known = graph.stages()
    assert need_of("dataset", known["dataset"].workers(run.dataset)) is None
    assert need_of("train@untrained", known["train"].workers(dataclasses.replace(run.train, num_steps=0))) is None
    assert [need.node for need in submission.needs(prepare("targets=[token_map]").config)] == ["tokenizer", "token_map"]
    assert submission.needs(prepare("targets=[dataset]").config) == []


def test_what_the_store_has_needs_no_room(prepare: Callable[..., Any], tmp_path: Path) -> None:
    store, capacity = open_store(str(tmp_path / "store")), Capacity(({"CPU": 4.0},))
    run = prepare("targets=[token_map]", "tokenizer.execution.gpus_per_worker=1", store=(f"store={store.uri}",)).config
    with pytest.raises(ValueError, match=r"^tokenizer\.execution asks for 1 GPUs \(1 workers\), but the cluster has 0") as refused:
        submission.check_room(run, capacity, grows=False)
    assert "not known here" not in str(refused.value)
    submission.check_room(run, capacity, grows=True)
    nodes = graph.build(run)
    for node in nodes[:2]:  # dataset and tokenizer
        found = {each.node.id: each for each in driver.plan(nodes, store)}
        _commit(store, node.stage.name, found[node.id].key)
    assert [item.is_reused for item in driver.plan(nodes, store)] == [True, True, False]
    submission.check_room(run, capacity, grows=False)


def test_where_the_dataset_is_out_of_reach_it_is_said_that_the_store_was_not_asked(prepare: Callable[..., Any]) -> None:
    run = prepare("dataset.kind=image_folder", "dataset.path=/only/on/the/cluster", "generate.execution.num_workers=9").config
    with pytest.raises(
        ValueError, match=r"^generate\.execution asks .*the store could not be checked for finished stages \(.*/only/on"
    ):
        submission.check_room(run, Capacity(({"CPU": 4.0},)), grows=False)


def _commit(store: ArtifactStore, stage: str, key: str) -> None:
    provenance = {"created": "2026-01-02T03:04:05+00:00", "code": "test", "seconds": 0, "worker_seconds": 0, "device_seconds": 0}
    store.commit(Manifest(stage=stage, key=key, stage_version=1, config={}, inputs={}, files=(), provenance=provenance))


def test_what_a_submission_needs_is_what_its_stages_are(tiny_nodes: Callable[..., list[Any]]) -> None:
    for node in tiny_nodes():
        needed = graph.needed_by([node.stage.name])
        for reads in node.inputs.values():
            assert reads.partition("@")[0] in needed, node.id


def test_needs_are_those_of_the_graph(prepare: Callable[..., Any]) -> None:
    nodes = {node.id: need_of(node.id, node.stage.workers(node.config)) for node in graph.build(run_config.load_run(DIGITS))}
    of_graph = {(need.node.partition("@")[0], need.workers) for need in nodes.values() if need is not None}
    assert {(need.node.partition("@")[0], need.workers) for need in submission.needs(prepare().config)} == of_graph


# Where no cluster is -------------------------------------------------------------------------------------------------------


@pytest.fixture
def web_server() -> Iterator[Callable[[bytes], str]]:
    """Servers that give one answer to everything; each one's URL."""
    servers: list[HTTPServer] = []

    def start(answer: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Requests of tests are nobody's news."""

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


_ASK = """
import json, sys
from pipelines.cluster import connection
from pipelines.jobs import client as jobs
connection.prepare_environment()
said = []
for address in sys.argv[1:]:
    try:
        jobs.Cluster(address)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def _ask(*addresses: str) -> list[str]:
    """What is said of addresses where there is no cluster. In a process of its own: Ray reads the token once a process, and this
    one's belongs to the cluster of other tests."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command, token = [sys.executable, "-c", _ASK, *addresses], {"RAY_AUTH_TOKEN": "of-these-tests-" + "0" * 20}
    done = subprocess.run(command, cwd=REPOSITORY, env=around | token, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    said: list[str] = json.loads(done.stdout)
    assert len(said) == len(addresses)
    return said


def test_what_is_no_cluster_is_said_to_be_none(web_server: Callable[[bytes], str]) -> None:
    site, older = web_server(b"<html>a web site</html>"), web_server(b'{"ray_version": "2.44.0"}')
    malformed = ("auto", "head:6379", "ray://head:10001", "http://user:hunter2@head:8265", "ftp://head")
    of_site, of_older, of_nothing, *of_malformed = _ask(site, older, "http://127.0.0.1:1/", *malformed)
    assert of_site.startswith(f"{site} is not Ray's Jobs API")
    assert of_older.startswith(f"the cluster at {older} runs Ray 2.44.0, but this code needs 2.60")
    assert of_nothing.startswith("no Ray cluster with a Jobs API at http://127.0.0.1:1 (nothing listens there)")
    assert all("is not an address of Ray's Jobs API; write http://HOST:8265" in said for said in of_malformed)
    assert not any("hunter2" in said for said in of_malformed)
