"""Numbers, sizes, ages and foreign text, as people write and read them."""

from __future__ import annotations

import math
import re

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_NUMBER = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "500", "1.5GB", "200 MiB", "3k". Raises ValueError."""
    if match := _NUMBER.fullmatch(text):
        unit = match[2].lower().removesuffix("b")
        if unit in _SIZES:
            return round(float(match[1]) * _SIZES[unit])
    raise ValueError(f"{text!r} is not a size; write a number with a unit, such as 500MB or 1.5GiB")


def parse_age(text: str) -> float:
    """Seconds of "30d", "12h", "90m", "45s", "2w". Raises ValueError."""
    if (match := _NUMBER.fullmatch(text)) and match[2].lower() in _AGES:
        return float(match[1]) * _AGES[match[2].lower()]
    raise ValueError(f"{text!r} is not an age; write a number with s, m, h, d or w, such as 30d or 12h")


def show_size(size: float) -> str:
    """1_234_567 -> "1.2 MB"."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.1f} {unit}" if size < 99.95 else f"{size:.0f} {unit}"
    return f"{size / 1000:,.1f} TB"


def show_age(seconds: float) -> str:
    """86_400 -> "24 h". Negative ages, which come from clocks that differ, count as 0."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{max(0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def show_duration(seconds: float) -> str:
    """90 -> "90 s", 600 -> "10 min", 20_000 -> "5.6 h", 300_000 -> "3.5 d"."""
    units = (("s", 1, 120), ("min", 60, 90), ("h", 3600, 48), ("d", 86400, math.inf))
    unit, length = next((unit, length) for unit, length, most in units if seconds < most * length)
    value = seconds / length
    return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def show_number(value: float, digits: int = 4) -> str:
    """Whole numbers in full, 12_345.0 -> "12,345"; others with significant digits, 0.123456 -> "0.1235"."""
    is_whole = math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15
    return f"{value:,.0f}" if is_whole else f"{value:.{digits}g}"


def show_count(count: int, noun: str) -> str:
    """12_345, "file" -> "12,345 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def one_line(text: str) -> str:
    """Foreign text for rich: on one line, without control characters, and not read as markup."""
    from rich.markup import escape

    return escape(printable(text))


def printable(text: str) -> str:
    """Text on one line, without characters that a terminal would obey."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
