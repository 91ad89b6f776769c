"""The campaign itself: a seed names its cases, a journal resumes it, and what is wrong fails it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.storage.base import digest_of

CAMPAIGN = Path(__file__).with_name("campaign.py")


def _journal(folder: Path, seed: str = "s") -> Path:
    return folder / f"journal-{digest_of(seed)[:12]}.jsonl"


def _run(folder: Path, count: int, seed: str = "s") -> tuple[int, list[dict]]:
    command = [sys.executable, CAMPAIGN, "--seed", seed, "--inputs", str(count), "--folder", folder, "--table", folder / "table.md"]
    code = subprocess.run(command, capture_output=True, timeout=120, check=False).returncode
    return code, [json.loads(line) for line in _journal(folder, seed).read_text().splitlines()]


@pytest.mark.faults
def test_a_campaign_resumes_after_its_journal_and_its_seed_names_its_cases(tmp_path: Path) -> None:
    assert _run(tmp_path / "whole", 12)[0] == 0
    code, journal = _run(tmp_path / "resumed", 5)
    assert code == 0 and len(journal) == 6
    code, resumed = _run(tmp_path / "resumed", 12)
    whole = _run(tmp_path / "whole", 12)[1]
    assert code == 0 and resumed[:6] == journal
    named = [[(line["number"], line["outcomes"][0]["verdict"]) for line in lines[1:]] for lines in (whole, resumed)]
    assert named[0] == named[1] and len(named[0]) == 12
    assert (tmp_path / "whole" / "table.md").read_text().splitlines()[2].startswith("| inputs | 12 |")
    assert _run(tmp_path / "whole", 12, seed="another")[1][1:] != whole[1:]


@pytest.mark.faults
def test_a_verdict_that_is_bad_fails_the_campaign(tmp_path: Path) -> None:
    _run(tmp_path, 1)
    journal = _journal(tmp_path)
    journal.write_text(
        journal.read_text().replace('"verdict": "accepted"', '"verdict": "outside"').replace('"refused"', '"outside"')
    )
    assert _run(tmp_path, 1)[0] == 1
