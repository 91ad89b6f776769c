"""Tables of a comparison: which columns a section needs, their values, and the best value of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.comparison.published import SETS, PublishedResult
from pipelines.comparison.sections import Row, Section
from pipelines.comparison.significance import unbeaten
from pipelines.registry.influences import half_interval

MISSING = "–"
MEASURED = "measured here"
_MAIN_RANK = 5  # the page shows columns up to this rank, and the others on request
_NAMES = ("name", "num_steps", "guidance_scale", "mask_ratio", "ema_length")  # columns that identify a row
_GMACS_PER_TERA = 1000.0
_MONEY = "cost/total_money"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """key: of a record.   shown: value -> text.   better: the direction in which a score improves, or "".

    rank: in a narrow terminal, columns of the highest rank are left out first; columns of equal rank are left out together.
    alike: text for the heading if all rows have the same value, or "" to keep the column.   by_device: the value depends on the
    device, so rows of different devices have no best value.
    A score with a standard error (key with suffix _se) is shown with half of its 95% interval.
    """

    key: str
    title: str
    shown: Callable[[Any], str]
    better: str = ""
    rank: int = 0
    alike: str = ""
    by_device: bool = False

    @property
    def is_text(self) -> bool:
        return self.shown is str


@dataclass(frozen=True)
class Cell:
    """value: for sorting, None if it is not known."""

    text: str
    value: Any
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """alike: values that all rows share, as text by column: "steps 8", "guidance 3.5"."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    alike: Mapping[str, str]

    @property
    def main(self) -> Table:
        return self.only(lambda column: column.rank <= _MAIN_RANK)

    @property
    def more(self) -> Table:
        """The less common columns, with those that identify a row."""
        return self.only(lambda column: column.key in _NAMES or column.rank > _MAIN_RANK)

    @property
    def more_titles(self) -> str:
        return ", ".join(column.title for column in self.columns if column.rank > _MAIN_RANK)

    def only(self, keep: Callable[[Column], bool]) -> Table:
        """The table with some of its columns."""
        kept = [index for index, column in enumerate(self.columns) if keep(column)]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        return Table(tuple(self.columns[index] for index in kept), rows, self.alike)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def short(value: float) -> str:
    """Three significant digits without an exponent: 0.347, 12.8, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _score(value: float) -> str:
    """Two decimals, as in papers. Small scores have more."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def short_count(value: float) -> str:
    """1_300_000 -> "1.3M", 574_300_000 -> "574M", 1_040_700_000 -> "1.04B" """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


COLUMNS = (
    Column("name", "model", str),
    Column("parameters", "params", short_count, rank=1),
    Column("num_steps", "steps", _count, alike="steps {}"),
    Column("guidance_scale", "guidance", short, alike="guidance {}"),
    Column("mask_ratio", "mask ratio", short, alike="mask ratio {}"),
    Column("gmacs_total", "GMACs", short),
    Column("tmacs_total", "TFLOPs", short),
    Column("fid", "FID", _score, "lower"),
    Column("frechet_distance", "Fréchet dist.", _score, "lower"),
    Column("inception_score", "IS", _score, "higher", rank=3),
    Column("class_agreement", "agreement", _percent, "higher", rank=3),
    Column("clip_score", "CLIP score", _score, "higher", rank=3),
    Column("precision", "precision", _share, "higher", rank=4),
    Column("recall", "recall", _share, "higher", rank=4),
    Column("sfid", "sFID", _score, "lower", rank=6),
    Column("kid", "KID", short, "lower", rank=6),
    Column("kernel_distance", "kernel dist.", short, "lower", rank=6),
    Column("cmmd", "CMMD", _score, "lower", rank=6),
    Column("images_per_second", "images/s", short, "higher", rank=5, by_device=True),
    Column("device", "device", str, rank=5, alike="device {}"),
    Column("train_steps", "train steps", _count, rank=2, alike="train steps {}"),
    Column("ema_length", "EMA length", short, rank=2, alike="EMA length {}"),
    Column("dataset", "trained on", str, rank=2, alike="training on {}"),
    Column("num_samples", "samples", _count, rank=2, alike="samples {}"),
    Column("replicates", "sets", _count, rank=5, alike="means of {} sets of samples"),
    Column("density", "density", _share, "higher", rank=7),
    Column("coverage", "coverage", _share, "higher", rank=7),
    Column("authenticity", "authenticity", _share, rank=7),
    Column("config_run", "run", str, rank=8, alike="run {}"),
    Column("images_per_pass", "images/pass", _count, rank=9, alike="{} images a pass"),
    Column("arithmetic", "arithmetic", str, rank=9, alike="arithmetic in {}"),
    Column(_MONEY, "money", short, rank=10),  # one column per currency
    Column("cost/total_device_hours", "device hours", short, rank=11),
    Column("cost/total_worker_hours", "worker hours", short, rank=11),
    Column("date", "date", str, rank=12, alike="on {}"),
    Column("device_seconds_per_image", "device s/image", short, rank=13, by_device=True),
    Column("worker_seconds_per_image", "worker s/image", short, rank=13, by_device=True),
    Column("peak_memory_gb", "peak GB", short, rank=13, by_device=True),
    Column("gmacs_executed", "GMACs executed", short, rank=14),
    Column("passes_per_image", "passes/image", short, rank=14),
)
_HIDDEN_IF_ZERO = ("cost/total_device_hours", "device_seconds_per_image")  # without an accelerator

_UNUSUAL_SAMPLES = "num_samples_unusual"

# Columns of published results. Those without a value in any row are not shown.
QUOTED_COLUMNS = (
    Column("model", "quoted", str),
    Column("parameters", "params", short_count),
    Column("num_steps", "steps", _count),
    Column("mask_ratio", "mask ratio", short),
    Column("tmacs_total", "TFLOPs", short),
    Column("fid", "FID", _score),
    Column("reference", "reference", str, rank=1),
    Column("is_guided", "guided", _yes_or_no, rank=2),
    Column(_UNUSUAL_SAMPLES, "samples", _count, rank=3),
    Column("inception_score", "IS", _score, rank=4),
    Column("precision", "precision", _share, rank=5),
    Column("recall", "recall", _share, rank=5),
    Column("cost_basis", "TFLOPs are", str, rank=6),
    Column("tokenizer", "tokenizer", str, rank=7),
    Column("rfid", "rFID", _score, rank=7),
    Column("source", "source", str),
    Column("note", "note", str, rank=8),
)
_FIELDS = (  # of a row, with the same key in its record
    "model", "variant", "config_run", "dataset", "resolution", "parameters", "train_steps", "num_steps", "guidance_scale",
    "mask_ratio", "ema_length", "num_samples", "device", "images_per_pass", "samples",
)  # fmt: skip
_QUOTED_FIELDS = (  # of a published result, with the same key in its record
    "fid", "inception_score", "precision", "recall", "reference", "is_guided", "num_samples", "cost_basis",
    "tokenizer", "rfid", "source",
)  # fmt: skip

# Records -------------------------------------------------------------------------------------------------------------------


def record(row: Row) -> dict[str, Any]:
    """A measured row as flat values by the keys of COLUMNS and the names of metrics. Unknown values are absent.

    tmacs_total: 10^12 multiply-accumulates, called TFLOPs in papers. The metric gflops_total counts each as two operations.
    The key of money contains the currency: cost/total_money_EUR.
    """
    gmacs = row.metrics.get("gmacs_total")
    values = {
        **{name: value for name, value in row.metrics.items() if name != _MONEY},
        **{name: getattr(row, name) for name in _FIELDS},
        _money_key(row.currency): row.metrics.get(_MONEY),
        "arithmetic": row.precision,
        "tmacs_total": None if gmacs is None else gmacs / _GMACS_PER_TERA,
        "date": f"{row.measured:%Y-%m-%d}",
        "source": MEASURED,
        "run_id": row.run_ids[0],
    }
    return _known(values)


def _known(values: Record) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _money_key(currency: str | None) -> str:
    return f"{_MONEY}_{currency}" if currency else _MONEY


def quoted_record(result: PublishedResult) -> dict[str, Any]:
    """A published row with the same keys, and with those of its protocol."""
    values = {
        "model": result.label,
        "dataset": result.dataset,
        "parameters": None if result.params_millions is None else result.params_millions * 1e6,
        "num_steps": result.steps,
        "mask_ratio": result.mask_ratio,
        "tmacs_total": result.tflops,
        "gmacs_total": None if result.tflops is None else result.tflops * _GMACS_PER_TERA,
        **{name: getattr(result, name) for name in _QUOTED_FIELDS},
        "has_decoder": None if result.tflops is None else result.has_decoder,
        "note": result.note or None,
    }
    return _known(values)


# Tables --------------------------------------------------------------------------------------------------------------------


def measured_table(section: Section) -> Table:
    """Columns with at least one value. Values that all rows share are in `alike` if their column allows it."""
    records = [{**record(row), "name": row.name} for row in section.rows]
    columns, alike = [], {}
    for column in _present(section, records):
        found = {values.get(column.key) for values in records}
        if column.alike and len(found) == 1 and None not in found:
            alike[column.key] = column.alike.format(column.shown(found.pop()))
        else:
            columns.append(column)
    return _table(records, columns, _best_rows(section, columns), alike)


def quoted_table(results: Sequence[PublishedResult]) -> Table:
    """Sorted by score, best first, unknown last. One-step decoding is sorted by mask ratio first.

    Numbers of samples are shown where they differ from the usual one of the dataset.
    """
    ordered = sorted(results, key=lambda found: (found.mask_ratio or 0.0, found.fid is None, found.fid or 0.0, found.name))
    records = [quoted_record(result) for result in ordered]
    for result, values in zip(ordered, records, strict=True):
        if result.num_samples not in (None, SETS[result.dataset].num_samples):
            values[_UNUSUAL_SAMPLES] = result.num_samples
    return _table(records, [column for column in QUOTED_COLUMNS if any(column.key in values for values in records)], {})


def _table(
    records: Sequence[Record], columns: Sequence[Column], best: Mapping[str, set[int]], alike: Mapping[str, str] | None = None
) -> Table:
    rows = tuple(
        tuple(_cell(values, column, number in best.get(column.key, ())) for column in columns)
        for number, values in enumerate(records)
    )
    return Table(tuple(columns), rows, alike or {})


def _cell(values: Record, column: Column, is_best: bool) -> Cell:
    if column.key not in values:
        return Cell(MISSING, None)
    value = values[column.key]
    text = column.shown(value)
    if (half := half_interval(values, column.key)) is not None:
        text += f" ± {column.shown(half)}"
    return Cell(text, value, is_best)


def _present(section: Section, records: Sequence[Record]) -> list[Column]:
    keys = {name for values in records for name in values}
    if {row.dataset for row in section.rows if row.dataset} == {section.dataset}:
        keys.discard("dataset")  # it is in the heading
    if all(row.num_samples == section.protocol.get("num_samples") for row in section.rows):
        keys.discard("num_samples")  # it is in the protocol
    for key in _HIDDEN_IF_ZERO:
        if not any(values.get(key) for values in records):
            keys.discard(key)
    largest = max((values["gmacs_total"] for values in records if "gmacs_total" in values), default=0.0)
    keys.discard("gmacs_total" if largest >= 100 or section.published else "tmacs_total")
    present = []
    for column in COLUMNS:
        if column.key == _MONEY:
            present += [_money_column(column, key) for key in sorted(keys) if key.partition("_money")[0] == "cost/total"]
        elif column.key in keys:
            present.append(column)
    return present


def _money_column(column: Column, key: str) -> Column:
    currency = key.removeprefix(_MONEY).removeprefix("_") or "unknown currency"
    return Column(key, f"{column.title} ({currency})", column.shown, rank=column.rank)


def _best_rows(section: Section, columns: Sequence[Column]) -> dict[str, set[int]]:
    """Numbers of the rows that no other beats significantly, by column, if values differ.

    Rows with different mask ratios solve different tasks: none is best.
    """
    found: dict[str, set[int]] = {}
    if len({row.mask_ratio for row in section.rows}) > 1:
        return found
    devices = {row.device for row in section.rows}
    is_one_device = len(devices) == 1 and None not in devices
    for column in columns:
        values = {row.metrics[column.key] for row in section.rows if column.key in row.metrics}
        if column.better and len(values) > 1 and (is_one_device or not column.by_device):
            found[column.key] = unbeaten(section.rows, column.key, column.better)
    return found
