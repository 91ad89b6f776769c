"""The documentation site, which `make docs` builds into build/site. Pages are read where they lie, so they also work without it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx import addnodes

project = "ENAT laboratory"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "pipelines/guide/*.md",
    "pipelines/guide/*.ipynb",
    "infra/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["build", "runs"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}  # the address of the folder leads to the first page
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_domain_indices = False
pygments_style, pygments_dark_style = "default", "monokai"

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
nb_execution_mode = "off"  # the notebook is committed with its outputs
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88

_INDENTED = re.compile(r" {4}")
_ALIGNED = re.compile(r"\S {2,}\S")
_NEXT_ARGUMENT = re.compile(r" {3,}(?=[`\w, ]+: )")


def _paragraph(lines: list[str]) -> list[str]:
    """Docstrings are plain text with `code`. Indented paragraphs and tables are shown as they are."""
    text = "\n".join(lines)
    if all(map(_INDENTED.match, lines)) or (len(lines) > 2 and sum(map(bool, map(_ALIGNED.search, lines))) > len(lines) / 2):
        indent = "" if all(map(_INDENTED.match, lines)) else "    "
        return ["::", "", *(indent + line for line in lines), ""]
    parts = [part for line in text.splitlines() for part in _NEXT_ARGUMENT.sub("\n\n", line.strip()).splitlines()]
    pieces = re.split(r"(`[^`]*`)", "\n".join(parts))
    escaped = [f"`{piece}`" if piece.startswith("`") else re.sub(r"([\\*|_])", r"\\\1", piece) for piece in pieces]
    return [*"".join(escaped).splitlines(), ""]


def _plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:  # noqa: PLR0917 (Sphinx gives them)
    paragraphs = [part.splitlines() for part in re.split(r"\n\s*\n", "\n".join(lines)) if part.strip()]
    lines[:] = [line for paragraph in paragraphs for line in _paragraph(paragraph)]


def _unlink_folders(app: Any, doctree: Any) -> None:
    """Links to folders of the repository, which have no page here, become text. Those that lead nowhere are errors."""
    page = Path(app.env.doc2path(app.env.current_document.docname))
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and (page.parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _plain)
    app.connect("doctree-read", _unlink_folders)
