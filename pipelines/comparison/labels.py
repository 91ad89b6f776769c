"""Labels of points: beside their marker if there is room, else further away with a line to it. No label is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.comparison.canvas import DPI, Axes

_FONT = 8.0
_PIXELS = DPI / 72  # of a point
_GAP = 3.0  # points between marker and label
_RINGS = (0.0, 8.0, 18.0, 30.0, 44.0, 60.0, 80.0, 105.0, 135.0)  # points, increasing distance
_LEADER_FROM = 8.0  # points; from this distance on a line joins label and marker
_DIRECTIONS = (0, 180, 45, 315, 135, 225, 90, 270, 22, 338, 158, 202)  # degrees, the most readable first
Point = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """x, y: of the point, in data.   radius: of its marker, in points.   is_quoted: in italics, and placed after the others."""

    x: float
    y: float
    text: str
    color: str
    radius: float
    is_quoted: bool = False


@dataclass(frozen=True)
class _Box:
    """Pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: _Box) -> float:
        """Square pixels."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, width) * max(0.0, height)

    def contains(self, other: _Box) -> bool:
        return self.x0 <= other.x0 and other.x1 <= self.x1 and self.y0 <= other.y0 and other.y1 <= self.y1


@dataclass(frozen=True)
class _Place:
    """box: of the text.   distance: from the marker, in points."""

    box: _Box
    distance: float


def write_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Place labels, measured points first. A label without text is a marker that the others avoid."""
    figure = axes.get_figure()
    figure.draw_without_rendering()  # settles the layout
    renderer = figure.canvas.get_renderer()
    extent = axes.get_window_extent(renderer)
    frame = _Box(extent.x0, extent.y0, extent.x1, extent.y1)
    centres = [(float(x), float(y)) for x, y in axes.transData.transform([(label.x, label.y) for label in labels])]
    taken = [_marker(centre, label.radius) for label, centre in zip(labels, centres, strict=True)]
    texts: list[_Box] = []
    for label, centre in sorted(zip(labels, centres, strict=True), key=lambda pair: pair[0].is_quoted):
        if label.text:
            drawn = _write(axes, label)
            size = drawn.get_window_extent(renderer)
            places = list(_places(centre, label.radius, size.width, size.height))
            place = _choose(places, centre, frame, taken, texts)
            _move(axes, drawn, place, label, centre)
            taken.append(place.box)
            texts.append(place.box)


def _marker(centre: Point, radius: float) -> _Box:
    (x, y), reach = centre, radius * _PIXELS
    return _Box(x - reach, y - reach, x + reach, y + reach)


def _places(centre: Point, radius: float, width: float, height: float) -> Iterator[_Place]:
    """Places by distance. Text to the right starts at its place, text to the left ends there, other text is centred."""
    for ring in _RINGS:
        for degrees in _DIRECTIONS:
            reach = (radius + _GAP + ring) * _PIXELS
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            left = centre[0] + reach * cos - (0.0 if cos > 0.2 else width if cos < -0.2 else width / 2)
            bottom = centre[1] + reach * sin - (0.0 if sin > 0.5 else height if sin < -0.5 else height / 2)
            yield _Place(_Box(left, bottom, left + width, bottom + height), ring)


def _choose(places: Sequence[_Place], centre: Point, frame: _Box, taken: Sequence[_Box], texts: Sequence[_Box]) -> _Place:
    """The first place that covers nothing and whose line crosses no text, else one that covers nothing, else the least."""
    inside = [place for place in places if frame.contains(place.box)] or list(places)
    covered = [sum(place.box.overlap(other) for other in taken) for place in inside]
    free = [place for place, area in zip(inside, covered, strict=True) if area == 0.0]
    for place in free:
        if place.distance < _LEADER_FROM or not any(_crosses(centre, _end(place.box, centre), text) for text in texts):
            return place
    return free[0] if free else inside[min(range(len(inside)), key=covered.__getitem__)]


def _end(box: _Box, centre: Point) -> Point:
    """The point of a box that is nearest to a centre."""
    return min(max(centre[0], box.x0), box.x1), min(max(centre[1], box.y0), box.y1)


def _crosses(start: Point, end: Point, box: _Box) -> bool:
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    return bool(Path([start, end]).intersects_bbox(Bbox.from_extents(box.x0, box.y0, box.x1, box.y1), filled=False))


def _write(axes: Axes, label: Label) -> Any:
    text = axes.text(label.x, label.y, label.text, parse_math=False, zorder=6, va="bottom", ha="left", fontsize=_FONT)
    text.set(color=label.color, style="italic" if label.is_quoted else "normal")
    text.set(fontweight="normal" if label.is_quoted else "bold", in_layout=False)
    return text


def _move(axes: Axes, text: Any, place: _Place, label: Label, centre: Point) -> None:
    to_data = axes.transData.inverted()
    text.set_position(to_data.transform((place.box.x0, place.box.y0)))
    if place.distance >= _LEADER_FROM:
        end = to_data.transform(_end(place.box, centre))
        (line,) = axes.plot([label.x, end[0]], [label.y, end[1]], color=label.color, linewidth=0.6, alpha=0.7, zorder=2)
        line.set(in_layout=False, gid="leader")
