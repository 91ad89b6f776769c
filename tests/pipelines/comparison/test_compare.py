"""Comparisons: runs in MLflow as the pipeline logs them, damaged and missing values, and the command."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from material.compare_lab import PROTOCOL, Lab, key_of, text_of
from pipelines.cli import main
from pipelines.cli.compare import compare as command
from pipelines.comparison import columns, compare, table
from pipelines.comparison import query as comparison_query
from pipelines.comparison.page import Grids, grids_sentence
from pipelines.comparison.query import Query
from pipelines.comparison.sections import Row
from pipelines.tracking import search
from pipelines.tracking.search import TrackingError
from services.html_page import Page, assert_self_contained

# Rows ----------------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_values_of_tags_and_metrics(lab: Lab) -> None:
    parent = lab.start("imagenet256-sizes")
    run_id = lab.evaluate(parent=parent, variant="xl", model="enat-xl-imagenet", **{"input.model": "train/abc"})
    (row,) = lab.rows()
    assert row.run_ids == (run_id,) and row.config_run == "imagenet256-sizes"
    assert (row.model, row.variant, row.label) == ("enat-xl-imagenet", "xl", "enat-xl-imagenet (xl)")
    assert (row.dataset, row.resolution, row.parameters, row.train_steps) == ("imagenet", 256, 574_300_000, 500_000)
    assert (row.num_steps, row.guidance_scale, row.num_samples, row.trained) == (8, 3.5, 50_000, "train/abc")
    assert row.metrics == {"fid": 2.79, "gmacs_total": 347.0} and row.protocol == PROTOCOL
    values = columns.record(row)
    assert values["tmacs_total"] == pytest.approx(0.347) and values["source"] == "measured here"


def test_evaluations_of_the_same_samples_are_one_row_of_the_newest_run(lab: Lab) -> None:
    first = lab.evaluate({"fid": 2.79})
    other = lab.evaluate({"fid": 3.0}, samples=key_of(2), num_steps=16)
    newest = lab.evaluate({"fid": 2.79}, variant="again")
    rows = {row.num_steps: row for row in lab.rows()}
    assert rows[8].run_ids == (newest, first) and rows[8].variant == "again" and rows[16].run_ids == (other,)
    started = lab.client.get_run(first).info.start_time / 1000
    assert rows[8].measured.timestamp() == pytest.approx(started), "the time of the measurement, not of the reuse"
    measured_again = lab.evaluate({"recall": 0.5}, digest="other")
    row = next(row for row in lab.rows() if row.num_steps == 8)
    assert row.metrics == {"recall": 0.5} and row.run_ids == (measured_again, newest, first)
    assert row.measured.timestamp() == pytest.approx(lab.client.get_run(measured_again).info.start_time / 1000)


def test_an_evaluation_that_another_run_reused_is_a_row_of_both(lab: Lab) -> None:
    """Selected by the name of the second one it has the variant and the money of that run, and is not read twice."""
    evaluation = lab.evaluate({"fid": 2.79, "cost/total_money": 1.0}, parent=lab.start("first"), variant="main")
    tags = {"enat.kind": "model", "enat.name": "second", "enat.variant": "steps-8", "enat.currency": "EUR"}
    model = lab.start("second · 8 steps", {**tags, "enat.run.evaluate": evaluation, "enat.run.train": "0" * 32})
    model.log_metrics({"cost/total_money": 7.0, "fid": 99.0})
    assert [row.config_run for row in lab.rows()] == ["first"], "a run that is not finished is not read"
    model.finish()
    (row,) = lab.rows("second")
    assert row == lab.rows("second · 8 steps")[0] == lab.rows(model.run_id)[0]
    assert (row.config_run, row.variant, row.currency, row.run_ids) == ("second", "steps-8", "EUR", (evaluation,))
    assert row.metrics == {"fid": 2.79, "cost/total_money": 7.0}
    (row,) = lab.rows("first")
    assert (row.variant, row.currency, row.metrics["cost/total_money"]) == ("main", None, 1.0)
    (row,) = lab.rows()
    assert row.config_run == "second" and row.run_ids == (evaluation,), "the newest"
    started = lab.client.get_run(evaluation).info.start_time / 1000
    assert row.measured.timestamp() == pytest.approx(started), "the time of the measurement, not of the reuse"


def test_only_finished_evaluations_of_the_given_experiments_are_rows(lab: Lab) -> None:
    """Runs without samples are never merged."""
    kept = {lab.evaluate(samples=key_of(1)), lab.evaluate(samples=None), lab.evaluate(samples=None)}
    for number, status in enumerate(("FAILED", "KILLED", "RUNNING")):
        lab.evaluate(samples=key_of(10 + number), status=status)
    lab.client.delete_run(lab.evaluate(samples=key_of(2)))
    lab.start("train", {"enat.stage": "train"}).finish()
    other = replace(lab, experiment=f"{lab.experiment}-other")
    elsewhere = other.evaluate(samples=key_of(3))
    assert {row.run_ids for row in lab.rows()} == {(id,) for id in kept}
    both = comparison_query.compare(lab.uri, Query(experiments=(lab.experiment, other.experiment)), "none")
    assert {row.run_ids for row in both.rows} == {(id,) for id in {*kept, elsewhere}}


def test_a_missing_value_is_not_zero(lab: Lab) -> None:
    names = ("parameters", "train_steps", "num_steps", "guidance_scale", "resolution", "dataset")
    lab.evaluate({"fid": 2.0, "recall": float("nan")}, **dict.fromkeys(names))
    lab.evaluate({"gmacs_total": 1.0, "recall": 0.5}, samples=key_of(2), **dict.fromkeys(names))
    first = next(row for row in lab.rows() if "fid" in row.metrics)
    assert [getattr(first, name) for name in names] == [None] * 6 and first.metrics == {"fid": 2.0}
    line = next(line for line in text_of(lab.compare()).splitlines() if "2.00" in line)
    assert line.split()[:4] == ["enat-l-imagenet", "–", "2.00", "–"], "GMACs, FID, recall"
    assert "parameters" not in table.to_json(lab.compare())["sections"][0]["rows"][0]


def test_a_tag_that_is_not_a_number_is_missing_and_named(lab: Lab) -> None:
    run_id = lab.evaluate(parameters="many", guidance_scale="nan", num_steps="8.0")
    found = lab.compare()
    assert found.rows[0].parameters is None and found.rows[0].guidance_scale is None and found.rows[0].num_steps == 8
    assert any(f"enat.parameters of run {run_id} is 'many'" in note for note in found.notes)


def test_runs_without_the_current_tags_are_compared(lab: Lab) -> None:
    tags = dict.fromkeys(("model", "variant", "dataset", "parameters"))
    old = {"samples": None, "protocol": None, "input.samples": "generate/abc", **tags}
    lab.evaluate({"frechet_distance": 6.5}, node="evaluate@untrained", **old)
    found = lab.compare()
    (row,) = found.rows
    assert row.variant == "untrained" and row.samples == "generate/abc" and row.model == "evaluate"
    assert any("protocol of some runs is unknown" in note for note in found.notes)
    assert "unknown protocol" in text_of(found)


# Finding -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nested(lab: Lab) -> dict[str, str]:
    """A sweep of two config runs with one evaluation each, and another config run with the name of one of them."""
    sweep = lab.start("sweep")
    ids = {"sweep": str(sweep.run_id)}
    for number, name in enumerate(("first", "second")):
        config = lab.start(name, parent=sweep)
        ids[name] = str(config.run_id)
        ids[f"{name}/evaluate"] = lab.evaluate({"fid": 2.0 + number}, samples=key_of(number), parent=config)
    ids["other/evaluate"] = lab.evaluate({"fid": 8.0}, samples=key_of(9), parent=lab.start("first"))
    return ids


def _found(rows: list[Row]) -> set[float]:
    return {row.metrics["fid"] for row in rows}


def test_runs_are_found_by_name_or_id_at_any_depth(lab: Lab, nested: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_query, "_IDS_PER_QUERY", 1)
    assert _found(lab.rows()) == {2.0, 3.0, 8.0}
    assert _found(lab.rows("sweep")) == {2.0, 3.0} == _found(lab.rows(nested["sweep"]))
    assert _found(lab.rows("first")) == {2.0, 8.0}, "every run of that name"
    assert _found(lab.rows(nested["first"])) == {2.0} == _found(lab.rows(nested["first/evaluate"]))
    assert _found(lab.rows("second", nested["other/evaluate"])) == {3.0, 8.0}
    assert _found(lab.rows(filter="metrics.fid < 5")) == {2.0, 3.0}
    assert _found(lab.rows("first", filter="metrics.fid < 5")) == {2.0}
    by_id = comparison_query.compare(lab.uri, Query(experiments=("nowhere",), runs=(nested["sweep"],)), "none")
    assert _found(by_id.rows) == {2.0, 3.0} and by_id.experiment == lab.experiment, "an id needs no experiment"


def test_the_error_without_results_names_what_was_searched_and_what_exists(
    lab: Lab, nested: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.evaluate(samples=key_of(4), status="FAILED", parent=lab.start("broken"))
    with pytest.raises(ValueError, match="no finished evaluation") as caught:
        lab.compare("third", "fourth")
    message = str(caught.value)
    assert f"experiment '{lab.experiment}'" in message and "runs 'third', 'fourth'" in message and "\n" not in message
    assert "9 runs, 4 of them evaluations (3 finished), of broken, first, sweep" in message and lab.uri in message
    with pytest.raises(ValueError, match=r"no finished evaluation of 'third' .* runs 'first', 'third'"):
        lab.compare("first", "third")
    with pytest.raises(ValueError, match=r"filter 'metrics.fid > 100'.* 9 runs"):
        lab.compare(filter="metrics.fid > 100")
    monkeypatch.setattr(comparison_query, "_RUNS_COUNTED", 3)
    with pytest.raises(ValueError, match=r"at least 3 runs; the newest are 3 runs, \d of them evaluations"):
        lab.compare("third")


def test_parameters_of_samples_are_queried_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        lab.generate(key_of(number), num_steps=number)
        lab.evaluate(samples=key_of(number))
    asked: list[str] = []
    original = search.search_runs

    def search_runs(uri: str, ids: Any, filter_string: str = "", **limits: Any) -> Any:
        asked.append(filter_string)
        return original(uri, ids, filter_string, **limits)

    monkeypatch.setattr(search, "search_runs", search_runs)
    rows = lab.rows()
    assert {row.generated["sampler.num_steps"] for row in rows if row.generated} == {"0", "1", "2", "3"}
    assert sum("generate" in question for question in asked) == 1


def test_a_query_that_cannot_be_answered_is_an_error_of_one_sentence(lab: Lab) -> None:
    lab.client.delete_run(deleted := lab.evaluate())
    for query, sentence in (
        (Query(experiments=(lab.experiment,)), "no runs.* Experiments: .*lab-"),
        (Query(experiments=("nowhere",)), "experiment 'nowhere' does not exist at sqlite"),
        (Query(experiments=("Default",), runs=("0" * 32,)), f"run {'0' * 32} does not exist"),
        (Query(experiments=(lab.experiment,), runs=(deleted,)), f"run {deleted} does not exist"),
        (Query(experiments=("Default",), filter="fid is low"), "MLflow"),
        (Query(experiments=("Default",), filter="metrics.fid < 3 or metrics.fid > 4"), "MLflow"),
    ):
        with pytest.raises(ValueError, match=sentence):
            comparison_query.compare(lab.uri, query)


def test_a_missing_tracking_store_is_not_created_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlflow\.db"):
        comparison_query.compare(f"sqlite:///{tmp_path}/mlflow.db", Query())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "broken.db").write_bytes(b"no database")
    with pytest.raises(TrackingError, match=r"broken\.db") as caught:
        comparison_query.compare(f"sqlite:///{tmp_path}/broken.db", Query())
    assert "\n" not in str(caught.value)


@pytest.fixture
def answering() -> Iterator[Callable[[int], str]]:
    """Start a server that answers every request with a status. Returns its address."""

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()

            do_POST = do_GET  # noqa: N815 (http.server's name)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    servers: list[ThreadingHTTPServer] = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_unusable_server_is_an_error_of_one_sentence_with_the_remedy(answering: Callable[[int], str]) -> None:
    """The error contains nothing of urllib3, requests or the body of the response, and no password."""
    for status, remedy in (
        (None, "start the server.*--tracking-uri, tracking.uri or MLFLOW_TRACKING_URI"),
        (401, r"\(401\).*MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, r"\(403\).*administrator.*MLFLOW_TRACKING_USERNAME"),
        (404, r"\(404\).*--tracking-uri"),
    ):
        address = answering(status) if status else "127.0.0.1:9"
        with pytest.raises(ValueError, match=f"http://{address} .*{remedy}") as caught:
            comparison_query.compare(f"http://reader:secret@{address}", Query())
        assert not re.search("secret|API|HTTP|Max retries", str(caught.value).replace(f"http://{address}", ""))
        with pytest.raises(ValueError, match=remedy):
            search.find_model(f"http://{address}", "enat@newest")


# Samples -------------------------------------------------------------------------------------------------------------------


def _png(shade: int, size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_page_shows_one_grid_per_set_of_samples(lab: Lab) -> None:
    lab.generate(key_of(1), num_steps=8)
    lab.generate(key_of(2), num_steps=16)
    lab.evaluate(samples=key_of(1), grid=_png(50), model="small", parameters=1)
    lab.evaluate(samples=key_of(1), grid=_png(50), model="small", parameters=1, protocol={**PROTOCOL, "num_samples": 9})
    lab.evaluate(samples=key_of(2), grid=_png(99), model="large", parameters=2)
    lab.evaluate(samples=key_of(3), model="without", parameters=3)
    found = lab.compare()
    page = Page.parse(compare.make_files(found, "compare-test", compare.read_grids(found)).page)
    shown = {alt: np.asarray(image)[0, 0].tolist() for alt, image in page.images.items() if alt.startswith("samples of")}
    assert {alt.partition(",")[0]: pixel for alt, pixel in shown.items()} == {
        "samples of small": [50, 10, 20],
        "samples of large": [99, 10, 20],
    }
    assert "equal seeds" in page.text and "run seed 0" in page.text


@pytest.mark.slow
def test_files_that_are_not_images_or_too_large_are_left_out(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A removed file is read from the previous run of the same samples."""
    ids = [
        lab.evaluate(samples=key_of(number), grid=content)
        for number, content in enumerate((b"", b"text", _png(1)[:60], _png(1, (9000, 9000))))
    ]
    lab.evaluate(samples=key_of(20), grid=_png(8), num_steps=16)
    lab.evaluate(samples=key_of(20), num_steps=16)
    with caplog.at_level(logging.WARNING, "pipelines"):
        ((row, image),) = compare.read_grids(lab.compare()).shown
    assert row.num_steps == 16 and np.asarray(image)[0, 0].tolist() == [8, 10, 20]
    assert all(f"samples.png of run {id} is left out" in caplog.text for id in ids)
    monkeypatch.setattr(compare, "_MAX_GRID_BYTES", 10)
    assert compare.read_grids(lab.compare()) == Grids() and "at most 10 are read" in caplog.text


def test_grids_beyond_the_limit_are_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_MAX_GRIDS", 2)
    for count, left_out in ((2, 0), (5, 3)):
        for number in range(count):
            lab.evaluate(samples=key_of(number), num_steps=number + 1, grid=_png(number))
        grids = compare.read_grids(lab.compare())
        assert len(grids.shown) == 2 and grids.num_left_out == left_out
    assert "3 more sets of samples are not shown" in grids_sentence(grids)


def test_the_page_states_whether_seeds_are_equal(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    (row,) = lab.rows()
    other = replace(row, generated={"seed": "1"})
    image = Image.new("RGB", (1, 1))
    assert "unknown" in grids_sentence(Grids(((row, image), (other, image)))) and grids_sentence(Grids()) == ""
    third = replace(row, generated={"seed": "2"})
    assert "different seeds (1, 2)" in grids_sentence(Grids(((other, image), (third, image))))


# The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(lab: Lab, tmp_path: Path) -> Callable[..., Result]:
    def ask(*arguments: str) -> Result:
        line = ["--tracking-uri", lab.uri, "--experiment", lab.experiment, *(text.format(folder=tmp_path) for text in arguments)]
        return CliRunner().invoke(command, line)

    return ask


def test_a_comparison_is_written_and_logged(lab: Lab, ask: Callable[..., Result], tmp_path: Path) -> None:
    ids = [lab.evaluate(samples=key_of(number), num_steps=steps, grid=_png(number)) for number, steps in enumerate((8, 16))]
    result = ask("--csv", "{folder}/new/c.csv", "--png", "{folder}/c.png", "--html", "{folder}/c.html")
    assert result.exit_code == 0, result.output
    assert "imagenet, 256 px" in result.stdout and f"written {tmp_path}/c.html" in result.stdout
    assert len(list(csv.reader((tmp_path / "new" / "c.csv").open()))) == 1 + 2 + 79
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 1000
    page = assert_self_contained((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert (
        "Quoted from publications, not measured here" in page.text
        and len(page.images) == 2
        and page.charts.keys() == {"A cost", "A sweep 0"}
    )
    experiment = lab.client.get_experiment_by_name(lab.experiment)
    (logged,) = lab.client.search_runs([experiment.experiment_id], "tags.`enat.stage` = 'compare'")
    assert logged.info.run_name.startswith("compare-") and logged.info.status == "FINISHED"
    assert set(logged.data.tags["enat.compared_runs"].split(",")) == set(ids) and logged.data.tags["enat.num_compared"] == "2"
    files = {file.path for file in lab.client.list_artifacts(logged.info.run_id)}
    assert files == {"compare.html", "compare.csv", "compare.json", "compare.png"}
    assert ask("--no-log").exit_code == 0, "a logged comparison is not an evaluation"
    assert len(lab.client.search_runs([experiment.experiment_id], "tags.`enat.stage` = 'compare'")) == 1


def test_stdout_is_json_only(lab: Lab, ask: Callable[..., Result], tmp_path: Path) -> None:
    run_id = lab.evaluate()
    answer = json.loads(ask("--json", "--csv", "{folder}/c.csv", "--published", "none").stdout)
    assert answer["files"] == {"csv": f"{tmp_path}/c.csv"} and answer["name"].startswith("compare-")
    (section,) = answer["sections"]
    assert section["protocol"] == PROTOCOL and section["published"] == []
    assert section["rows"][0]["metrics"]["fid"] == 2.79 and section["rows"][0]["run_ids"] == [run_id]
    assert lab.client.get_run(answer["logged_run"]).data.tags["enat.compared_runs"] == run_id


def test_an_unwritable_path_and_an_empty_figure_are_errors_of_one_sentence(
    lab: Lab, ask: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    lab.evaluate({"precision": 0.5})
    result = ask("--no-log", "--csv", "{folder}/file/c.csv")
    assert isinstance(result.exception, ValueError) and "c.csv cannot be written" in str(result.exception)
    result = ask("--no-log", "--png", "{folder}/c.png")
    assert isinstance(result.exception, ValueError) and "no run has both a distance and gmacs_total" in str(result.exception)
    (section,) = lab.compare(published="auto").sections
    assert section.distance is None and not section.published


def test_no_result_is_exit_code_2_and_one_line(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["enat", "compare", "none", "--tracking-uri", lab.uri, "--experiment", lab.experiment])
    with pytest.raises(SystemExit) as end:
        main.main()
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error[-1].startswith("enat: no finished evaluation") and "runs 'none'" in error[-1]


def test_ids_beyond_the_limit_of_a_tag_are_cut_between_two_ids(lab: Lab) -> None:
    ids = [f"{number:032x}" for number in range(400)]
    joined = compare._joined(ids)
    assert len(joined) <= 5000 and joined.split(",") == ids[: len(joined.split(","))] and len(joined.split(",")) == 151
