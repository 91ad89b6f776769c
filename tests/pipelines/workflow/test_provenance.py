"""The code of a checkout, an image or an installation: what identifies it, and what is packed for a cluster."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipelines.workflow import provenance
from pipelines.workflow.provenance import CodePackage, pack, read_changes, read_state, state_of, write_record

SENT = {"enat/__init__.py", "enat/model.py", "pipelines/cli.py", "pipelines/templates/page.j2", "configs/digits.yaml"}
SENT |= {"configs/deeper/more.yaml", "code.json"}


def _git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit_all(root: Path, message: str) -> None:
    _git(root, "add", ".")
    _git(root, "commit", "--quiet", "-m", message)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository laid out like this one, with files that are packed and files that are not."""
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
    commit_all(root, "first")
    return root


def _pack(checkout: Path) -> CodePackage:
    return pack(checkout / "configs" / "digits.yaml", checkout)


def _archive(package: CodePackage) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(package.content))


def test_package_holds_tracked_code_and_configs_and_the_commit(checkout: Path, tmp_path: Path) -> None:
    for name in ("runs/mlflow.db", "pipelines/debug.log", ".env", "enat/__pycache__/model.pyc", "pipelines/new.py"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("private")
    package = _pack(checkout)
    assert set(_archive(package).namelist()) == SENT and package.config == "configs/digits.yaml"
    assert package.left_behind == ("pipelines/new.py",)
    assert "pipelines/new.py" in provenance.describe_left_behind(package.left_behind)
    record = json.loads(_archive(package).read("code.json"))
    assert record["commit"] == _git(checkout, "rev-parse", "HEAD") and record["diff_digest"] is None
    assert package.state.label == f"{package.state.version}+g{record['commit'][:12]}"
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    package = pack(tmp_path / "mine.yaml", checkout)
    assert package.config == "submitted/mine.yaml" and _archive(package).read(package.config) == b"name: mine\n"
    (checkout / ".rayignore").write_text("configs/deeper/\n*.j2\n")
    held_back = {"configs/deeper/more.yaml", "pipelines/templates/page.j2"}
    assert set(_archive(_pack(checkout)).namelist()) == SENT - held_back


def test_changes_are_packed_as_files_and_as_a_patch_that_git_can_apply(checkout: Path, tmp_path: Path) -> None:
    (checkout / "enat" / "model.py").write_text("width = 2\n")
    (checkout / "pipelines" / "templates" / "page.j2").unlink()
    package = _pack(checkout)
    archive = _archive(package)
    assert archive.read("enat/model.py") == b"width = 2\n" and "pipelines/templates/page.j2" not in archive.namelist()
    assert package.state.diff_digest is not None and package.state.label.endswith(f"+dirty.{package.state.diff_digest[:12]}")
    clone = tmp_path / "clone"
    _git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    (tmp_path / "changes.diff").write_bytes(archive.read("changes.diff"))
    _git(clone, "apply", str(tmp_path / "changes.diff"))
    assert (clone / "enat" / "model.py").read_text() == "width = 2\n"
    assert not (clone / "pipelines" / "templates" / "page.j2").exists()
    archive.extractall(tmp_path / "unpacked")
    assert read_state(tmp_path / "unpacked") == state_of(tmp_path / "unpacked") == state_of(checkout) == package.state
    assert read_changes(tmp_path / "unpacked") == package.files["changes.diff"]
    assert read_state(checkout) is None and read_changes(checkout) is None, "a checkout has no record"


def test_patch_does_not_depend_on_the_settings_of_git(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".gitattributes").write_text("*.py diff=upper\n")
    model = checkout / "enat" / "model.py"
    model.write_text("".join(f"line_{number} = {number % 3}\n\n" for number in range(40)))
    commit_all(checkout, "longer")
    model.write_text(model.read_text().replace("line_20 = 2\n", "").replace("line_25 = 1\n\n", "line_25 = 7\n"))
    (checkout / "pipelines" / "templates" / "page.j2").rename(checkout / "pipelines" / "templates" / "other.j2")
    _git(checkout, "add", ".")
    before = _pack(checkout)
    settings = tmp_path / "settings"
    settings.write_text(
        "[core]\nquotepath = true\n[color]\nui = always\n"
        "[diff]\nnoprefix = true\nmnemonicPrefix = true\ncontext = 1\ninterHunkContext = 9\nalgorithm = patience\n"
        f"renames = copies\nsuppressBlankEmpty = true\nexternal = false\norderFile = {tmp_path}/order\n"
        '[diff "upper"]\ntextconv = tr a-z A-Z <\n'
    )
    (tmp_path / "order").write_text("pipelines/*\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    assert "LINE_" in _git(checkout, "diff", "--no-ext-diff", "HEAD"), "git reads the settings"
    assert _pack(checkout).content == before.content


def test_a_repository_that_git_cannot_read_is_an_error(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It must not be mistaken for code without a repository or without changes."""
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        with pytest.raises(ValueError, match=r"git ls-files fails in .*dubious ownership") as refused:
            _pack(checkout)
        assert "\n" not in str(refused.value)
        with pytest.raises(ValueError, match="dubious ownership"):
            state_of(checkout)
        patch.setattr(provenance, "state_of", lambda: state_of(checkout))
        label = provenance.code_version.__wrapped__()
        assert label.endswith("+unknown") and label in caplog.text and f"git ls-files fails in {checkout}" in caplog.text
    git, wrapper = shutil.which("git"), tmp_path / "bin" / "git"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" diff "*) echo fatal: broken >&2; exit 128;; esac\nexec {git} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"^git diff fails in .*: fatal: broken$"):
        _pack(checkout)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="is a git repository, but git cannot be started"):
        _pack(checkout)
    shutil.rmtree(checkout / ".git")
    state = state_of(checkout)
    assert state.commit is None and state.label == f"{state.version}+code.{state.digest[:12]}"


def test_an_image_records_the_commit_that_it_was_built_from(checkout: Path) -> None:
    state = state_of(checkout)
    shutil.rmtree(checkout / ".git")
    write_record(str(state.commit), checkout)
    recorded = state_of(checkout)
    assert recorded.commit == state.commit and len(recorded.digest) == 64 and recorded.label == state.label
    write_record("unknown", checkout)
    assert state_of(checkout).label == f"{state.version}+code.{recorded.digest[:12]}"
    for wrong in ("", "main", str(state.commit)[:12]):
        with pytest.raises(ValueError, match=r"^REVISION is "):
            write_record(wrong, checkout)


def test_equal_code_has_equal_bytes_and_digests(checkout: Path) -> None:
    first = _pack(checkout)
    for path in checkout.glob("*/*.py"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o600)
    assert _pack(checkout).content == first.content
    (checkout / "README.md").write_text("another text")
    commit_all(checkout, "second")
    assert _pack(checkout).state.digest == first.state.digest
    (checkout / "enat" / "model.py").write_text("width = 3\n")
    changed = _pack(checkout).state.digest
    assert changed != first.state.digest
    commit_all(checkout, "third")
    assert _pack(checkout).state.digest == changed, "committed or not, it is the same code"


def test_large_files_and_symbolic_links_are_refused(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "SIZE_LIMIT", 1_000_000)
    (checkout / "pipelines" / "weights.bin").write_bytes(os.urandom(1_100_000))
    commit_all(checkout, "too large")
    with pytest.raises(ValueError, match=r"is 1\.1 MB, more than 1 MB; the largest files are pipelines/weights\.bin, "):
        _pack(checkout)
    (tmp_path / "secret").write_text("x")
    (checkout / "pipelines" / "link.py").symlink_to(tmp_path / "secret")
    _git(checkout, "add", ".")
    with pytest.raises(ValueError, match=r"pipelines/link\.py is a symbolic link"):
        _pack(checkout)


def test_installed_code_is_packed_even_inside_a_repository_that_ignores_it(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / "runs" / "site-packages"
    for name in ("enat/model.py", "pipelines/cli.py", "pipelines/__pycache__/cli.pyc"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text("x = 1\n")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    package = pack(tmp_path / "mine.yaml", installed)
    assert set(_archive(package).namelist()) == {"enat/model.py", "pipelines/cli.py", "submitted/mine.yaml", "code.json"}
    assert package.state.commit is None and package.left_behind == ()
