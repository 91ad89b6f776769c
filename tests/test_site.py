"""The site of `make docs`: every link leads somewhere, every public name is there, and nothing is fetched from a network."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import enat
from pipelines import notebook
from services.chromium import Browser

REPOSITORY = Path(__file__).parents[1]
_LOADS = {"src", "srcset", "poster", "data"}  # attributes that a browser fetches without a click; also href of <link>


class _Page(HTMLParser):
    """links: that a reader follows.   loads: what the browser fetches.   anchors: that links may lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"id", "name"} and value:
                self.anchors.add(value)
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif (name in _LOADS or (name == "href" and tag == "link")) and value:
                self.loads.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (target,) = re.findall(r"^docs: setup\n\t\$\(BIN\)/sphinx-build (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    arguments = target.replace("build/site-doctrees", str(folder / "doctrees")).replace("build/site", str(folder / "site")).split()
    ended = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path) for path in site.rglob("*.html")}


def _is_broken(pages: dict[Path, _Page], page: Path, link: str) -> bool:
    target = (page.parent / unquote(urlsplit(link).path)).resolve() if urlsplit(link).path else page
    fragment = unquote(urlsplit(link).fragment)
    return not target.is_file() or bool(fragment and target in pages and fragment not in pages[target].anchors)


@pytest.mark.slow
def test_every_link_leads_somewhere(pages: dict[Path, _Page]) -> None:
    links = {(page, link) for page, read in pages.items() for link in read.links if not urlsplit(link).scheme}
    assert len(links) > 500
    assert not sorted((page.name, link) for page, link in links if _is_broken(pages, page, link))
    train = next(page for page in pages if page.name == "train.html")
    assert _is_broken(pages, train, "scores.html#no-such-heading") and _is_broken(pages, train, "no-such-page.html")


@pytest.mark.slow
def test_every_page_of_the_guide_and_every_public_name_has_an_entry(site: Path, pages: dict[Path, _Page]) -> None:
    guide = {
        path.with_suffix(".html").name
        for path in (REPOSITORY / "pipelines" / "guide").iterdir()
        if path.suffix in {".md", ".ipynb"}
    }
    assert guide == {path.name for path in (site / "pipelines" / "guide").glob("*.html")}
    in_menu = {link.rpartition("/")[2] for link in pages[site / "docs" / "index.html"].links}
    assert guide | {"README.html", "api.html", "glossary.html", "how-it-works.html", "CONTRIBUTING.html"} <= in_menu
    own = {
        name
        for name, value in vars(notebook).items()
        if not name.startswith("_")
        and inspect.getmodule(value) is notebook
        and (inspect.isclass(value) or inspect.isfunction(value))
    }
    names = {f"enat.{name}" for name in enat.__all__} | {f"pipelines.notebook.{name}" for name in own}
    assert len(own) > 5 and names <= pages[site / "docs" / "api.html"].anchors


@pytest.mark.slow
def test_no_page_asks_the_network(site: Path, pages: dict[Path, _Page], browser: Browser) -> None:
    loads = {load for page in pages.values() for load in page.loads}
    assert not [load for load in loads if urlsplit(load).scheme not in {"", "data"} or load.startswith("//")]
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert not [found for style in styles for found in re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", style)]
    for name in ("index", "docs/index", "docs/api", "pipelines/guide/digits", "pipelines/guide/configuration"):
        browser.open(site / f"{name}.html", 1300)
        asked = {event["request"]["url"] for event in browser.of("Network.requestWillBeSent")}
        assert asked and not [url for url in asked if urlsplit(url).scheme not in {"file", "data", "blob"}]


@pytest.mark.slow
@pytest.mark.parametrize("width", [pytest.param(1300, marks=pytest.mark.faults), 700])
def test_pages_fit_their_window(site: Path, pages: dict[Path, _Page], browser: Browser, width: int) -> None:
    for page in sorted({*pages} - {site / "index.html"}):  # which leads to another page
        browser.open(page, width)
        assert browser.value("document.documentElement.scrollWidth") <= width, page.name


def test_the_glossary_is_in_the_order_of_the_alphabet() -> None:
    lines = (REPOSITORY / "docs" / "glossary.md").read_text().partition("```{glossary}\n")[2].splitlines()
    terms = [line for line in lines if line and not line.startswith((" ", "```"))]
    assert len(terms) > 25 and terms == sorted(terms, key=str.lower)
    assert {"protocol", "pass", "quarantine", "worker-second", "token map", "stage", "artifact", "key", "reuse", "variant"} <= {
        *terms
    }
