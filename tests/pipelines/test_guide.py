"""The pages of the guide and the README say what is so: files, settings and messages that they name are there."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from pipelines.run.config import RunConfig

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "pipelines" / "guide"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "infra" / "README.md", *sorted(GUIDE.glob("*.md"))]
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}


def _settings(page: Path) -> set[str]:
    """`train.execution.keep_last` and the like, also within a command."""
    text = page.read_text()
    return {key for key in re.findall(r"\b((?:\w+\.)+\w+)(?=[=:`])", text) if key.split(".")[0] in SECTIONS and "/" not in key}


def _is_setting(config: object, key: str) -> bool:
    name, _, rest = key.partition(".")
    kinds = typing.get_type_hints(config).get(name)
    if kinds is None:
        return False
    inner = [kind for kind in (typing.get_args(kinds) or (kinds,)) if dataclasses.is_dataclass(kind)]
    return not rest or any(_is_setting(kind, rest) for kind in inner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for place in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = place.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), place
        lines = target.read_text().splitlines() if heading else []
        headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line.startswith("#")}
        assert not heading or heading in headings, place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_settings_that_a_page_names_exist(page: Path) -> None:
    names = {name for name in _settings(page) if not name.endswith((".yaml", ".py", ".md", ".json", ".parquet", ".npz"))}
    assert not {name for name in names if not _is_setting(RunConfig, name)}


def test_the_check_of_settings_refuses_what_is_none() -> None:
    assert _is_setting(RunConfig, "train.execution.keep_last") and not _is_setting(RunConfig, "train.execution.keep_lasts")
    assert _settings(GUIDE / "train.md") and not _is_setting(RunConfig, "train.keep_last")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_configs_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"\b((?:imagenet|coco|digits)[\w-]*\.yaml)", page.read_text()))
    assert named <= {path.name for path in (REPOSITORY / "configs").glob("*.yaml")}


def test_every_page_of_the_guide_is_in_the_readme() -> None:
    linked = set(re.findall(r"\(pipelines/guide/([\w.-]+)\)", (REPOSITORY / "README.md").read_text()))
    assert linked == {path.name for path in GUIDE.iterdir() if path.suffix in {".md", ".ipynb"}}


def test_every_folder_is_in_the_map_of_the_readme_and_names_its_files() -> None:
    section = (REPOSITORY / "README.md").read_text().partition("| folder | what it holds |")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:enat|pipelines)/[\w/]*)`", section))
    packages = {path.parent for name in ("enat", "pipelines") for path in (REPOSITORY / name).rglob("__init__.py")}
    assert named == {f"{package.relative_to(REPOSITORY)}/" for package in packages} | {"pipelines/guide/"}
    for package in packages:
        text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
        files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
        assert not {name for name in files if not re.search(rf"\b{name}\b", text)}, f"{package}/__init__.py does not name them"


def test_the_readme_tells_all_exit_codes_of_the_command() -> None:
    sources = [path.read_text() for path in (REPOSITORY / "pipelines").rglob("*.py")]
    codes = {code for text in sources for code in re.findall(r"(?:_fail\(.*, |sys\.exit\()(\d+)\)", text)}
    (told,) = re.findall(r"Exit codes: ([^.]+)", (REPOSITORY / "README.md").read_text())
    assert {"1", "2", "130"} <= codes <= set(re.findall(r"\d+", told))


def test_infra_s_readme_tells_the_times_of_the_schedules_and_images_are_told_their_commit() -> None:
    infra = REPOSITORY / "infra"
    utc = ("kuberay/reevaluate.yaml", "timeZone: Etc/UTC"), ("single-machine/enat-reevaluate.timer", "03:00:00 UTC")
    assert all(words in (infra / file).read_text() for file, words in utc)
    assert "The CronJob and the timer go by UTC" in (infra / "README.md").read_text()
    services = yaml.safe_load((infra / "compose.yaml").read_text())["services"].values()
    built = [service["build"] for service in services if service.get("build", {}).get("target") == "enat"]
    assert built and all(build["args"]["REVISION"] == "${REVISION:-unknown}" for build in built)


# What has its place in the page: a message that is worded anew, or goes, is to take its row along.
_EXPLAINED = (
    "is not noted, so that ... may take it for unused",
    "is gone, though its manifest lists it",
    "ENAT_CACHE_GB=... is no size in GiB",
    "this run goes on without it",
    "start the server, or name another by",
    "does not know this user or password (401)",
    "keeps no ... of its images",
    "stage ... failed: ",
)


def test_troubleshooting_explains_what_people_are_most_likely_to_meet() -> None:
    assert set(_EXPLAINED) <= set(_messages())


def _messages() -> list[str]:
    rows = [line for line in (GUIDE / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize("message", _messages())
def test_the_code_says_what_troubleshooting_explains(message: str) -> None:
    """A message of several pieces, with "..." or X and N where values stand."""
    code = "\n".join(path.read_text() for folder in ("pipelines", "enat") for path in (REPOSITORY / folder).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences that go on in the next line
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|\b[XN]\b", message)]
    assert all(piece in joined for piece in pieces if piece)
