"""The documentation of the keys of a config: complete, current, and correct about keys of stages."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipelines.cli.main import commands
from pipelines.run import graph, keys
from pipelines.run.loading import load_run
from pipelines.workflow.config import identity, with_overrides

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"


def test_every_key_is_documented_in_a_sentence() -> None:
    for key in keys.all_keys():
        assert key.text.endswith((".", "`.")) and len(key.text) >= 6, key.path
    shown = {key.path for key in keys.all_keys()}
    assert len(shown) == len(keys.all_keys())
    set_by_the_pipeline = {"report.name", "evaluate.images", "token_map.dataset", "train.s3", "dataset.s3", "reference.dataset.s3"}
    assert not shown & set_by_the_pipeline


def test_guide_page_is_current() -> None:
    assert keys.PAGE.read_text() == keys.reference_page(), "run python -m pipelines.run.keys"


def test_keys_have_type_default_and_unit_of_their_dataclass() -> None:
    (steps,) = keys.find("train.num_steps")
    assert (steps.type, steps.default, steps.unit, steps.in_key) == ("int", "500000", "steps", "yes")
    assert {key.path: key.default for key in keys.find("")}["name"] == "required"
    (betas,) = keys.find("train.betas")
    assert (betas.type, betas.default) == ("list of float", "[0.99, 0.99]")
    assert [key.path for key in keys.find("train.masking")][:2] == ["train.masking", "train.masking.alpha"]


@pytest.mark.slow
def test_documentation_states_which_keys_are_part_of_a_stage_s_key() -> None:
    """Changes each number and switch alone and compares the identity of its stage."""
    run = load_run(DIGITS)
    checked = 0
    for key in keys.all_keys():
        section = key.path.partition(".")[0]
        if section not in graph.stages() or key.in_key == "content" or section in ("dataset", "captions", "reconstruction"):
            continue
        value: Any = run
        for name in key.path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for other in (value + 1, value * 2, value / 2, value + 0.5):
            if type(value)(other) == value:
                continue
            try:
                changed = with_overrides(run, _nested(key.path, type(value)(other)), "a test")
            except ValueError:
                continue
            before, after = (identity(graph.section(graph.stages()[section], each)) for each in (run, changed))
            assert (before != after) == (key.in_key == "yes"), key.path
            checked += 1
            break
    assert checked > 50


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return typing.cast("dict[str, Any]", value)


def test_command_shows_sections_a_section_and_a_key() -> None:
    runner = CliRunner()
    assert "train" in runner.invoke(commands, ["config"]).output
    assert "train.learning_rate" in runner.invoke(commands, ["config", "train"]).output
    one = runner.invoke(commands, ["config", "train.num_steps"])
    assert one.exit_code == 0 and "500000" in one.output and "untrained" in one.output
    (answer,) = json.loads(runner.invoke(commands, ["config", "train.num_steps", "--json"]).output)
    assert answer == dataclasses.asdict(keys.find("train.num_steps")[0])


def test_unknown_keys_are_errors_with_the_closest_key() -> None:
    for path, closest in (("train.num_stps", "train.num_steps"), ("num_epochs", "reference.num_epochs")):
        with pytest.raises(ValueError, match=f"unknown key {path}; did you mean {closest}"):
            keys.find(path)
