"""Read evaluations from MLflow as rows to compare: one row per set of samples and protocol, one section per protocol.

A protocol states how a number was measured (extractor, reference, number of samples, ...). A section never mixes protocols.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.comparison.curves import Curve, read_curves
from pipelines.comparison.sections import REAL_CODES, Row, Section, make_sections
from pipelines.formatting import printable
from pipelines.registry.influences import INFLUENCES, Influences
from pipelines.storage.base import digest_of
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import registry, search
from pipelines.tracking.search import TrackedRun
from pipelines.workflow.model_runs import KIND, LINK, MODEL_KIND, NAME
from pipelines.workflow.stage import MAIN

_EVALUATIONS = "tags.`enat.stage` = 'evaluate'"
_FINISHED = "attributes.status = 'FINISHED'"
_COUNTS = ("resolution", "parameters", "train_steps", "num_steps", "num_samples", "images_per_pass")  # tags
_MAX_DEPTH = 8  # of nested runs; also ends a cycle of parents
_IDS_PER_QUERY = 100
_IMPORTED = "imported"  # instead of a dataset: weights with unknown training
_NAMES_SHOWN = 8  # in a message
_RUNS_COUNTED = 1000  # for a message
_MAX_INFLUENCES = 64 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Query:
    """experiments: names.   filter: a filter string of MLflow for the runs of stage evaluate.

    runs: names of config runs, or ids of pipeline runs or of runs of stage evaluate. Empty means all.
    """

    experiments: tuple[str, ...] = ("enat",)
    filter: str | None = None
    runs: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"experiment{'s' if len(self.experiments) > 1 else ''} {', '.join(map(repr, self.experiments))}"]
        parts += [f"filter {self.filter!r}"] if self.filter else []
        parts += [f"runs {', '.join(map(repr, self.runs))}"] if self.runs else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """experiment: of the newest evaluation.   sections: at least one, each with at least one row.

    curves: of scores while training.   notes: sentences about missing or doubtful values.
    """

    uri: str
    query: Query
    experiment: str
    sections: tuple[Section, ...]
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        return [row for section in self.sections for row in section.rows]

    @property
    def quoted(self) -> dict[str, list[Section]]:
        """Sections that share published numbers, by the name of the last of them, which shows the numbers."""
        beside: dict[str, list[Section]] = {}
        for section in self.sections:
            if section.published_dataset is not None:
                beside.setdefault(section.published_dataset, []).append(section)
        return {sections[-1].name: sections for sections in beside.values()}


def compare(uri: str, query: Query, published: str = "auto") -> Comparison:
    """Read, fold and group. published: "none", "auto" (by dataset and resolution) or one of published.DATASETS.

    Raises ValueError, with what was searched and what exists, if nothing is found, and the errors of search.experiments.
    """
    known = search.experiments(uri)
    found, parents = _find(uri, query, known)
    notes: list[str] = []
    rows = _fold([_row(run, parents, notes) for run in found])
    rows = _with_influences(uri, _with_generation(uri, rows, found, notes), notes)
    sections = make_sections(rows, published, notes)
    experiment = next(name for name, id in known.items() if id == found[0].experiment_id)
    curves = read_curves(uri, [row for section in sections for row in section.rows], found, notes)
    return Comparison(
        uri=uri, query=query, experiment=experiment, sections=sections, curves=curves, notes=tuple(dict.fromkeys(notes))
    )


# Finding -------------------------------------------------------------------------------------------------------------------


def _find(uri: str, query: Query, known: Mapping[str, str]) -> tuple[list[TrackedRun], dict[str, TrackedRun]]:
    """Finished evaluations, newest first, and their ancestors by id. known: name -> id of experiments."""
    given = {id: run for id in query.runs if _is_id(id) and (run := search.read_run(uri, id)) is not None}
    if unknown := [id for id in query.runs if _is_id(id) and id not in given]:
        raise ValueError(f"run {', '.join(unknown)} does not exist at {without_credentials(uri)}, or was deleted")
    ids: set[str] = set()
    if not query.runs or len(given) < len(set(query.runs)):  # an id identifies the experiment as well
        for name in query.experiments:
            if name not in known:
                raise ValueError(
                    f"experiment {name!r} does not exist at {without_credentials(uri)}; experiments there: {_listed(known)}"
                )
            ids.add(known[name])
    ids |= {run.experiment_id for run in given.values()}
    filters = [_EVALUATIONS, _FINISHED, *([query.filter] if query.filter else [])]
    evaluations = search.search_runs(uri, sorted(ids), " and ".join(filters))
    evaluations += _linked(uri, sorted(ids), evaluations)
    evaluations.sort(key=lambda run: run.started, reverse=True)
    parents = _ancestors(uri, evaluations)
    selected, met = [], set()
    for run in evaluations:
        line = (run, *_line(run, parents))
        names = {name for each in line for name in (each.run_id, each.name, each.tags.get(NAME, each.name))}
        if not query.runs or names & set(query.runs):
            selected.append(run)
            met |= names
    if not selected or set(query.runs) - met:
        raise ValueError(_nothing_found(uri, query, sorted(ids), sorted(set(query.runs) - met), known))
    return selected, parents


def _linked(uri: str, ids: Sequence[str], evaluations: Sequence[TrackedRun]) -> list[TrackedRun]:
    """Evaluations that runs of models reused, as if each had its own below it: with the variant, time and money of that run."""
    by_id = {run.run_id: run for run in evaluations}
    if not by_id:
        return []
    found = []
    for model in search.search_runs(uri, ids, f"tags.`{KIND}` = '{MODEL_KIND}' and {_FINISHED}"):
        linked = {tag.removeprefix(LINK): id for tag, id in model.tags.items() if tag.startswith(f"{LINK}evaluate") and id in by_id}
        for node, id in linked.items():
            variant = model.tags.get("enat.variant", MAIN)
            own = {"enat.node": f"{node}@{variant}", "enat.variant": variant, "mlflow.parentRunId": model.run_id}
            if "enat.currency" in model.tags:
                own["enat.currency"] = model.tags["enat.currency"]
            costs = {name: value for name, value in model.metrics.items() if name.startswith("cost/total_")}
            run = by_id[id]
            found.append(replace(run, tags={**run.tags, **own}, metrics={**run.metrics, **costs}, started=model.started))
    return found


def _is_id(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")


def _ancestors(uri: str, runs: Iterable[TrackedRun]) -> dict[str, TrackedRun]:
    """All runs that contain these runs, by id."""
    by_id: dict[str, TrackedRun] = {}
    level = list(runs)
    for _ in range(_MAX_DEPTH):
        experiments = sorted({run.experiment_id for run in level})
        wanted = sorted({run.parent_id for run in level if run.parent_id and run.parent_id not in by_id and _is_id(run.parent_id)})
        level = []
        for first in range(0, len(wanted), _IDS_PER_QUERY):
            ids = ", ".join(f"'{id}'" for id in wanted[first : first + _IDS_PER_QUERY])
            level += search.search_runs(uri, experiments, f"attributes.run_id IN ({ids})")
        by_id |= {run.run_id: run for run in level}
    return by_id


def _line(run: TrackedRun, parents: Mapping[str, TrackedRun]) -> list[TrackedRun]:
    """The parent of a run, the parent of that, and so on."""
    line: list[TrackedRun] = []
    while (parent := parents.get(run.parent_id or "")) is not None and len(line) < _MAX_DEPTH:
        run = parent
        line.append(run)
    return line


def _nothing_found(uri: str, query: Query, ids: Sequence[str], unmet: Sequence[str], known: Mapping[str, str]) -> str:
    """A message with what was searched and what exists."""
    everything = search.search_runs(uri, ids, limit=_RUNS_COUNTED)
    evaluations = [run for run in everything if run.tags.get("enat.stage") == "evaluate"]
    finished = sum(run.status == "FINISHED" for run in evaluations)
    tops = dict.fromkeys(run.name for run in everything if run.parent_id is None)
    of_runs = f" of {', '.join(map(repr, unmet))}" if unmet and len(query.runs) > len(unmet) else ""
    count = "" if len(everything) < _RUNS_COUNTED else f"at least {_RUNS_COUNTED:,} runs; the newest are "
    count += f"{len(everything):,} runs, {len(evaluations)} of them evaluations ({finished} finished)"
    exists = count if everything else "no runs"
    exists += f", of {_listed(tops)}" if tops else ""
    return (
        f"no finished evaluation{of_runs} was found at {without_credentials(uri)} in {query}. "
        f"There are {exists}. Experiments: {_listed(known)}"
    )


def _listed(names: Iterable[str]) -> str:
    names = [printable(name) for name in names]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (", ".join(names[:_NAMES_SHOWN]) or "none") + more


# Rows ----------------------------------------------------------------------------------------------------------------------


def _row(run: TrackedRun, parents: Mapping[str, TrackedRun], notes: list[str]) -> Row:
    tags = run.tags
    line = _line(run, parents)
    variant = tags.get("enat.variant") or tags.get("enat.node", "").partition("@")[2] or MAIN
    trained = tags.get("enat.input.model")
    protocol, mask_ratio = _without_mask_ratio(_protocol(run, notes))
    is_imported = tags.get("enat.dataset") == _IMPORTED
    counts = {name: _number(run, f"enat.{name}", notes) for name in _COUNTS}
    integers: dict[str, Any] = {name: None if value is None else int(value) for name, value in counts.items()}
    if is_imported:
        integers["train_steps"] = None
    return Row(
        **integers,
        run_ids=(run.run_id,),
        config_run=printable(line[-1].tags.get(NAME, line[-1].name)) if line else None,
        model=printable(tags.get("enat.model") or (trained or run.name)[:18]),
        variant=printable(variant),
        dataset=None if is_imported else _text(tags.get("enat.dataset")),
        reference=_text(tags.get("enat.reference")),
        guidance_scale=_number(run, "enat.guidance_scale", notes),
        samples=_text(tags.get("enat.samples") or tags.get("enat.input.samples")),
        trained=trained,
        evaluation=tags.get(registry.DIGEST_TAG),
        protocol_digest=digest_of(protocol)[:12] if protocol else _text(tags.get("enat.protocol_digest")),
        protocol=protocol,
        measured=run.started,
        metrics={name: value for name, value in run.metrics.items() if math.isfinite(value)},
        device=_text(tags.get("enat.device")),
        mask_ratio=_parsed(mask_ratio, f"The mask ratio in enat.protocol of run {run.run_id}", notes),
        precision=_text(tags.get("enat.precision")),
        currency=_text(tags.get("enat.currency")),
    )


def _text(value: str | None) -> str | None:
    return printable(value) if value else None


def _number(run: TrackedRun, tag: str, notes: list[str]) -> float | None:
    """Value of a tag. None if it is missing or, with a note, not a number: tags can be edited by hand."""
    return _parsed(run.tags.get(tag), f"The tag {tag} of run {run.run_id}", notes)


def _parsed(text: str | None, what: str, notes: list[str]) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    notes.append(f"{what} is {printable(text)[:40]!r}, which is not a number. It is shown as missing.")
    return None


def _protocol(run: TrackedRun, notes: list[str]) -> dict[str, Any]:
    text = run.tags.get("enat.protocol")
    if not text:
        notes.append("The protocol of some runs is unknown. Their numbers may not be comparable, not even with each other.")
        return {}
    try:
        protocol = json.loads(text)
    except ValueError:
        protocol = None
    if isinstance(protocol, dict):
        return {printable(str(name)): printable(v) if isinstance(v, str) else v for name, v in protocol.items()}
    notes.append(f"The tag enat.protocol of run {run.run_id} cannot be read. Its protocol counts as unknown.")
    return {}


def _without_mask_ratio(protocol: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The mask ratio has its own column, so rows of one section may differ in it."""
    labels, _, ratio = str(protocol.get("labels")).rpartition(", mask ratio ")
    return ({**protocol, "labels": labels}, ratio) if labels == REAL_CODES else (protocol, None)


def _fold(rows: Sequence[Row]) -> list[Row]:
    """One row per samples and protocol. rows: newest first. Older runs of the same samples logged the same numbers."""
    folded: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.samples, row.protocol_digest) if row.samples else (row.run_ids,)
        folded.setdefault(key, []).append(row)
    return [_folded(same) for same in folded.values()]


def _folded(same: Sequence[Row]) -> Row:
    newest = same[0]
    first = min(row.measured for row in same if row is newest or (row.evaluation and row.evaluation == newest.evaluation))
    ids = dict.fromkeys(id for row in same for id in row.run_ids)
    return replace(newest, run_ids=tuple(ids), measured=first)


def _with_generation(uri: str, rows: Sequence[Row], runs: Sequence[TrackedRun], notes: list[str]) -> list[Row]:
    """Add the parameters of stage generate, which show how samplers differ otherwise.

    One query reads all runs of the stage: a query per set of samples is far slower, and MLflow cannot filter a tag by a list of
    values. One run per set is enough because its parameters are part of the key.
    """
    wanted = {row.samples for row in rows if (row.samples or "").startswith("generate/")}
    found: dict[str | None, dict[str, str]] = {}
    if wanted:
        experiments = sorted({run.experiment_id for run in runs})
        for run in search.search_runs(uri, experiments, "tags.`enat.stage` = 'generate'"):
            samples = f"generate/{run.tags.get('enat.key')}"
            if samples in wanted and samples not in found:
                given = {name: value for name, value in run.params.items() if value != "None"}  # of earlier versions
                found[samples] = {name: value for name, value in given.items() if not name.startswith("execution.")}
    completed = []
    for row in rows:
        generated = found.get(row.samples)
        values: dict[str, Any] = {}
        for name in ("mask_ratio", "ema_length"):  # parameters are text: "None" for samples without it
            if (text := (generated or {}).get(name, "None")) != "None":
                values[name] = _parsed(text, f"The parameter {name} of {row.samples}", notes)
        completed.append(replace(row, generated=generated, **values))
    return completed


def _with_influences(uri: str, rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """Add what errors of differences need. A file that cannot be read is left out: anyone may write to MLflow."""
    completed = []
    for row in rows:
        influences = None
        if any(name.endswith("_se") for name in row.metrics):
            try:
                content = search.read_file(uri, row.run_ids[0], INFLUENCES, _MAX_INFLUENCES)
                influences = None if content is None else Influences.parse(content)
            except (ValueError, search.TrackingError) as error:
                notes.append(f"{INFLUENCES} of run {row.run_ids[0]} is left out: {printable(str(error))}.")
        completed.append(replace(row, influences=influences))
    return completed
