"""Comparisons: real MLflow, runs as the pipeline logs them, and everything that may be odd about those."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from pipelines import cli, compare, compare_plots, compare_table, comparison, tracking
from pipelines.artifacts import canonical_json
from pipelines.commands.compare import compare as command
from pipelines.compare_page import grids_sentence
from pipelines.compare_plots import cost_figure, spread
from pipelines.compare_sweeps import find_sweeps, sweep_figure
from pipelines.comparison import Comparison, Query, Row, Section
from pipelines.tracked import TrackingError
from pipelines.tracking import RunHandle, TrackingConfig

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
PROTOCOL = {
    "extractor": "inception",
    "extractor_digest": "e" * 64,
    "reference": "imagenet/train/256",
    "reference_digest": "f" * 64,
    "num_samples": 50_000,
    "num_reference": 1_281_167,
    "rounding": "uint8",
    "labels": "each class in turn",
    "metric_version": 1,
}


@dataclass
class Lab:
    """One experiment, and runs in it as `enat run` logs them."""

    uri: str
    experiment: str
    client: MlflowClient

    def start(self, name: str, tags: Mapping[str, str] | None = None, parent: RunHandle | None = None) -> RunHandle:
        return tracking.start_run(self.uri, TrackingConfig(experiment=self.experiment), name, tags or {}, parent)

    def generate(self, samples: str, parent: RunHandle | None = None, **params: Any) -> None:
        key = samples.partition("/")[2]
        run = self.start("generate", {"enat.stage": "generate", "enat.key": key}, parent)
        run.log_params({"seed": 0, "sampler": params, "execution": {"num_workers": 3}})
        run.finish()

    def evaluate(
        self,
        metrics: Mapping[str, float] | None = None,
        *,
        samples: str | None = "generate/" + "a1" * 32,
        protocol: Mapping[str, Any] | str | None = PROTOCOL,
        parent: RunHandle | None = None,
        status: str = "FINISHED",
        grid: bytes | None = None,
        **tags: Any,
    ) -> str:
        """A run of stage evaluate; tags by their names without "enat.", None leaves one out."""
        text = canonical_json(dict(protocol)).decode() if isinstance(protocol, Mapping) else protocol
        values = {
            "stage": "evaluate",
            "node": "evaluate",
            "model": "enat-l-imagenet",
            "variant": "main",
            "dataset": "imagenet",
            "resolution": 256,
            "parameters": 574_300_000,
            "train_steps": 500_000,
            "num_steps": 8,
            "guidance_scale": 3.5,
            "num_samples": protocol.get("num_samples") if isinstance(protocol, Mapping) else None,
            "protocol": text,
            "protocol_digest": hashlib.sha256(text.encode()).hexdigest()[:12] if text else None,
            "samples": samples,
            "digest": "d" * 64,
            **tags,
        }
        run = self.start("evaluate", {f"enat.{name}": str(v) for name, v in values.items() if v is not None}, parent)
        run.log_metrics({"fid": 2.79, "gmacs_total": 347.0} if metrics is None else metrics)
        if grid is not None:
            run.log_bytes(grid, "samples.png")
        if status != "RUNNING":
            run.finish(status)
        assert run.run_id is not None
        return run.run_id

    def compare(self, *runs: str, filter: str | None = None, published: str = "none") -> Comparison:
        return comparison.compare(self.uri, Query(experiments=(self.experiment,), filter=filter, runs=runs), published)

    def rows(self, *runs: str, filter: str | None = None) -> list[Row]:
        return self.compare(*runs, filter=filter).rows


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('compare') / 'mlflow.db'}"


_numbers = count()


@pytest.fixture
def lab(uri: str) -> Lab:
    """An experiment that no other test uses, with nothing in it."""
    lab = Lab(uri, f"lab-{next(_numbers)}", MlflowClient(uri))
    run = lab.start("empty")
    lab.client.delete_run(run.run_id)
    return lab


def _key(number: int) -> str:
    return f"generate/{number:064x}"


def _text(comparison: Comparison, width: int = 1000) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    compare_table.show(comparison, console)
    with closing(console.file) as file:
        assert isinstance(file, io.StringIO)
        return file.getvalue()


# Rows ----------------------------------------------------------------------------------------------------------------------


def test_a_row_holds_what_tags_and_metrics_say(lab: Lab) -> None:
    parent = lab.start("imagenet256-sizes")
    run_id = lab.evaluate(parent=parent, variant="xl", model="enat-xl-imagenet", **{"input.model": "train/abc"})
    (row,) = lab.rows()
    assert row.run_ids == (run_id,) and row.config_run == "imagenet256-sizes"
    assert (row.model, row.variant, row.label) == ("enat-xl-imagenet", "xl", "enat-xl-imagenet (xl)")
    assert (row.dataset, row.resolution, row.parameters, row.train_steps) == ("imagenet", 256, 574_300_000, 500_000)
    assert (row.num_steps, row.guidance_scale, row.num_samples, row.trained) == (8, 3.5, 50_000, "train/abc")
    assert row.metrics == {"fid": 2.79, "gmacs_total": 347.0} and row.protocol == PROTOCOL
    values = compare_table.record(row)
    assert values["tflops"] == pytest.approx(0.347) and values["source"] == "measured here"


def test_an_evaluation_that_was_reused_is_one_row_the_newest_run_s(lab: Lab) -> None:
    first = lab.evaluate({"fid": 2.79})
    other = lab.evaluate({"fid": 3.0}, samples=_key(2), num_steps=16)
    newest = lab.evaluate({"fid": 2.79}, variant="again")
    rows = {row.num_steps: row for row in lab.rows()}
    assert rows[8].run_ids == (newest, first) and rows[8].variant == "again" and rows[16].run_ids == (other,)
    started = lab.client.get_run(first).info.start_time / 1000
    assert rows[8].measured.timestamp() == pytest.approx(started), "the day it was measured, not that it was reused"


def test_the_newest_numbers_win_where_the_same_samples_were_scored_again(lab: Lab) -> None:
    lab.evaluate({"fid": 9.0, "recall": 0.1})
    newest = lab.evaluate({"fid": 2.0}, digest="other")
    (row,) = lab.rows()
    assert row.metrics == {"fid": 2.0} and row.run_ids[0] == newest
    assert row.measured.timestamp() == pytest.approx(lab.client.get_run(newest).info.start_time / 1000)


def test_runs_without_samples_are_never_taken_for_each_other(lab: Lab) -> None:
    lab.evaluate(samples=None)
    lab.evaluate(samples=None)
    assert len(lab.rows()) == 2


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "RUNNING"])
def test_what_did_not_finish_is_left_out(lab: Lab, status: str) -> None:
    kept = lab.evaluate(samples=_key(1))
    lab.evaluate(samples=_key(2), status=status)
    assert [row.run_ids for row in lab.rows()] == [(kept,)]


def test_what_was_deleted_or_belongs_elsewhere_is_left_out(lab: Lab) -> None:
    kept = lab.evaluate(samples=_key(1))
    lab.client.delete_run(lab.evaluate(samples=_key(2)))
    lab.start("train", {"enat.stage": "train"}).finish()
    replace(lab, experiment=f"{lab.experiment}-other").evaluate(samples=_key(3))
    assert [row.run_ids for row in lab.rows()] == [(kept,)]


def test_several_experiments_can_be_compared(lab: Lab) -> None:
    other = replace(lab, experiment=f"{lab.experiment}-other")
    lab.evaluate(samples=_key(1))
    other.evaluate(samples=_key(2))
    found = comparison.compare(lab.uri, Query(experiments=(lab.experiment, other.experiment)), "none")
    assert len(found.rows) == 2


def test_what_is_missing_is_missing_and_not_zero(lab: Lab) -> None:
    names = ("parameters", "train_steps", "num_steps", "guidance_scale", "resolution", "dataset")
    lab.evaluate({"fid": 2.0, "recall": float("nan")}, **dict.fromkeys(names))
    lab.evaluate({"gmacs_total": 1.0, "recall": 0.5}, samples=_key(2), **dict.fromkeys(names))
    first = next(row for row in lab.rows() if "fid" in row.metrics)
    assert [getattr(first, name) for name in names] == [None] * 6 and first.metrics == {"fid": 2.0}
    line = next(line for line in _text(lab.compare()).splitlines() if "2.00" in line)
    assert line.split()[:4] == ["enat-l-imagenet", "–", "2.00", "–"], "GMACs, FID, recall"
    assert "parameters" not in compare_table.to_json(lab.compare())["sections"][0]["rows"][0]


def test_a_tag_that_is_no_number_is_shown_as_missing_and_named(lab: Lab) -> None:
    run_id = lab.evaluate(parameters="many", guidance_scale="nan", num_steps="8.0")
    found = lab.compare()
    assert found.rows[0].parameters is None and found.rows[0].guidance_scale is None and found.rows[0].num_steps == 8
    assert any(f"enat.parameters of run {run_id} is 'many'" in note for note in found.notes)


def test_runs_of_before_there_were_such_tags_are_compared_as_far_as_they_say(lab: Lab) -> None:
    tags = dict.fromkeys(("model", "variant", "dataset", "parameters"))
    old = {"samples": None, "protocol": None, "input.samples": "generate/abc", **tags}
    lab.evaluate({"frechet_distance": 6.5}, node="evaluate@untrained", **old)
    found = lab.compare()
    (row,) = found.rows
    assert row.variant == "untrained" and row.samples == "generate/abc" and row.model == "evaluate"
    assert any("it is not known how they were measured" in note for note in found.notes)
    assert "how these were measured is not known" in _text(found)


# Finding -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nested(lab: Lab) -> dict[str, str]:
    """A sweep of two config runs with one evaluation each, and a config run that is called like one of them."""
    sweep = lab.start("sweep")
    ids = {"sweep": str(sweep.run_id)}
    for number, name in enumerate(("first", "second")):
        config = lab.start(name, parent=sweep)
        ids[name] = str(config.run_id)
        ids[f"{name}/evaluate"] = lab.evaluate({"fid": 2.0 + number}, samples=_key(number), parent=config)
    ids["other/evaluate"] = lab.evaluate({"fid": 8.0}, samples=_key(9), parent=lab.start("first"))
    return ids


def _found(rows: list[Row]) -> set[float]:
    return {row.metrics["fid"] for row in rows}


def test_runs_are_found_by_name_or_id_at_any_depth(lab: Lab, nested: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_IDS_PER_QUERY", 1)
    assert _found(lab.rows()) == {2.0, 3.0, 8.0}
    assert _found(lab.rows("sweep")) == {2.0, 3.0} == _found(lab.rows(nested["sweep"]))
    assert _found(lab.rows("first")) == {2.0, 8.0}, "every run of that name"
    assert _found(lab.rows(nested["first"])) == {2.0} == _found(lab.rows(nested["first/evaluate"]))
    assert _found(lab.rows("second", nested["other/evaluate"])) == {3.0, 8.0}
    assert _found(lab.rows(filter="metrics.fid < 5")) == {2.0, 3.0}
    assert _found(lab.rows("first", filter="metrics.fid < 5")) == {2.0}


def test_a_run_is_found_by_id_in_whatever_experiment_it_is(lab: Lab, nested: dict[str, str]) -> None:
    elsewhere = replace(lab, experiment=f"{lab.experiment}-empty")
    elsewhere.start("nothing")
    assert _found(elsewhere.rows(nested["sweep"])) == {2.0, 3.0}
    by_id = comparison.compare(lab.uri, Query(experiments=("nowhere",), runs=(nested["sweep"],)), "none")
    assert len(by_id.rows) == 2 and by_id.experiment == lab.experiment, "an id needs no experiment"


def test_nothing_found_says_what_was_searched_and_what_exists(lab: Lab, nested: dict[str, str]) -> None:
    lab.evaluate(samples=_key(4), status="FAILED", parent=lab.start("broken"))
    with pytest.raises(ValueError, match="no finished evaluation") as caught:
        lab.compare("third", "fourth")
    message = str(caught.value)
    assert f"experiment '{lab.experiment}'" in message and "runs 'third', 'fourth'" in message and "\n" not in message
    assert "9 runs, 4 of them evaluations (3 finished), of broken, first, sweep" in message and lab.uri in message
    with pytest.raises(ValueError, match=r"no finished evaluation of 'third' is .* runs 'first', 'third'"):
        lab.compare("first", "third")
    with pytest.raises(ValueError, match=r"filter 'metrics.fid > 100'; there are 9 runs"):
        lab.compare(filter="metrics.fid > 100")


def test_an_empty_experiment_says_so(lab: Lab) -> None:
    with pytest.raises(ValueError, match=r"there are no runs, and the experiments are .*lab-"):
        lab.compare()


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (Query(experiments=("nowhere",)), "there is no experiment 'nowhere' at sqlite"),
        (Query(experiments=("Default",), runs=("0" * 32,)), f"there is no run {'0' * 32}"),
        (Query(experiments=("Default",), filter="fid is low"), "MLflow refuses what is asked"),
        (Query(experiments=("Default",), filter="metrics.fid < 3 or metrics.fid > 4"), "MLflow refuses what is asked"),
    ],
)
def test_a_question_that_makes_no_sense_is_answered_in_a_sentence(lab: Lab, query: Query, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        comparison.compare(lab.uri, query)


def test_a_deleted_run_is_not_found_by_its_id(lab: Lab) -> None:
    run_id = lab.evaluate()
    lab.client.delete_run(run_id)
    with pytest.raises(ValueError, match=f"there is no run {run_id}"):
        lab.compare(run_id)


def test_a_tracking_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlflow\.db, which does not exist"):
        comparison.compare(f"sqlite:///{tmp_path}/mlflow.db", Query())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["http://reader:secret@127.0.0.1:9", "sqlite:///{folder}/broken.db"])
def test_a_tracking_store_that_does_not_answer_is_an_error_without_credentials(tmp_path: Path, address: str) -> None:
    (tmp_path / "broken.db").write_bytes(b"no database")
    with pytest.raises(TrackingError, match=r"tracking at .* cannot be read") as caught:
        comparison.compare(address.format(folder=tmp_path), Query())
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


# Protocols -----------------------------------------------------------------------------------------------------------------


def test_unequal_protocols_stand_in_sections_of_their_own(lab: Lab) -> None:
    fewer = {**PROTOCOL, "num_samples": 5000}
    lab.evaluate({"fid": 2.79})
    lab.evaluate({"fid": 3.5}, samples=_key(2), num_steps=16)
    lab.evaluate({"fid": 9.99}, protocol=fewer)
    lab.evaluate({"frechet_distance": 50.0}, protocol={**PROTOCOL, "extractor": "dinov2", "extractor_digest": "0" * 64})
    found = lab.compare()
    assert [section.name for section in found.sections] == ["A", "B", "C"]
    by_values = {tuple(sorted(value for row in section.rows for value in row.metrics.values())) for section in found.sections}
    assert by_values == {(2.79, 3.5), (9.99,), (50.0,)}
    different = dict(compare_table.differences(found))
    assert different.keys() == {"extractor", "num samples", "extractor digest"}, "only what differs"
    assert Counter(different["num samples"]) == {"50,000": 2, "5,000": 1}
    text = _text(found)
    assert "Numbers of different letters are not comparable" in text and "dinov2 features, 50,000 samples" in text


def test_the_same_protocol_needs_no_letters(lab: Lab) -> None:
    lab.evaluate(samples=_key(1))
    lab.evaluate(samples=_key(2), protocol=dict(reversed(PROTOCOL.items())))
    text = _text(lab.compare())
    assert "comparable" not in text and text.startswith("imagenet, 256 px\ninception features, 50,000 samples")


def test_a_digest_tag_that_belongs_to_another_protocol_does_not_join_them(lab: Lab) -> None:
    lab.evaluate(samples=_key(1), protocol_digest="same")
    lab.evaluate(samples=_key(2), protocol={**PROTOCOL, "num_samples": 10}, protocol_digest="same")
    assert len(lab.compare().sections) == 2


@pytest.mark.parametrize("text", ["{", "[1]", "null", '"text"'])
def test_a_protocol_that_cannot_be_read_counts_as_unknown(lab: Lab, text: str) -> None:
    lab.evaluate(samples=_key(1))
    lab.evaluate(samples=_key(2), protocol=text, protocol_digest=None)
    found = lab.compare()
    assert len(found.sections) == 2 and len(found.notes) == 1


def test_sections_of_other_datasets_and_resolutions_are_apart(lab: Lab) -> None:
    lab.evaluate(samples=_key(1))
    lab.evaluate(samples=_key(2), resolution=512)
    lab.evaluate(samples=_key(3), dataset="digits")
    assert [compare_table.heading(section) for section in lab.compare().sections] == [
        "digits, 256 px",
        "imagenet, 256 px",
        "imagenet, 512 px",
    ]


def test_more_sections_than_letters_have_names_too() -> None:
    assert [comparison._letters(number) for number in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


# Published numbers ---------------------------------------------------------------------------------------------------------


def test_published_numbers_stand_beside_runs_of_their_dataset_only(lab: Lab) -> None:
    lab.evaluate(samples=_key(1))
    lab.evaluate(samples=_key(2), dataset="digits", resolution=16)
    lab.evaluate({"frechet_distance": 3.0}, samples=_key(3), protocol={**PROTOCOL, "extractor": "dinov2"})
    sections = {compare_table.heading(s): s for s in lab.compare(published="auto").sections if s.distance == "fid"}
    assert len(sections["imagenet, 256 px"].published) == 26 and not sections["digits, 16 px"].published
    assert not [s for s in lab.compare(published="auto").sections if s.distance != "fid" and s.published]
    assert not [s for s in lab.compare(published="none").sections if s.published]


def test_a_dataset_can_be_named_whose_numbers_are_to_be_shown(lab: Lab) -> None:
    lab.evaluate(dataset="my-folder")
    assert not lab.compare(published="auto").sections[0].published
    assert lab.compare(published="imagenet256").sections[0].published_dataset == "imagenet256"
    other = lab.compare(published="imagenet512")
    assert not other.sections[0].published and "Nothing here is an FID at the resolution of imagenet512" in other.notes[0]


def test_quoted_rows_say_where_they_come_from_and_what_they_are_worth(lab: Lab) -> None:
    lab.evaluate(protocol={**PROTOCOL, "num_samples": 5000})
    text = _text(lab.compare(published="auto"))
    line = next(line for line in text.splitlines() if line.startswith("DiT-XL/2"))
    assert line.split()[1:5] == ["675M", "250", "59.5", "2.27"] and "arXiv 2212.09748" in line and "derived" in line
    assert "nothing of them was measured here" in text and "usually of 50,000 samples; with 5,000, as here" in text
    assert next(line for line in text.splitlines() if line.startswith("simple diffusion")).split()[2:6] == ["–"] * 4


# Figures -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, before they are pixels."""
    figures: list[Any] = []
    original = compare_plots.to_image

    def to_image(figure: Any) -> Image.Image:
        figures.append(figure)
        return original(figure)

    monkeypatch.setattr(compare_plots, "to_image", to_image)
    monkeypatch.setattr("pipelines.compare_sweeps.to_image", to_image)
    return figures


def _points(parts: Iterable[Any]) -> set[tuple[float, float]]:
    return {(round(x, 4), round(y, 4)) for part in parts for x, y in part.get_offsets().tolist()}


def _words(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_measured_and_quoted_points_lie_where_their_numbers_say(lab: Lab, drawn: list[Any]) -> None:
    lab.evaluate({"fid": 2.9, "gmacs_total": 350.0})
    lab.evaluate({"fid": 4.9, "gmacs_total": 136.0}, samples=_key(2), model="enat-s-imagenet", parameters=98_100_000)
    lab.evaluate({"fid": 4.0}, samples=_key(3), model="no-cost")
    image = cost_figure(lab.compare(published="auto").sections[0])
    assert image is not None and np.asarray(image).std() > 1
    axes, strip = drawn[0].axes
    measured, quoted = {(0.35, 2.9), (0.136, 4.9)}, {(0.347, 2.79), (0.532, 2.48), (59.5, 2.27)}
    assert _points(axes.collections) == measured | quoted and axes.get_xscale() == "log"
    hollow = [part for part in axes.collections if not part.get_facecolor().size]
    assert _points(hollow) == quoted, "what is quoted is hollow"
    words = _words(drawn[0])
    assert "enat-l-imagenet · 574M" in words and "DiT-XL/2 · 675M" in words and "quoted from publications" in words
    assert {text.get_text() for text in strip.texts} >= {"MAR-H  1.55", "MaskGIT · 227M  6.18"} and len(strip.texts) == 22


def test_a_figure_of_small_models_counts_in_gmacs_and_quotes_nothing(lab: Lab, drawn: list[Any]) -> None:
    lab.evaluate({"frechet_distance": 6.5, "gmacs_total": 0.0123}, dataset="digits", resolution=16)
    assert cost_figure(lab.compare(published="auto").sections[0]) is not None
    (axes,) = drawn[0].axes
    assert _points(axes.collections) == {(0.0123, 6.5)} and axes.get_xlabel().startswith("GMACs per image")
    assert "quoted from publications" not in _words(drawn[0])


@pytest.mark.parametrize("metrics", [{"fid": 2.0}, {"gmacs_total": 3.0}, {}, {"fid": 2.0, "gmacs_total": 0.0}])
def test_without_score_or_cost_there_is_no_figure(lab: Lab, metrics: dict[str, float]) -> None:
    lab.evaluate(metrics)
    assert cost_figure(lab.compare(published="auto").sections[0]) is None


@pytest.mark.parametrize("name", ["$x$ $\\frac$", "_hidden", "a" * 250, "模型 ^{", HOSTILE])
def test_any_name_can_be_drawn(lab: Lab, name: str) -> None:
    protocol = {**PROTOCOL, "extractor": name, "reference": name}
    tags = {"model": name, "dataset": name, "input.model": "train/x", "protocol": protocol}
    for steps in (4, 8):
        metrics = {"frechet_distance": 5.0 - steps / 8, "gmacs_total": 9.0}
        lab.evaluate(metrics, samples=_key(steps), num_steps=steps, **tags)
    (section,) = lab.compare().sections
    assert cost_figure(section) is not None and sweep_figure(section) is not None


def test_a_sweep_joins_what_differs_in_one_setting_alone(lab: Lab, drawn: list[Any]) -> None:
    settings = [(4, 2.0, 1.5), (8, 2.0, 1.5), (16, 2.0, 1.5), (8, 3.0, 1.5), (12, 2.0, 9.0)]
    for number, (steps, guidance, temperature) in enumerate(settings):
        lab.generate(_key(number), num_steps=steps, guidance_scale=guidance, remask_temperature=temperature)
        tags = {"num_steps": steps, "guidance_scale": guidance, "variant": f"v{number}", "input.model": "train/same"}
        lab.evaluate({"fid": 10.0 - steps / 4}, samples=_key(number), **tags)
    lab.generate(_key(20), num_steps=32, guidance_scale=2.0, remask_temperature=1.5)
    lab.evaluate({"fid": 1.0}, samples=_key(20), num_steps=32, guidance_scale=2.0, **{"input.model": "train/other"})
    (section,) = lab.compare().sections
    sweeps = {sweep.setting: sweep for sweep in find_sweeps(section)}
    assert [row.num_steps for row in sweeps["num_steps"].rows] == [4, 8, 16], "another temperature, another model: not joined"
    assert [row.guidance_scale for row in sweeps["guidance_scale"].rows] == [2.0, 3.0] and len(sweeps) == 2
    assert sweep_figure(section) is not None
    steps, guidance = drawn[0].axes
    assert [tuple(line.get_ydata()) for line in steps.lines] == [(9.0, 8.0, 6.0)]
    assert guidance.get_xlabel() == "guidance scale" and "enat-l-imagenet, guidance 2" in _words(drawn[0])


def test_one_run_is_no_sweep_and_neither_are_two_of_the_same_setting(lab: Lab) -> None:
    lab.evaluate(samples=_key(1), **{"input.model": "train/same"})
    lab.evaluate(samples=_key(2), **{"input.model": "train/same"})
    lab.evaluate(samples=_key(3), num_steps=16, **{"input.model": "train/same"})
    (section,) = lab.compare().sections
    assert find_sweeps(section) == [] and sweep_figure(section) is None


def test_models_that_are_called_alike_are_told_apart(lab: Lab) -> None:
    for number, name in enumerate(("monday", "tuesday")):
        lab.evaluate(samples=_key(number), parent=lab.start(name), **{"input.model": f"train/{number}"})
    lab.evaluate(samples=_key(5), num_steps=4, variant="fast", **{"input.model": "train/0"})
    groups = comparison.by_model(lab.rows())
    assert sorted(map(len, groups.values())) == [1, 2] and len(groups) == 2
    assert any("day" in name for name in groups)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=0, max_size=30), st.floats(0.001, 0.03))
def test_labels_that_are_spread_keep_their_order_and_distance(heights: list[float], gap: float) -> None:
    places = spread(sorted(heights), gap)
    assert len(places) == len(heights) and all(0 <= place <= 1 for place in places)
    assert all(above - below >= gap - 1e-9 for below, above in pairwise(places))


def test_labels_with_room_stay_where_they_belong() -> None:
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


# The table -----------------------------------------------------------------------------------------------------------------


def test_sizes_stand_in_order_and_the_best_is_marked(lab: Lab) -> None:
    for number, (name, size, fid) in enumerate((("xl", 1_040_700_000, 2.5), ("s", 98_100_000, 4.9), ("l", 574_300_000, 2.8))):
        lab.evaluate({"fid": fid, "precision": 0.8}, samples=_key(number), model=f"enat-{name}", parameters=size)
    found = lab.compare()
    assert [row.model for row in found.rows] == ["enat-s", "enat-l", "enat-xl"]
    (section,) = found.sections
    assert compare_table.best_values(section, compare_table.columns_of(section)) == {"fid": 2.5}, "all precisions are equal"
    assert [line.split()[1] for line in _text(found).splitlines()[3:6]] == ["98.1M", "574M", "1.04B"]


def test_a_spread_stands_beside_its_score(lab: Lab) -> None:
    lab.evaluate({"inception_score": 243.8, "inception_score_std": 2.5, "kid": 0.0028, "kid_std": 0.0001})
    text = _text(lab.compare())
    assert "243.80 ± 2.50" in text and "0.0028 ± 0.0001" in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_keeps_what_matters_and_names_the_rest(lab: Lab, width: int) -> None:
    lab.evaluate({**dict.fromkeys(("fid", "sfid", "kid", "precision", "recall", "density", "coverage", "images_per_second"), 0.5)})
    text = _text(lab.compare(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "FID" in text and "no room for" in text and "coverage" in " ".join(text.split())
    assert "no room" not in _text(lab.compare(), 300)


# Hostile names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(lab: Lab) -> Comparison:
    """Markup of pages and terminals, and commands for terminals and spreadsheets, wherever text can stand."""
    evil = f"{HOSTILE}[bold red]x[/]\x1b]0;owned\x07\u202e"
    protocol = {**PROTOCOL, "extractor": evil, "reference": evil, evil: evil}
    parent = lab.start(evil)
    lab.evaluate(samples=f"{evil}/1", model=evil, variant=evil, dataset=evil, protocol=protocol, parent=parent, parameters=evil)
    lab.evaluate(samples="images/2", model="=cmd|' /C calc'!A0", variant="@SUM(1)", dataset=evil)
    return lab.compare(published="imagenet256")


def _assert_self_contained(html: str) -> Page:
    page = Page.parse(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "svg"} & page.tags.keys() and page.open == []
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"{tag} runs {name}"
        loads = name in ("src", "srcset", "href", "data", "action", "poster", "background")
        assert not loads or value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")), f"{tag} loads {value[:40]}"
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and html.count("<style>") == 1
    return page


def test_names_are_text_on_the_page(hostile: Comparison) -> None:
    page = _assert_self_contained(compare.make_files(hostile, "compare-test", []).page)
    assert page.text.count(HOSTILE) >= 6, "model, variant, dataset, run, extractor, reference"
    assert "\x1b" not in page.text and "\u202e" not in page.text


def test_names_are_text_in_the_terminal(hostile: Comparison) -> None:
    text = _text(hostile)
    assert "[bold red]x[/]" in "".join(text.split("\n")).replace(" ", "").replace("[boldred]", "[bold red]")
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_names_are_text_in_a_spreadsheet(hostile: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(compare_table.to_csv(hostile))))
    cells = [value for row in rows for value in row.values()]
    assert "'=cmd|' /C calc'!A0" in cells and "'@SUM(1)" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
    assert any(row["model"].startswith(HOSTILE) for row in rows)


def test_csv_holds_every_metric_the_protocol_and_where_a_row_comes_from(lab: Lab) -> None:
    lab.evaluate({"fid": 2.79, "gmacs_total": 347.0, "cost/total_device_hours": 12.5, "something/new": 1.0})
    rows = list(csv.DictReader(io.StringIO(compare_table.to_csv(lab.compare(published="auto")))))
    assert len(rows) == 1 + 26 and Counter(row["source"] == "measured here" for row in rows) == {True: 1, False: 26}
    assert float(rows[0]["fid"]) == 2.79 and float(rows[0]["cost/total_device_hours"]) == 12.5 and rows[0]["something/new"] == "1.0"
    assert rows[0]["protocol_extractor"] == "inception" and rows[0]["protocol_num_samples"] == "50000"
    maskgit = next(row for row in rows if row["model"] == "MaskGIT")
    assert maskgit["tflops"] == "" and maskgit["fid"] == "6.18" and maskgit["parameters"] == "227000000.0"


# Samples -------------------------------------------------------------------------------------------------------------------


def _png(shade: int, size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def test_sample_grids_stand_side_by_side_once_for_each_set_of_samples(lab: Lab) -> None:
    lab.generate(_key(1), num_steps=8)
    lab.generate(_key(2), num_steps=16)
    lab.evaluate(samples=_key(1), grid=_png(50), model="small", parameters=1)
    lab.evaluate(samples=_key(1), grid=_png(50), model="small", parameters=1, protocol={**PROTOCOL, "num_samples": 9})
    lab.evaluate(samples=_key(2), grid=_png(99), model="large", parameters=2)
    lab.evaluate(samples=_key(3), model="without", parameters=3)
    found = lab.compare()
    page = Page.parse(compare.make_files(found, "compare-test", compare.read_grids(found)).page)
    shown = {alt: np.asarray(image)[0, 0].tolist() for alt, image in page.images.items() if alt.startswith("samples of")}
    assert {alt.partition(",")[0]: pixel for alt, pixel in shown.items()} == {
        "samples of small": [50, 10, 20],
        "samples of large": [99, 10, 20],
    }
    assert "drawn with the same seeds (run seed 0)" in page.text


def test_a_grid_that_was_removed_is_taken_from_the_run_before(lab: Lab) -> None:
    lab.evaluate(grid=_png(7))
    lab.evaluate()
    ((_, image),) = compare.read_grids(lab.compare())
    assert np.asarray(image)[0, 0].tolist() == [7, 10, 20]


@pytest.mark.parametrize("content", [b"", b"text", _png(1)[:60], _png(1, (9000, 9000))])
def test_what_is_no_picture_or_too_large_is_left_out(lab: Lab, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    lab.evaluate(samples=_key(1), grid=content)
    lab.evaluate(samples=_key(2), grid=_png(8), num_steps=16)
    with caplog.at_level(logging.WARNING, "pipelines"):
        grids = compare.read_grids(lab.compare())
    assert [row.num_steps for row, _ in grids] == [16]
    assert "samples.png of run" in caplog.text and "is left out" in caplog.text


def test_a_file_over_the_limit_is_not_fetched(lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    lab.evaluate(grid=_png(8))
    monkeypatch.setattr(compare, "_MAX_GRID_BYTES", 10)
    assert compare.read_grids(lab.compare()) == [] and "at most 10 are read" in caplog.text


def test_the_page_says_whether_seeds_are_the_same(lab: Lab) -> None:
    lab.evaluate(samples=_key(1))
    (row,) = lab.rows()
    other = replace(row, generated={"seed": "1"})
    assert "not known" in grids_sentence([row, other]) and grids_sentence([]) == ""
    assert "different seeds (1, 2)" in grids_sentence([other, replace(row, generated={"seed": "2"})])


# The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(lab: Lab, tmp_path: Path) -> Callable[..., Result]:
    def ask(*arguments: str) -> Result:
        line = ["--tracking-uri", lab.uri, "--experiment", lab.experiment, *(text.format(folder=tmp_path) for text in arguments)]
        return CliRunner().invoke(command, line)

    return ask


def test_a_comparison_is_written_and_logged(lab: Lab, ask: Callable[..., Result], tmp_path: Path) -> None:
    ids = [lab.evaluate(samples=_key(number), num_steps=steps, grid=_png(number)) for number, steps in enumerate((8, 16))]
    result = ask("--csv", "{folder}/new/c.csv", "--png", "{folder}/c.png", "--html", "{folder}/c.html")
    assert result.exit_code == 0, result.output
    assert "imagenet, 256 px" in result.stdout and f"written {tmp_path}/c.html" in result.stdout
    assert len(list(csv.reader((tmp_path / "new" / "c.csv").open()))) == 1 + 2 + 26
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 1000
    page = _assert_self_contained((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "Quoted from publications, not measured here" in page.text and page.tags["img"] == 2 + 2
    experiment = lab.client.get_experiment_by_name(lab.experiment)
    (logged,) = lab.client.search_runs([experiment.experiment_id], "tags.`enat.stage` = 'compare'")
    assert logged.info.run_name.startswith("compare-") and logged.info.status == "FINISHED"
    assert set(logged.data.tags["enat.compared_runs"].split(",")) == set(ids) and logged.data.tags["enat.num_compared"] == "2"
    files = {file.path for file in lab.client.list_artifacts(logged.info.run_id)}
    assert files == {"compare.html", "compare.csv", "compare.json", "compare.png"}
    assert ask("--no-log").exit_code == 0, "a logged comparison is no evaluation"
    assert len(lab.client.search_runs([experiment.experiment_id], "tags.`enat.stage` = 'compare'")) == 1


def test_json_is_all_that_goes_to_stdout(lab: Lab, ask: Callable[..., Result], tmp_path: Path) -> None:
    run_id = lab.evaluate()
    answer = json.loads(ask("--json", "--csv", "{folder}/c.csv", "--published", "none").stdout)
    assert answer["files"] == {"csv": f"{tmp_path}/c.csv"} and answer["name"].startswith("compare-")
    (section,) = answer["sections"]
    assert section["protocol"] == PROTOCOL and section["published"] == []
    assert section["rows"][0]["metrics"]["fid"] == 2.79 and section["rows"][0]["run_ids"] == [run_id]
    assert lab.client.get_run(answer["logged_run"]).data.tags["enat.compared_runs"] == run_id


def test_a_place_that_cannot_be_written_and_nothing_to_draw_are_sentences(
    lab: Lab, ask: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    lab.evaluate({"precision": 0.5})
    result = ask("--no-log", "--csv", "{folder}/file/c.csv")
    assert isinstance(result.exception, ValueError) and "c.csv cannot be written" in str(result.exception)
    result = ask("--no-log", "--png", "{folder}/c.png")
    assert isinstance(result.exception, ValueError) and "there is nothing to draw into" in str(result.exception)


def test_nothing_found_is_exit_code_2_and_one_line(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "compare" not in cli.commands.commands:
        monkeypatch.setitem(cli.commands.commands, "compare", command)
    monkeypatch.setattr(sys, "argv", ["enat", "compare", "none", "--tracking-uri", lab.uri, "--experiment", lab.experiment])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error[-1].startswith("enat: no finished evaluation is at sqlite") and "runs 'none'" in error[-1]


def test_more_ids_than_a_tag_holds_are_cut_between_two(lab: Lab) -> None:
    ids = [f"{number:032x}" for number in range(400)]
    joined = compare._joined(ids)
    assert len(joined) <= 5000 and joined.split(",") == ids[: len(joined.split(","))] and len(joined.split(",")) == 151


def test_a_section_needs_no_rows_that_have_scores(lab: Lab) -> None:
    lab.evaluate({})
    (section,) = lab.compare(published="auto").sections
    assert isinstance(section, Section) and section.distance is None and not section.published
    assert "enat-l-imagenet" in _text(lab.compare())
