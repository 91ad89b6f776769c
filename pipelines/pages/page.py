"""One self-contained HTML file: it makes no request to a network. Its policy, in the head, lets browsers enforce this."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from enat.images import png_bytes
from pipelines.pages.chart import Chart, plotly_figure


@dataclass(frozen=True)
class Picture:
    """source: a data URI.   width: in pixels of the page."""

    source: str
    width: int


def picture(image: Image.Image, zoom: float = 1.0) -> Picture:
    return Picture(data_uri(png_bytes(image)), round(image.width * zoom))


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(package: str, template: str, charts: Mapping[str, Chart], **values: Any) -> str:
    """Render a template of a package, which extends page.html.j2. charts: by the name in the template's <div data-chart>."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(name, "templates") for name in (package, "pipelines.pages")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = {name: plotly_figure(chart) for name, chart in charts.items()}
    script = Markup(get_plotlyjs()) if figures else ""  # noqa: S704 (Plotly's own script; it has no closing tag)
    return environment.get_template(template).render(figures=figures, plotly_script=script, **values)
