"""What a person sees of a plan, and at the end of a run: artifacts, their places, scores and cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from pipelines.formatting import show_number
from pipelines.prediction import show as show_prediction
from pipelines.prediction.predict import Prediction
from pipelines.registry.evaluation_record import DISTANCES
from pipelines.registry.influences import with_interval
from pipelines.storage.redaction import without_credentials
from pipelines.workflow.stage import MAIN, FinishedStage, PlannedStage, Session
from pipelines.workflow.work import read_prediction

_METRICS_SHOWN = 5  # of a stage, these before others; all are in its manifest and in tracking
_FIRST = ("rows", "images", "samples", "final/step", "final/loss", "final/token_accuracy", "final/images_per_second")


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
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "key", "plan", *(show_prediction.columns(prediction) if prediction is not None else ())):
        table.add_column(column)
    order = [item.node.id for item in planned]
    for item in planned:
        last = max(item.node.inputs.values(), key=order.index, default="")
        key = item.key[:12] if item.key else f"[dim]after {last}[/]"
        parts = f" [dim]({item.parts_done} parts are done)[/]" if item.parts_done else ""
        takes = show_prediction.cells(prediction, item.node.id) if prediction is not None else ()
        table.add_row(item.node.id, key, "[green]reuse[/]" if item.is_reused else f"[yellow]compute[/]{parts}", *takes)
    console.print(table)
    reused = sum(item.is_reused for item in planned)
    console.print(f"\n{reused} of {len(planned)} stages are reused from {store}", highlight=False)
    if prediction is not None:
        show_prediction.show_total(prediction, console)


def show(answer: Mapping[str, Any], console: Console) -> None:
    """The closing summary: one line per stage with its metrics, the scores side by side, and the paths of the results."""
    has_prediction = any(item["predicted_seconds"] and not item["reused"] for item in answer["stages"])
    stages = _table("What was made", "stage", "", *(["predicted"] if has_prediction else []), "key", "measured")
    for item in answer["stages"]:
        if item["stage"].startswith("evaluate"):
            continue  # its numbers are the scores below
        status = "[dim]reused[/]" if item["reused"] else f"{item['made_in_seconds']:.1f} s"
        ordered = sorted(item["metrics"], key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        some = ((name, item["metrics"][name]) for name in ordered[:_METRICS_SHOWN])
        measured = ", ".join(f"{name.removeprefix('final/')} {show_number(value)}" for name, value in some)
        before = None if item["reused"] else item["predicted_seconds"]
        predicted = f"[dim]{before['value']:.1f} s[/]" if before else ""
        stages.add_row(item["stage"], status, *([predicted] if has_prediction else []), item["key"][:12], f"[dim]{measured}[/]")
    console.print()
    console.print(stages)

    if answer["scores"]:
        _show_scores(answer["scores"], console)

    reused = sum(item["reused"] for item in answer["stages"])
    connecting = answer.get("connecting_seconds")
    start = f" ({connecting:.1f} s to connect to Ray)" if connecting else ""
    console.print(f"\n{len(answer['stages'])} stages, {reused} reused, {answer['seconds']:.1f} s in all{start}", highlight=False)
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
        console.print(
            f"tracking  {answer['tracking']['uri']} (run {answer['tracking']['run_id']})", highlight=False, soft_wrap=True
        )


def _show_scores(scored: Mapping[str, Mapping[str, float]], console: Console) -> None:
    scores = _table("What it is worth", "", *scored)
    for name in dict.fromkeys(name for metrics in scored.values() for name in metrics if not _is_detail(name)):
        scores.add_row(name, *(_score(metrics, name) for metrics in scored.values()))
    console.print()
    console.print(scores)
    for name in DISTANCES:
        distance = scored.get(MAIN, {}).get(name)
        for variant, metrics in scored.items():
            if variant != MAIN and "/" not in variant and distance and name in metrics:
                console.print(f"\n{name} of {variant} is {metrics[name] / distance:.1f} times that of {MAIN}", highlight=False)


def _is_detail(name: str) -> bool:
    """Whether a metric belongs to a score that is shown: its error, or one of its replicates."""
    return name.endswith("_se") or re.search(r"_replicate(_\d+|s_sd)$", name) is not None


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
