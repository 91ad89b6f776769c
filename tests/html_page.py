"""A parsed HTML page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image


@dataclass
class Page(HTMLParser):
    """rows: text of each cell of all tables.   images: by alternative text.   open: tags that are not closed."""

    tags: Counter[str] = field(default_factory=Counter)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""
    rows: list[list[str]] = field(default_factory=list)
    images: dict[str, Image.Image] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, html: str) -> Page:
        page = cls()
        HTMLParser.__init__(page)
        page.feed(html)
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if tag == "img":
            self.images[values["alt"]] = Image.open(io.BytesIO(base64.b64decode(values["src"].partition(",")[2])))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
