"""`enat evaluate --conformance`: scores of a small set equal torch-fidelity's, and a difference is an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.cli.main import commands
from pipelines.run import conformance
from pipelines.run.conformance import Agreement, KnownScores


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_scores_of_the_small_set_are_those_of_torch_fidelity() -> None:
    answer = CliRunner().invoke(commands, ["evaluate", "--conformance", "--json"], catch_exceptions=False)
    found = {each["score"]: each for each in json.loads(answer.stdout)}
    assert answer.exit_code == 0 and {"fid", "kid", "inception_score", "precision", "recall"} <= found.keys()
    assert all(each["agrees"] for each in found.values()) and found["fid"]["ours"] > 1
    assert "random weights" in answer.stderr


def test_a_difference_is_shown_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Agreement("fid", 3.94, 3.95, 0.01), Agreement("sfid", 6.5, 6.14, 0.02)]
    monkeypatch.setattr(conformance, "check_small_set", lambda weights, console: found)
    answer = CliRunner().invoke(commands, ["evaluate", "--conformance"])
    assert answer.exit_code == 1 and "agrees" in answer.stdout and "differs" in answer.stdout


def test_published_samples_are_scored_under_their_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small file in the role of a published one: its scores by the stages against stated ones."""
    name = "admnet_guided_upsampled_imagenet256.npz"
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        conformance,
        "_scores",
        lambda images, overrides, console: (
            asked.append((images.name, overrides))
            or {"fid": 3.95, "sfid": 6.1, "inception_score": 216.0, "precision": 0.8268, "recall": 0.531}
        ),
    )
    np.savez(tmp_path / name, np.zeros((2, 4, 4, 3), np.uint8))
    answer = CliRunner().invoke(commands, ["evaluate", "--conformance", "--samples", str(tmp_path / name), "reference.npz=r.npz"])
    assert answer.exit_code == 0, answer.output
    assert asked == [
        (name.partition(".")[0], ["reference.extractor=inception", "evaluate.settings.split_size=5000", "reference.npz=r.npz"])
    ]
    assert isinstance(conformance.PUBLISHED[name], KnownScores)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--conformance", "--samples", "mine.npz"], "the scores of mine.npz are not known here"),
        (["--conformance", "seed=3"], "takes reference.weights=FILE only, not seed"),
        (["--samples", "mine.npz"], "give --samples and --name, or --conformance"),
    ],
)
def test_wrong_requests_are_refused(arguments: list[str], sentence: str) -> None:
    answer = CliRunner().invoke(commands, ["evaluate", *arguments])
    assert (answer.exit_code == 2 or isinstance(answer.exception, ValueError)) and sentence in answer.output + str(answer.exception)
