"""Both pages in a real chromium: nothing fails, overflows or reaches for a network, and their scripts do what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from enat.images import make_grid, png_bytes
from material.compare_lab import HOSTILE, PROTOCOL, Lab, key_of
from pipelines.comparison import compare
from services.chromium import Browser

WIDTHS = [(1300, "light"), pytest.param(700, "dark", marks=pytest.mark.slow)]


def _assert_clean(browser: Browser, num_charts: int) -> None:
    """The page has drawn itself without an error or a request, and scrolls in one direction only."""
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.value("document.querySelectorAll('.chart .main-svg .xtick').length > 0") == (num_charts > 0)
    assert browser.value("document.querySelectorAll('.chart .plot-container').length") == num_charts
    assert browser.of("Runtime.exceptionThrown") == browser.of("Log.entryAdded") == browser.of("Runtime.consoleAPICalled") == []
    requests = [request["request"]["url"] for request in browser.of("Network.requestWillBeSent")]
    assert [url[:5] for url in requests if not url.startswith("data:")] == ["file:"]
    assert not browser.of("Network.webSocketCreated")


def _widths(browser: Browser, selector: str) -> list[float]:
    widths: list[float] = browser.value(f"[...document.querySelectorAll({selector!r})].map(x => x.getBoundingClientRect().width)")
    return widths


def _column(browser: Browser, number: int) -> list[str]:
    """Text of the visible cells of a column of the first table."""
    rows = "[...document.querySelector('table').tBodies[0].rows].filter(row => !row.hidden)"
    cells: list[str] = browser.value(f"{rows}.map(row => row.cells[{number}].textContent)")
    return cells


@pytest.fixture
def comparison(lab: Lab, tmp_path: Path) -> Path:
    """A page with long and hostile names, many columns, and samples of 32 pixels."""
    noise = torch.randint(0, 255, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = png_bytes(make_grid(noise, columns=10, scale=2))
    names = ["enat-s", "enat-l", HOSTILE, "a-long-name-" * 20]
    scores = dict.fromkeys(("precision", "recall", "inception_score", "images_per_second", "sfid", "density"), 0.5)
    protocol = {**PROTOCOL, "reference": "imagenet, 32 px"}
    for number, name in enumerate(names * 3):
        steps = (4, 8, 16)[number // 4]
        metrics = {**scores, "fid": 2.0 + 30 / steps + number % 4, "gmacs_total": 50.0 * steps}
        if number == 5:
            del metrics["recall"]
        lab.evaluate(
            metrics, samples=key_of(number), model=name, num_steps=steps, resolution=32, protocol=protocol,
            grid=grid if number < 2 else None, **{"input.model": f"train/{number % 4}"},
        )  # fmt: skip
    found = lab.compare(published="none")
    page = tmp_path / "compare.html"
    page.write_text(compare.make_files(found, "compare-test", compare.read_grids(found)).page, encoding="utf-8")
    return page


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_a_comparison_is_drawn_and_can_be_used(browser: Browser, comparison: Path, width: int, scheme: str) -> None:
    browser.open(comparison, width, scheme)
    _assert_clean(browser, num_charts=2)
    assert browser.value("getComputedStyle(document.querySelector('.chart .gtitle, .chart .xtitle')).fill") == browser.value(
        "getComputedStyle(document.body).color"
    ), "charts have the colours of the page"
    assert len(_widths(browser, ".pixels img")) == 2
    assert min(_widths(browser, ".pixels img")) == pytest.approx((10 * (2 * 32 + 2) + 2) * 1.5, abs=1), "three pixels for each"
    legend = browser.value("[...document.querySelectorAll('.chart .legendtext')].map(text => text.textContent)")
    assert HOSTILE in legend and "enat-s" in legend and any(name.startswith("a-long-name-") for name in legend)

    fid = browser.value("[...document.querySelector('table').tHead.rows[0].cells].findIndex(head => head.textContent == 'FID')")
    shown = _column(browser, fid)
    click = f"document.querySelector('table').tHead.rows[0].cells[{fid}].click()"
    browser.value(click)
    assert _column(browser, fid) == sorted(shown, key=float) != shown
    browser.value(click)
    assert _column(browser, fid) == sorted(shown, key=float, reverse=True)
    recall = browser.value(
        "[...document.querySelector('table').tHead.rows[0].cells].findIndex(head => head.textContent == 'recall')"
    )
    for _ in range(2):
        browser.value(click.replace(str(fid), str(recall)))
        assert _column(browser, recall)[-1] == "–", "missing values are last in both directions"
    field = "document.querySelector('input[type=search]')"
    browser.value(f"{field}.value = 'ENAT-S'; {field}.dispatchEvent(new Event('input'))")
    assert _column(browser, 0) == ["enat-s"] * 3

    assert not browser.value("document.querySelector('dialog').open")
    browser.value("document.querySelector('.pixels img').click()")
    assert browser.value("document.querySelector('dialog').open")
    assert _widths(browser, "dialog img") == pytest.approx([2 * _widths(browser, ".pixels img")[0]], abs=2)
    browser.value("document.querySelector('dialog').click()")
    assert not browser.value("document.querySelector('dialog').open")
    _assert_clean(browser, num_charts=2)


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_a_report_is_drawn(browser: Browser, digits_run, width: int, scheme: str) -> None:
    browser.open(digits_run.workspace / "digits.html", width, scheme)
    _assert_clean(browser, num_charts=3)  # the loss, and two scores while training
    assert min(_widths(browser, ".pixels img")) > 600
