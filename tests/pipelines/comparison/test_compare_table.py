"""Tables, pages and files of a comparison, with hostile names as well."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from material.compare_lab import HOSTILE, PROTOCOL, Lab, key_of, text_of
from pipelines.comparison import compare, table
from pipelines.comparison.columns import measured_table, quoted_table
from pipelines.comparison.page import Grids
from pipelines.comparison.published import published_for
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Section
from pipelines.comparison.sentences import errors_sentence
from pipelines.comparison.significance import is_better
from pipelines.registry.influences import INFLUENCES, save_influences
from services.html_page import Page, assert_self_contained


def _titles(section: Section) -> list[str]:
    return [column.title for column in measured_table(section).columns]


def _best(section: Section) -> dict[str, list[float]]:
    """Marked values by column."""
    table = measured_table(section)
    marked: dict[str, list[float]] = {}
    for row in table.rows:
        for column, cell in zip(table.columns, row, strict=True):
            if cell.is_best:
                marked.setdefault(column.key, []).append(cell.value)
    return marked


# The table -----------------------------------------------------------------------------------------------------------------


def test_rows_are_ordered_by_size_and_the_best_is_marked(lab: Lab) -> None:
    for number, (name, size, fid) in enumerate((("xl", 1_040_700_000, 2.5), ("s", 98_100_000, 4.9), ("l", 574_300_000, 2.8))):
        lab.evaluate({"fid": fid, "precision": 0.8}, samples=key_of(number), model=f"enat-{name}", parameters=size)
    found = lab.compare()
    assert [row.model for row in found.rows] == ["enat-s", "enat-l", "enat-xl"]
    (section,) = found.sections
    assert _best(section) == {"fid": [2.5]}, "all precisions are equal"
    assert [line.split()[1] for line in text_of(found).splitlines()[4:7]] == ["98.1M", "574M", "1.04B"]
    lab.evaluate({"inception_score": 243.8, "inception_score_se": 2.0, "kid": 0.0028, "kid_se": 0.0001}, samples=key_of(9))
    assert "243.80 ± 3.92" in text_of(lab.compare()) and "0.0028 ± 0.000196" in text_of(lab.compare())


def _influences(values: np.ndarray, folder: Path) -> bytes:
    path = folder / INFLUENCES
    save_influences(path, {"fid": values.astype(np.float32)}, np.zeros(len(values), np.int64))
    return path.read_bytes()


def test_scores_are_best_unless_another_beats_them_significantly(lab: Lab, tmp_path: Path) -> None:
    """Errors of differences are those of pairs if the influences of both are known, else those of independent samples."""
    for number, fid in enumerate((2.0, 2.2, 3.0)):
        lab.evaluate({"fid": fid, "fid_se": 0.2}, samples=key_of(number), model=f"enat-{'sbl'[number]}", parameters=1 + number)
    (section,) = lab.compare().sections
    assert _best(section) == {"fid": [2.0, 2.2]}
    text = text_of(lab.compare())
    assert "2.20 ± 0.392" in text and "not distinguishable at 95% from the best, enat-s, is: enat-b." in " ".join(text.split())
    noise = np.random.default_rng(0).normal(size=400) * 4  # an error of 0.2, nearly all of which both share
    own = np.random.default_rng(1).normal(size=400) * 0.1
    for number, (fid, values) in enumerate(((2.0, noise), (2.2, noise + own))):
        saved = _influences(values, tmp_path)
        lab.evaluate({"fid": fid, "fid_se": 0.2}, samples=key_of(10 + number), model=f"pair-{number}", influences=saved)
    pairs = sorted((row for row in lab.rows() if row.model.startswith("pair")), key=lambda row: row.model)
    assert is_better(*pairs, "fid", "lower") and not is_better(*pairs[::-1], "fid", "lower")


@pytest.mark.slow
def test_rows_of_different_tasks_have_errors_and_no_best(lab: Lab) -> None:
    for number, ratio in enumerate((0.2, 0.4)):
        lab.generate(key_of(number), mask_ratio=ratio)
        lab.evaluate({"fid": 2.0 + number / 10, "fid_se": 0.2}, samples=key_of(number), model=f"enat-{number}")
    (section,) = lab.compare().sections
    assert {row.mask_ratio for row in section.rows} == {0.2, 0.4} and _best(section) == {}
    assert "± is half" in errors_sentence(section) and "not distinguishable" not in errors_sentence(section)


def test_influences_that_cannot_be_read_are_left_out_with_a_note(lab: Lab) -> None:
    id = lab.evaluate({"fid": 2.0, "fid_se": 0.2}, influences=b"\x80\x04 not tensors")
    found = lab.compare()
    assert found.rows[0].influences is None and any(f"{INFLUENCES} of run {id} is left out" in note for note in found.notes)


def test_a_narrow_terminal_shows_the_main_columns_and_names_the_rest(lab: Lab) -> None:
    names = ("fid", "sfid", "kid", "precision", "recall", "density", "coverage", "images_per_second", "inception_score")
    lab.evaluate(dict.fromkeys((*names, "peak_memory_gb", "gmacs_executed", "worker_seconds_per_image"), 0.5))
    lab.evaluate({"fid": 3.0}, samples=key_of(2), variant="wide", num_steps=4, parent=lab.start("other"))
    found = lab.compare()
    for width in (40, 80, 120):
        text = text_of(found, width)
        assert max(map(len, text.splitlines())) <= width
        header, left_out = next(line for line in text.splitlines() if line.startswith("model")), " ".join(text.split())
        assert "FID" in header and "enat-l-imagenet" in text and "no room for" in text and "coverage" in left_out
        assert ("precision" in header) == ("recall" in header), "they are shown together"
    assert "no room" not in text_of(found, 300)


def test_common_values_are_in_the_heading(lab: Lab) -> None:
    parent = lab.start("sizes")
    for number, name in enumerate(("enat-s", "enat-l")):
        metrics = {"fid": 3.0 - number, "cost/total_device_hours": 0.0, "device_seconds_per_image": 0.0, "gmacs_total": 347.0}
        lab.evaluate(metrics, samples=key_of(number), model=name, parent=parent, device="cpu", precision="bf16")
    (section,) = lab.compare().sections
    titles = _titles(section)
    assert titles == ["model", "params", "TFLOPs", "FID"], "devices without time have no column"
    day = f"{section.rows[0].measured:%Y-%m-%d}"
    alike = "steps 8, guidance 3.5, device cpu, train steps 500,000, run sizes, arithmetic in bf16"
    assert f"Measured here on {day}, all with {alike}\n" in text_of(lab.compare())
    lab.evaluate({"fid": 1.0}, samples=key_of(7), num_steps=4)
    titles = _titles(lab.compare().sections[0])
    assert titles[:5] == ["model", "params", "steps", "TFLOPs", "FID"] and "guidance" not in titles


def test_scores_come_before_speeds_and_costs(lab: Lab) -> None:
    metrics = ("fid", "inception_score", "images_per_second", "peak_memory_gb", "gmacs_total", "gmacs_executed", "kid")
    lab.evaluate(dict.fromkeys(metrics, 100.0))
    lab.evaluate(dict.fromkeys(metrics, 200.0), samples=key_of(2), variant="other", num_steps=16, guidance_scale=2.0)
    found = lab.compare()
    titles = _titles(found.sections[0])
    assert titles[:6] == ["model", "params", "steps", "guidance", "TFLOPs", "FID"]
    assert titles.index("IS") < titles.index("images/s")
    page = Page.parse(compare.make_files(found, "compare-test", Grids()).page)
    first, more = [row for row in page.rows if row[0] == "model"][:2]
    assert first[:7] == ["model", "params", "steps", "guidance", "TFLOPs", "FID", "IS"] and "KID" not in first
    assert more == ["model", "steps", "guidance", "KID", "peak GB", "GMACs executed"] and page.tags["details"] == 1


def test_speeds_of_different_devices_have_no_best_value(lab: Lab) -> None:
    lab.evaluate({"fid": 2.0, "images_per_second": 50.0}, device="NVIDIA H100")
    lab.evaluate({"fid": 3.0, "images_per_second": 90.0}, samples=key_of(2), device="NVIDIA H100")
    (section,) = lab.compare().sections
    assert _best(section) == {"fid": [2.0], "images_per_second": [90.0]}
    for device in ("cpu", None):
        lab.evaluate({"fid": 4.0, "images_per_second": 1.0}, samples=key_of(3), device=device)
        (section,) = lab.compare().sections
        assert _best(section) == {"fid": [2.0]}
        assert "device" in _titles(section) and "NVIDIA H100" in text_of(lab.compare())


def test_money_of_different_currencies_shares_no_column(lab: Lab) -> None:
    for number, currency in enumerate(("USD", "EUR", None)):
        lab.evaluate({"fid": 2.0, "cost/total_money": 10.0 + number}, samples=key_of(number), currency=currency)
    found = lab.compare()
    titles = _titles(found.sections[0])
    assert [title for title in titles if "money" in title] == ["money (unknown currency)", "money (EUR)", "money (USD)"]
    rows = list(csv.DictReader(io.StringIO(table.to_csv(found))))
    money = ("cost/total_money", "cost/total_money_EUR", "cost/total_money_USD")
    assert sorted(tuple(row[name] for name in money) for row in rows) == [("", "", "10.0"), ("", "11.0", ""), ("12.0", "", "")]
    lab.evaluate({"cost/total_money": 10.0}, samples=key_of(9), currency="[bold]x[/]\x1b")
    assert "money ([bold]x[/])" in text_of(lab.compare()), "text, not markup"


def test_macs_are_not_mixed_up_with_operations(lab: Lab) -> None:
    """TFLOPs of papers are multiply-accumulates. The metric gflops_total counts two operations for each."""
    lab.evaluate({"fid": 4.97, "gmacs_total": 136.0, "gflops_total": 272.0})
    found = lab.compare(published="auto")
    measured = next(csv.DictReader(io.StringIO(table.to_csv(found))))
    assert float(measured["tmacs_total"]) == pytest.approx(float(measured["gflops_total"]) / 2000) and "tflops" not in measured
    (section,) = table.to_json(found)["sections"]
    assert "tflops" not in section["rows"][0] and section["published"][0]["tmacs_total"] == 0.347
    assert not any("tflops" in result for result in section["published"])
    assert "tmacs_total are the TFLOPs" in text_of(found)


# Hostile names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(lab: Lab) -> Comparison:
    """Markup and commands of pages, terminals and spreadsheets in every text field."""
    evil = f"{HOSTILE}[bold red]x[/]\x1b]0;owned\x07\u202e"
    protocol = {**PROTOCOL, "extractor": evil, "reference": evil, evil: evil}
    parent = lab.start(evil)
    lab.evaluate(samples=f"{evil}/1", model=evil, variant=evil, dataset=evil, protocol=protocol, parent=parent, parameters=evil)
    lab.evaluate(samples="images/2", model="=cmd|' /C calc'!A0", variant="@SUM(1)", dataset=evil)
    return lab.compare(published="imagenet256")


def test_names_are_text_on_the_page_in_the_terminal_and_in_a_spreadsheet(hostile: Comparison) -> None:
    page = assert_self_contained(compare.make_files(hostile, "compare-test", Grids()).page)
    assert page.text.count(HOSTILE) >= 6, "model, variant, dataset, run, extractor, reference"
    text = text_of(hostile)
    assert "[bold red]x[/]" in "".join(text.split("\n")).replace(" ", "").replace("[boldred]", "[bold red]")
    for shown in (text, page.text):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    rows = list(csv.DictReader(io.StringIO(table.to_csv(hostile))))
    cells = [value for row in rows for value in row.values()]
    assert "'=cmd|' /C calc'!A0" in cells and "'@SUM(1)" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
    assert any(row["model"].startswith(HOSTILE) for row in rows)


def test_csv_contains_every_metric_the_protocol_and_the_source(lab: Lab) -> None:
    lab.evaluate({"fid": 2.79, "gmacs_total": 347.0, "cost/total_device_hours": 12.5, "something/new": 1.0})
    rows = list(csv.DictReader(io.StringIO(table.to_csv(lab.compare(published="auto")))))
    assert len(rows) == 1 + 79 and Counter(row["source"] == "measured here" for row in rows) == {True: 1, False: 79}
    assert float(rows[0]["fid"]) == 2.79 and float(rows[0]["cost/total_device_hours"]) == 12.5 and rows[0]["something/new"] == "1.0"
    assert rows[0]["protocol_extractor"] == "inception" and rows[0]["protocol_num_samples"] == "50000"
    maskgit = next(row for row in rows if row["model"] == "MaskGIT")
    assert maskgit["tmacs_total"] == "" and maskgit["fid"] == "6.18" and maskgit["parameters"] == "227000000.0"
    mage = next(row for row in rows if row["model"].startswith("MAGE-B"))
    names = ("reference", "is_guided", "num_samples", "inception_score", "tokenizer")
    assert [mage[name] for name in names] == ["val", "False", "50000", "81.2", "VQGAN of MAGE"]
    dit = next(row for row in rows if row["model"] == "DiT-XL/2")
    assert (dit["cost_basis"], dit["has_decoder"], dit["precision"], dit["recall"]) == ("derived", "False", "0.83", "0.57")
    (section,) = table.to_json(lab.compare(published="auto"))["sections"]
    published = next(result for result in section["published"] if result["name"] == "DiT-XL/2")
    assert published["reference"] == "virtual" and published["is_guided"] is True and published["cost_basis"] == "derived"


def test_quoted_columns_have_values_and_the_rarest_are_left_out_first(lab: Lab) -> None:
    lab.evaluate({"fid": 2.79})
    found = lab.compare(published="auto")
    titles = [column.title for column in quoted_table(found.sections[0].published).columns]
    assert titles[:6] == ["quoted", "params", "steps", "TFLOPs", "FID", "reference"] and "guided" in titles and "rFID" in titles
    assert "mask ratio" not in titles and "samples" not in titles, "no value, and all known numbers are the usual one"
    assert "samples" in [column.title for column in quoted_table(published_for("imagenet512")).columns], "5,000"
    one_step = [column.title for column in quoted_table(published_for("imagenet256-one-step")).columns]
    assert one_step == ["quoted", "steps", "mask ratio", "FID", "reference", "source"]
    text = text_of(found, 120)
    header = next(line for line in text.splitlines() if line.startswith("quoted"))
    assert "reference" in header and "precision" not in header and "no room for" in text
    wide = next(line for line in text_of(found).splitlines() if line.startswith("MAGE-B"))
    assert " val " in wide and " no " in wide
