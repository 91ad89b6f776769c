"""What a person sees of a plan, and at the end of a run: artifacts, their places, scores and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from pipelines.artifacts.inventory import phrase
from pipelines.evaluation.protocol import SCORES
from pipelines.formatting import one_line, show_count, show_number
from pipelines.prediction import show as show_prediction
from pipelines.prediction.predict import Prediction
from pipelines.registry.evaluation_record import DISTANCES
from pipelines.registry.influences import with_interval
from pipelines.storage.redaction import without_credentials
from pipelines.workflow.node_run import Session
from pipelines.workflow.stage import MAIN, FinishedStage, PlannedStage
from pipelines.workflow.work import read_prediction

_COST = ("gmacs_total", "images_per_second")  # shown after the scores; all values are in the manifest and in tracking
_GAP = 2  # between columns
_ANY_WIDTH = 100_000


def summarize(
    name: str,
    done: Sequence[FinishedStage],
    session: Session,
    seconds: float,
    *,
    report: Path | None,
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """The answer of `enat run`, as JSON can hold it. prediction: made before the run."""
    reports = [item.manifest for item in done if item.node.id == "report"]
    kept = [f"{session.store.place(made.stage, made.key)}/{made.file('report.html').path}" for made in reports]
    scores = {_title(item.node.id): dict(item.manifest.metrics) for item in done if item.node.stage.name == "evaluate"}
    stages = [
        {
            "stage": item.node.id,
            "key": item.manifest.key,
            "reused": item.is_reused,
            "seconds": item.seconds,
            "made_in_seconds": item.manifest.provenance["seconds"],
            "predicted_seconds": read_prediction(item.manifest.provenance),
            "description": phrase(item.manifest, item.node.stage.describe),
            "place": session.store.place(item.manifest.stage, item.manifest.key),
            "metrics": dict(item.manifest.metrics),
        }
        for item in done
    ]
    tracked = {"uri": without_credentials(session.run.uri), "run_id": session.run.run_id} if session.run.run_id else None
    return {
        "name": name,
        "seconds": seconds,
        "predicted": show_prediction.to_json(prediction) if prediction is not None else None,
        "store": session.store.uri,
        "report": str(report) if report else None,
        "report_place": kept[0] if kept else None,
        "tracking": tracked,
        "scores": scores,
        "stages": stages,
    }


def _title(node: str) -> str:
    """Of the scores of a node: main, a variant, or either with the protocol, as in "main/val"."""
    evaluation, _, variant = node.partition("@")
    _, slash, protocol = evaluation.partition("/")
    return f"{variant or MAIN}{slash}{protocol}"


def show_plan(planned: Sequence[PlannedStage], store: str, console: Console, prediction: Prediction | None = None) -> None:
    titles = ["stage", "key", "plan", *(show_prediction.columns(prediction) if prediction is not None else ())]
    order, rows = [item.node.id for item in planned], []
    for item in planned:
        last = max(item.node.inputs.values(), key=order.index, default="")
        key = item.key[:12] if item.key else f"[dim]after {last.partition('@')[0]}[/]"
        parts = f" [dim]({item.parts_done} parts are done)[/]" if item.parts_done else ""
        takes = show_prediction.cells(prediction, item.node.id) if prediction is not None else ()
        rows.append([item.node.id, key, "[green]reuse[/]" if item.is_reused else f"[yellow]compute[/]{parts}", *takes])
    kept, left_out = [*titles], []
    while (
        console.measure(table := _plan_table(titles, rows, kept), options=console.options.update(max_width=_ANY_WIDTH)).maximum
        > console.width
    ):
        if not (least := next((title for title in show_prediction.LEAST if title in kept), None)):
            break
        kept.remove(least)
        left_out.append(least)
    console.print(table)
    if left_out:
        console.print(f"[dim]no room for {', '.join(left_out)}; use a wider terminal or --json[/]", highlight=False)
    reused = sum(item.is_reused for item in planned)
    console.print(f"\n{reused} of {len(planned)} stages are reused from {store}", highlight=False)
    if prediction is not None:
        show_prediction.show_total(prediction, console)


def _plan_table(titles: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[str]) -> Table:
    """Of the kept columns. Only names of stages are folded."""
    table = Table(box=None, pad_edge=False)
    for title in kept:
        table.add_column(title, no_wrap=title != "stage", overflow="fold")
    for row in rows:
        table.add_row(*(row[titles.index(title)] for title in kept))
    return table


def show(answer: Mapping[str, Any], console: Console) -> None:
    """The closing summary: one line per stage with what it made, the scores side by side, and the paths of the results."""
    has_prediction = any(item["predicted_seconds"] and not item["reused"] for item in answer["stages"])
    stages = _table("What was made", "stage", "", *(["predicted"] if has_prediction else []), "")
    for item in answer["stages"]:
        if item["stage"].startswith("evaluate"):
            continue  # its numbers are the scores below
        status = "[dim]reused[/]" if item["reused"] else f"{item['made_in_seconds']:.1f} s"
        before = None if item["reused"] else item["predicted_seconds"]
        predicted = f"[dim]{before['value']:.1f} s[/]" if before else ""
        description = one_line(item["description"])
        stages.add_row(item["stage"], status, *([predicted] if has_prediction else []), f"[dim]{description}[/]")
    console.print()
    console.print(stages, highlight=False)

    if answer["scores"]:
        _show_scores(answer["scores"], console)
        evaluations = [f"evaluate/{item['key'][:12]}" for item in answer["stages"] if item["stage"].startswith("evaluate")]
        console.print(f"\nall values: enat artifacts show {evaluations[0]}", highlight=False, soft_wrap=True)

    reused = sum(item["reused"] for item in answer["stages"])
    connecting = answer.get("connecting_seconds")
    start = f" ({connecting:.1f} s to connect to Ray)" if connecting else ""
    console.print(
        f"\n{show_count(len(answer['stages']), 'stage')}, {reused} reused, {answer['seconds']:.1f} s in all{start}", highlight=False
    )
    if (foreseen := answer.get("predicted")) and foreseen["seconds"]["value"]:
        expected, least = foreseen["seconds"], "" if foreseen["is_complete"] else "at least "
        between = f"{expected['low']:.0f} to {expected['high']:.0f}"
        stages_took = f"{answer['seconds'] - (connecting or 0.0):.1f}"
        console.print(f"{least}{expected['value']:.1f} s were predicted ({between}), {stages_took} were taken", highlight=False)
    console.print(f"artifacts {answer['store']}/<stage>/<key>", highlight=False, soft_wrap=True)
    if answer["report"]:
        console.print(f"report    {answer['report']}", highlight=False, soft_wrap=True)
        console.print(f"          {answer['report_place']}", highlight=False, soft_wrap=True)
    if answer.get("log"):
        console.print(f"log       {answer['log']}", highlight=False, soft_wrap=True)
    if answer["tracking"]:
        console.print(f"tracking  {answer['tracking']['uri']}", highlight=False, soft_wrap=True)
        console.print(f"run       {answer['tracking']['run_id']}", highlight=False, soft_wrap=True)


def _show_scores(scored: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Scores first, then cost. Models that do not fit into the width are in a further table."""
    wanted = [each for name in SCORES for each in (name, f"{name}_infinity")]
    names = [name for name in (*wanted, *_COST) if any(name in metrics for metrics in scored.values())]
    columns = {title: [_score(metrics, name) for name in names] for title, metrics in scored.items()}
    console.print()
    for number, part in enumerate(_fitting(columns, console.width - max(map(len, names), default=0))):
        scores = _table("What it is worth" if number == 0 else "", "", *part)
        for row, name in enumerate(names):
            scores.add_row(name, *(columns[title][row] for title in part))
        console.print(scores, highlight=False)
    for name in DISTANCES:
        if distance := scored.get(MAIN, {}).get(name):
            others = {title: metrics for title, metrics in scored.items() if title != MAIN and "/" not in title and name in metrics}
            ratios = {title: f"{metrics[name] / distance:.1f}" for title, metrics in others.items()}
            if len(ratios) == 1:
                ((title, ratio),) = ratios.items()
                console.print(f"\n{name} of {title} is {ratio} times that of {MAIN}", highlight=False)
            elif ratios:
                listed = ", ".join(f"{title} {ratio}" for title, ratio in ratios.items())
                console.print(f"\n{name}, as a multiple of that of {MAIN}: {listed}", highlight=False)


def _fitting(columns: Mapping[str, Sequence[str]], width: int) -> list[list[str]]:
    """Titles of columns, in groups that fit into the width. Each group has at least one."""
    groups: list[list[str]] = []
    room = 0
    for title, cells in columns.items():
        needed = max(map(cell_len, (title, *cells))) + _GAP
        if not groups or needed > room:
            groups.append([])
            room = width
        groups[-1].append(title)
        room -= needed
    return groups


def _score(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    return with_interval(metrics, name) if f"{name}_se" in metrics else show_number(metrics[name])


def show_import(target: str, values: Sequence[str], name: str, place: str, console: Console) -> None:
    """How a config uses imported weights. values: of the config, key=value; the weights are named by their digest."""
    key = f"{target}.weights="
    lines = OmegaConf.to_yaml(OmegaConf.from_dotlist([key + name if value.startswith(key) else value for value in values]))
    console.print(f"\n{place}\n\nin a config:\n\n{lines.rstrip()}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
