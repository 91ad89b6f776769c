"""Files that describe the project: the citation is valid, and commands and paths of CONTRIBUTING.md exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]


def test_the_citation_is_valid_and_names_the_paper(tmp_path: Path) -> None:
    def check(path: Path) -> int:
        arguments = ["--builtin-schema", "vendor.citation-file-format", "--default-filetype", "yaml", str(path)]
        command = [sys.executable, "-m", "check_jsonschema", *arguments]
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode

    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert check(REPOSITORY / "CITATION.cff") == 0
    (tmp_path / "CITATION.cff").write_text(yaml.safe_dump({name: value for name, value in citation.items() if name != "authors"}))
    assert check(tmp_path / "CITATION.cff") == 1
    paper = citation["preferred-citation"]
    assert paper["url"].removeprefix("https://") in (REPOSITORY / "README.md").read_text() and paper["year"] == 2024
    assert len(paper["authors"]) == 8 and paper["authors"][0]["family-names"] == "Ni"


def test_what_contributing_names_exists() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert {"setup", "lint", "test", "docs"} <= named <= targets
    paths = set(re.findall(r"[`(]([\w.]+/[\w./]+|[\w.]+\.(?:toml|md|lock))[`)]", text))
    assert len(paths) > 8 and not [path for path in paths if not (REPOSITORY / path).exists()]
