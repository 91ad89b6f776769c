"""A seeded campaign of faults against an exact oracle: `python tests/faults/campaign.py --seed S --faults N --flips M --inputs K`.

Faults strike commands that run real stages. Afterwards the same command is repeated, and its results are compared with those of a
run that nothing disturbed. Flips change files of stores and caches, hostile inputs are given to readers. The seed determines every
case and the order of cases. Each case is recorded in a journal, and a campaign that is started again continues after it. A kind of
fault is a function `(laboratory, random generator) -> outcomes` and a line in KINDS.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import quantiles

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
sys.path[:0] = [str(place) for place in (HERE, HERE / "shim", HERE.parent, HERE.parents[1])]

import files  # noqa: E402
import identical  # noqa: E402
import inputs  # noqa: E402
import network  # noqa: E402
import processes  # noqa: E402
import tracking  # noqa: E402
from oracle import Laboratory, Outcome  # noqa: E402

from pipelines.formatting import printable  # noqa: E402
from pipelines.storage.base import digest_of  # noqa: E402
from pipelines.workflow.provenance import code_version  # noqa: E402

BAD = ("silent", "lost", "doubled", "hung", "executed", "outside", "unclear")
FAULTS, FLIPS, INPUTS = "faults", "flips", "inputs"
_SHOWN_LINES = 30
# Kind -> its function, what it counts as, and its share of that
KINDS: dict[str, tuple[Callable[[Laboratory, random.Random], list[Outcome]], str, int]] = {
    "inputs": (inputs.inputs, INPUTS, 1),
    "flips": (files.flips, FLIPS, 1),
    "signals": (processes.signals, FAULTS, 10),
    "ray": (processes.ray, FAULTS, 3),
    "disk": (processes.disk, FAULTS, 3),
    "garbage": (processes.garbage, FAULTS, 1),
    "network": (network.network, FAULTS, 3),
    "identical": (identical.identical, FAULTS, 2),
    "tracking": (tracking.tracking, FAULTS, 1),
}


def schedule(seed: str, group: str, only: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Kinds of a group in random order, each with the number of its case: without an end, and the same for every seed."""
    kinds = {kind: share for kind, (_, own, share) in KINDS.items() if own == group and (not only or kind in only)}
    order, numbers = random.Random(f"{seed}/{group}"), {kind: count() for kind in kinds}
    while kinds:
        (kind,) = order.choices([*kinds], [*kinds.values()])
        yield kind, next(numbers[kind])


class Journal:
    """What was done, one JSON line for each case. The first line holds the seed and the code."""

    def __init__(self, path: Path, head: dict[str, str]) -> None:
        self.path, self.outcomes = path, dict[tuple[str, int], list[Outcome]]()
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        if lines and lines[0] != head:
            raise click.UsageError(f"{path} belongs to {lines[0]}, not to {head}; choose another --folder")
        for line in lines[1:]:
            self.outcomes[line["kind"], line["number"]] = [Outcome(**each) for each in line["outcomes"]]
        if not lines:
            self._append(head)

    def add(self, kind: str, number: int, outcomes: list[Outcome]) -> None:
        self.outcomes[kind, number] = outcomes
        self._append({"kind": kind, "number": number, "outcomes": [asdict(outcome) for outcome in outcomes]})

    def _append(self, line: Mapping[str, object]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, kind: str) -> list[Outcome]:
        return [each for (own, _), outcomes in self.outcomes.items() for each in outcomes if own == kind]


@click.command()
@click.option("--seed", required=True, help="Determines every case and the order of cases.")
@click.option("--faults", default=0, help="Faults that strike commands.")
@click.option("--flips", default=0, help="Changes of files.")
@click.option("--inputs", "num_inputs", default=0, help="Hostile inputs.")
@click.option(
    "--minutes", "--slice", "minutes", default=float("inf"), help="A part of about this duration, after the laboratory is made."
)
@click.option("--only", multiple=True, type=click.Choice([*KINDS]), help="Only this kind. Repeatable.")
@click.option(
    "--folder", default="runs/faults", type=click.Path(path_type=Path), help="Laboratory and journal. Cases in it are not repeated."
)
@click.option("--table", type=click.Path(path_type=Path), help="Also write the table to this file, as Markdown.")
def main(
    seed: str, faults: int, flips: int, num_inputs: int, minutes: float, only: tuple[str, ...], folder: Path, table: Path | None
) -> None:
    """Exit code 1 if a result was silently wrong, or if something was lost, done twice, hung, or ended in a traceback."""
    lab = Laboratory(folder.absolute())
    journal = Journal(lab.folder / f"journal-{digest_of(seed)[:12]}.jsonl", {"seed": seed, "code": code_version()})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            if flips or faults:
                lab.prepare()
            started = time.monotonic()
            for group, wanted, share in ((INPUTS, num_inputs, 0.1), (FLIPS, flips, 0.3), (FAULTS, faults, 1.0)):
                task = progress.add_task(group, total=wanted, visible=wanted > 0)
                done = 0
                for kind, number in schedule(seed, group, only):
                    if done >= wanted or time.monotonic() > started + share * 60 * minutes:
                        break
                    if (kind, number) not in journal.outcomes:
                        journal.add(kind, number, outcomes_of(lab, seed, kind, number))
                    outcomes = journal.outcomes[kind, number]
                    done += len(outcomes)
                    progress.update(task, completed=done)
                    for each in outcomes:
                        if each.verdict in BAD or each.is_rough:
                            name = each.verdict if each.verdict in BAD else "traceback"
                            words = f"{name}: {kind} {number}, {each.what}: {each.note} {each.log}"
                            progress.console.print("\n".join([words, *last_lines(each.log)]), markup=False, highlight=False)
    finally:
        lab.close()
        lab.stack.close()
    rows = {kind: row for kind in KINDS if (row := summary(journal.of(kind)))}
    show(rows)
    if table is not None:
        table.write_text(markdown(rows))
    if any(each.verdict in BAD or each.is_rough for kind in KINDS for each in journal.of(kind)):
        sys.exit(1)


def outcomes_of(lab: Laboratory, seed: str, kind: str, number: int) -> list[Outcome]:
    """After a case that went wrong the next one gets a new Ray."""
    try:
        outcomes = KINDS[kind][0](lab, random.Random(f"{seed}/{kind}/{number}"))
    except Exception as error:
        outcomes = [Outcome("the case ended early", "hung", note=f"{type(error).__name__}: {error}"[-500:])]
    if any(each.verdict in BAD for each in outcomes):
        lab.close()
    return outcomes


def last_lines(log: str) -> list[str]:
    """What the command printed last, for who has only the output of the campaign."""
    lines = Path(log).read_text(errors="replace").splitlines() if log else []
    return [f"    {printable(line)}" for line in lines[-_SHOWN_LINES:]]


# The table -----------------------------------------------------------------------------------------------------------------


def summary(outcomes: list[Outcome]) -> dict[str, str]:
    """Verdicts counted, and seconds to recover."""
    counts = Counter(each.verdict for each in outcomes)
    seconds = sorted(each.seconds for each in outcomes if each.seconds is not None)
    spread = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else [*seconds] * 19
    return (
        {}
        if not outcomes
        else {
            "tried": str(len(outcomes)),
            "detected": str(counts["detected"] + counts["refused"]),
            "harmless": str(counts["harmless"] + counts["accepted"]),
            **{name: str(counts[name]) for name in BAD},
            "traceback": str(sum(each.is_rough for each in outcomes)),
            "p50": f"{spread[9]:.1f} s" if seconds else "",
            "p95": f"{spread[18]:.1f} s" if seconds else "",
        }
    )


def show(rows: dict[str, dict[str, str]]) -> None:
    table = Table("kind", *next(iter(rows.values()), ()), box=None)
    for kind, row in rows.items():
        table.add_row(kind, *row.values())
    Console().print(table)


def markdown(rows: dict[str, dict[str, str]]) -> str:
    names = [*next(iter(rows.values()), ())]
    lines = [["kind", *names], ["---"] * (1 + len(names)), *([kind, *row.values()] for kind, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
