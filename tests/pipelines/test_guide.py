"""The pages of the guide and the README are up to date: the files, settings and messages that they name exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import subprocess
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from enat.images import png_bytes
from material.digits_run import ENAT, fresh_environment
from material.layouts import write
from pipelines.cli.main import commands
from pipelines.run.config import RunConfig
from pipelines.workflow.config import PRESET

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "pipelines" / "guide"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "infra" / "README.md", REPOSITORY / "CHANGELOG.md", *sorted(GUIDE.glob("*.md"))]
PRESET_KEYS = {f"{section}.{PRESET}" for section in RunConfig.PRESETS}
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}
_FILES = (".yaml", ".py", ".md", ".json", ".parquet", ".npz")


def _settings(page: Path) -> set[str]:
    """Dotted keys such as `train.execution.keep_last`, including those in commands."""
    text = page.read_text()
    keys = re.findall(r"\b((?:\w+\.)+\w+)(?=[=:`])", text)
    return {key for key in keys if key.split(".")[0] in SECTIONS and not key.endswith(_FILES)}


def _is_setting(config: object, key: str) -> bool:
    name, _, rest = key.partition(".")
    kinds = typing.get_type_hints(config).get(name)
    if kinds is None:
        return False
    inner = [kind for kind in (typing.get_args(kinds) or (kinds,)) if dataclasses.is_dataclass(kind)]
    return not rest or any(_is_setting(kind, rest) for kind in inner)


def test_links_settings_and_configs_that_pages_name_exist() -> None:
    configs = {path.name for path in (REPOSITORY / "configs").glob("*.yaml")}
    wrong = []
    for page in PAGES:
        text = page.read_text()
        wrong += [(page.name, link) for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text) if not _leads_somewhere(page, link)]
        if page.name != "CHANGELOG.md":  # which names the settings of earlier versions
            wrong += [(page.name, key) for key in _settings(page) if not _is_setting(RunConfig, key) and key not in PRESET_KEYS]
        wrong += [(page.name, name) for name in set(re.findall(r"\b((?:imagenet|coco|digits)[\w-]*\.yaml)", text)) - configs]
    assert not wrong


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = (page.parent / path) if path else page
    lines = target.read_text().splitlines() if heading and target.exists() else []
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line.startswith("#")}
    return target.exists() and (not heading or heading in headings)


def test_these_checks_find_what_is_wrong() -> None:
    assert _is_setting(RunConfig, "train.execution.keep_last") and not _is_setting(RunConfig, "train.execution.keep_lasts")
    assert _settings(GUIDE / "train.md") and not _is_setting(RunConfig, "train.keep_last")
    page = REPOSITORY / "README.md"
    assert _leads_somewhere(page, "infra/README.md#sizes")
    assert not _leads_somewhere(page, "infra/README.md#no-such-heading") and not _leads_somewhere(page, "no-such-file.md")


def test_the_readme_links_every_page_of_the_guide() -> None:
    linked = set(re.findall(r"\(pipelines/guide/([\w-]+\.(?:md|ipynb))\)", (REPOSITORY / "README.md").read_text()))
    assert linked == {path.name for path in GUIDE.iterdir() if path.suffix in {".md", ".ipynb"}}


def test_the_readme_maps_every_folder_and_every_folder_names_its_files() -> None:
    section = (REPOSITORY / "README.md").read_text().partition("| folder | what it holds |")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:enat|pipelines)/[\w/]*)`", section))
    packages = {path.parent for name in ("enat", "pipelines") for path in (REPOSITORY / name).rglob("__init__.py")}
    assert named == {f"{package.relative_to(REPOSITORY)}/" for package in packages} | {"pipelines/guide/"}
    for package in packages:
        text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
        files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
        assert not {name for name in files if not re.search(rf"\b{name}\b", text)}, f"{package}/__init__.py does not name them"


def test_the_readme_lists_all_exit_codes() -> None:
    sources = [path.read_text() for path in (REPOSITORY / "pipelines").rglob("*.py")]
    codes = {code for text in sources for code in re.findall(r"(?:_fail\(.*, |sys\.exit\()(\d+)\)", text)}
    (listed,) = re.findall(r"Exit codes: ([^.]+)", (REPOSITORY / "README.md").read_text())
    assert {"1", "2", "130"} <= codes <= set(re.findall(r"\d+", listed))


def test_the_readme_of_infra_gives_the_times_of_the_schedules_and_images_receive_their_commit() -> None:
    infra = REPOSITORY / "infra"
    utc = ("kuberay/reevaluate.yaml", "timeZone: Etc/UTC"), ("single-machine/enat-reevaluate.timer", "03:00:00 UTC")
    assert all(words in (infra / file).read_text() for file, words in utc)
    assert "03:00 UTC" in (infra / "README.md").read_text()
    services = yaml.safe_load((infra / "compose.yaml").read_text())["services"].values()
    built = [service["build"] for service in services if service.get("build", {}).get("target") == "enat"]
    assert built and all(build["args"]["REVISION"] == "${REVISION:-unknown}" for build in built)


def _own_dataset(folder: Path) -> list[list[str]]:
    """The folder and the config of the page on datasets, and the commands of its example, without `enat`."""
    page = (GUIDE / "own-dataset.md").read_text().partition("## Example")[2].partition("## Larger images")[0]
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (folder / "flowers.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    for name, count in {"daisy": 24, "rose": 20, "tulip": 17}.items():
        for number in range(count):
            pixels = np.random.default_rng([count, number]).integers(0, 256, (20, 24, 3), np.uint8)
            write(folder / "flowers" / name / f"{number}.png", png_bytes(Image.fromarray(pixels)))
    write(folder / "flowers" / "daisy" / "notes.txt", b"")
    (folder / "flowers" / "empty").mkdir()
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ (enat .*)", page, re.MULTILINE)]


@pytest.mark.slow
def test_the_dataset_of_the_guide_is_indexed_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor, run = _own_dataset(tmp_path)[:2]
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(commands, doctor).output
    assert "✓ dataset       image_folder, flowers" in shown and "✗" not in shown
    ended = subprocess.run([str(ENAT), *run], env=fresh_environment(), check=True, capture_output=True, text=True, timeout=120)
    assert "61 images, 4 classes, other files 1, classes without images 1" in " ".join(ended.stdout.split())


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_the_dataset_of_the_guide_becomes_a_scored_model(tmp_path: Path) -> None:
    later = _own_dataset(tmp_path)[2:]
    (tmp_path / "flowers" / "empty").rmdir()
    for arguments in later:
        subprocess.run([str(ENAT), *arguments], cwd=tmp_path, env=fresh_environment(), check=True)
    assert (tmp_path / "runs" / "flowers.html").exists() and len(later) == 2


# Names, commands and words of the most frequent problems; the wording of the messages may change.
_EXPLAINED = (
    "stage ... failed: ", "(401)", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "ENAT_CACHE_GB", ".used",
    "older code", "enat artifacts verify --all", "If-None-Match", "--wait-for-nodes",
)  # fmt: skip


def _messages() -> list[str]:
    rows = [line for line in (GUIDE / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_troubleshooting_explains_the_most_likely_problems() -> None:
    page = (GUIDE / "troubleshooting.md").read_text()
    assert not [words for words in _EXPLAINED if words not in page]


def test_the_code_contains_the_messages_that_troubleshooting_explains() -> None:
    """A message may consist of several pieces, with "...", X or N in place of values."""
    code = "\n".join(path.read_text() for folder in ("pipelines", "enat") for path in (REPOSITORY / folder).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that continue on the next line
    messages = _messages()
    pieces = {message: [piece.strip() for piece in re.split(r"\.\.\.|\b[XN]\b", message)] for message in messages}
    assert len(messages) > 40
    assert not [message for message in messages if not all(piece in joined for piece in pieces[message] if piece)]
