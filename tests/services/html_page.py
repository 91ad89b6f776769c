"""A parsed HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from PIL import Image


@dataclass
class Page(HTMLParser):
    """text: without scripts.   rows: text of each cell of all tables.   open: tags that are not closed.

    images: by alternative text; widths: on the page.   charts: name -> data and layout of Plotly.
    """

    tags: Counter[str] = field(default_factory=Counter)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""
    rows: list[list[str]] = field(default_factory=list)
    images: dict[str, Image.Image] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    scripts: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, html: str) -> Page:
        page = cls()
        HTMLParser.__init__(page)
        page.feed(html)
        page.close()
        return page

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        charts: dict[str, dict[str, Any]] = json.loads(self.scripts[0])
        return charts

    def series(self, chart: str) -> dict[str, list[tuple[float, float]]]:
        """Points by name, of the traces of a chart that have an entry in the legend."""
        return {
            trace["name"]: list(zip(trace["x"], trace["y"], strict=True))
            for trace in self.charts[chart]["data"]
            if trace["showlegend"]
        }

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if tag == "img" and "src" in values:
            self.images[values["alt"]] = Image.open(io.BytesIO(base64.b64decode(values["src"].partition(",")[2])))
            self.widths[values["alt"]] = int(values["width"])
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def assert_self_contained(html: str) -> Page:
    """Check that a page loads nothing, and runs nothing but its own scripts. `chromium.py` opens pages."""
    from plotly.offline import get_plotlyjs

    page = Page.parse(html)
    assert not {"link", "iframe", "object", "embed", "base", "form", "svg"} & page.tags.keys() and page.open == []
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"{tag} runs {name}"
        loads = name in ("src", "srcset", "href", "data", "action", "poster", "background")
        assert not loads or value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")), f"{tag} loads {value[:40]}"
    policy = 'http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
    assert policy in html, "browsers refuse requests"
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and html.count("<style>") == 1
    data, plotly, own = page.scripts
    assert json.loads(data) is not None and plotly in ("", get_plotlyjs()) and "fetch" not in own
    return page
