"""The runs of MLflow that a command starts: one for the run's own model, and one for each variant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from enat.sampler_config import SamplerConfig
from pipelines.run.config import RunConfig
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle
from pipelines.workflow import config as configuration
from pipelines.workflow import model_runs, provenance
from pipelines.workflow.model_runs import ModelRuns
from pipelines.workflow.stage import MAIN, Node

# Where and what to make, and what is recorded elsewhere: no settings of a model.
_NOT_LOGGED = {"name", "workspace", "store", "targets", "cluster", "tracking", "s3", "buckets", "prices", "variants", "report"}
_NOT_LOGGED |= {"search"}
SEARCH_KIND, TRIAL_KIND = "search", "trial"  # values of model_runs.KIND


@contextmanager
def start(config: RunConfig, uri: str, source: str, overrides: Sequence[str], nodes: Sequence[Node]) -> Iterator[ModelRuns]:
    """The run of the run's own model is started at once, that of a variant with its first stage. All end if the work raises.

    source: of the config.   overrides: of its values, which are part of the names.
    """
    overrides = [without_credentials(each) for each in overrides]
    changed = model_runs.of_overrides(overrides)
    name = " · ".join([config.name, *([changed] if changed else [])])
    command = " ".join([source, *overrides])
    tags = _tags(config, source, command)

    def start_variant(variant: str) -> RunHandle:
        own, values = config.variant_runs[variant], configuration.flat(config.variants[variant])
        # MLflow's table shows some 20 letters: what differs among the variants comes first.
        title = " · ".join([config.name, model_runs.words(values) or variant, *([changed] if changed else [])])
        note = f"As {name} except for {_listed(values)}."
        handle = tracking.start_run(
            uri, config.tracking, title, {**tags, "enat.variant": variant, tracking.NOTE: note}, beside=parent
        )
        handle.log_params(_params(own))
        handle.link({f"{model_runs.LINK}{MAIN}": parent})
        return handle

    own_tags = tags | {"enat.variant": MAIN, tracking.NOTE: f"Made by `{command}`."}
    with tracking.ending(tracking.start_run(uri, config.tracking, name, own_tags)) as parent:
        parent.log_params(_params(config))
        models = ModelRuns(parent, start_variant, config.variants, nodes)
        with models.failing():
            yield models


@contextmanager
def start_search(
    config: RunConfig, uri: str, source: str, overrides: Sequence[str], part: str | None, *, beside: RunHandle | None = None
) -> Iterator[RunHandle]:
    """The run above the trials of a search (part "trials"), or above its winners, which then has the name of the config: `enat
    compare NAME` shows the winners only. It ends if the work raises. beside: the first run of the command."""
    overrides = [without_credentials(each) for each in overrides]
    command = " ".join([source, *overrides])
    name = " · ".join([config.name, "search", *([part] if part else [])])
    own = {
        model_runs.KIND: SEARCH_KIND,
        model_runs.NAME: f"{config.name}-{part}" if part else config.name,
        tracking.NOTE: f"Made by `enat search {command}`.",
    }
    with tracking.ending(
        tracking.start_run(uri, config.tracking, name, _tags(config, source, command) | own, beside=beside)
    ) as run:
        run.log_params(_params(config) | {"search": configuration.redacted(config.search)})
        yield run


def start_trial(config: RunConfig, parent: RunHandle, title: str, label: str, sampler: SamplerConfig, *, kind: str) -> RunHandle:
    """The run of one sampler below that of its search. label: the variant in the ids of its nodes.   kind: TRIAL_KIND, or
    model_runs.MODEL_KIND for one that people compare."""
    tags = {model_runs.KIND: kind, "enat.variant": label, "enat.code": provenance.code_version()}
    handle = tracking.start_run(parent.uri, config.tracking, title, tags, parent)
    handle.log_params({"generate": {"sampler": configuration.to_dict(sampler)}})
    return handle


def _tags(config: RunConfig, source: str, command: str) -> dict[str, str]:
    tags = {
        model_runs.KIND: model_runs.MODEL_KIND,
        model_runs.NAME: config.name,
        "enat.config": source,
        "enat.code": provenance.code_version(),
        "enat.store": without_credentials(config.store_uri),
        "enat.command": command,
        "mlflow.source.name": source,
        "mlflow.source.type": "LOCAL",
    }
    commit = provenance.code_commit()
    return tags if commit is None else tags | {"mlflow.source.git.commit": commit}


def _params(config: RunConfig) -> dict[str, Any]:
    """What differs from the defaults."""
    kept = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name not in _NOT_LOGGED}
    usual = RunConfig(name=config.name)
    changed = configuration.changed(dataclasses.replace(usual, **kept), usual)
    return {name: value for name, value in changed.items() if value != {}}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` = {'null' if value is None else without_credentials(str(value))}" for name, value in values.items())
