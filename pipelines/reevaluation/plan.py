"""How a registered model is evaluated now: the stages that run, and the existing artifacts that they read.

Nothing is trained. The model and its tokenizer are artifacts of the store. If a model is evaluated as before, so is what it is
compared with. A CONFIG states how to evaluate. Without one, the model's last evaluation does; for a model that was never
evaluated, the defaults do, with the sampler of its card and the dataset that it was trained on. key=value replaces any value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf

from pipelines.artifacts.manifest import Manifest, name_of, short
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.registry.evaluation_record import EvaluationSummary
from pipelines.run import config as run_config
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.stages import captions, evaluate, generate, token_map, tokenizer, train
from pipelines.tracking.registry import DIGEST_TAG, ModelVersion
from pipelines.workflow import config as configuration
from pipelines.workflow import driver
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.stage import SCRATCH, Node, PlannedStage, PublishContext, Stage

_METRIC_VERSION = "metric_version"
_SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Model:
    """A registered version, its artifact, and the store that has it."""

    version: ModelVersion
    store: ArtifactStore
    manifest: Manifest

    @property
    def tokenizer(self) -> Manifest:
        return input_of(self.store, self.manifest, "tokenizer")

    @property
    def is_text(self) -> bool:
        return ModelSummary.read(self.manifest).model.text_width is not None


@dataclass(frozen=True)
class Request:
    """How to evaluate. config: the run of the CONFIG, or of key=value alone.

    identities: of configs, kept so that each dataset is listed once for all models.
    """

    config: RunConfig
    overrides: Sequence[str]
    has_config: bool
    identities: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Any, overrides: Sequence[str]) -> Request:
        values = [*overrides, "targets=[reference]"]  # nothing is trained, so the config of the model is not checked
        if path is not None:
            config = load_run(path, values)
        else:  # the dataset and all else is recorded with each model
            config = configuration.load_config(RunConfig, None, ["name=reevaluate", *values])
        return cls(
            config=replace(config, targets=(), variants={}, protocols={}), overrides=tuple(overrides), has_config=path is not None
        )

    def names(self, *sections: str) -> bool:
        """Whether key=value sets a value in one of these sections."""
        return any(override.partition("=")[0].split(".")[0] in sections for override in self.overrides)

    def over(self, source: str, values: Mapping[str, Any]) -> RunConfig:
        """The run that recorded values describe, under key=value. Raises ValueError if this version does not know such values."""
        layers = [(source, OmegaConf.create({"name": self.config.name, **values}))]
        layers += [(f"override {override}", OmegaConf.from_dotlist([override])) for override in self.overrides]
        return configuration.merge(RunConfig, layers)


@dataclass(frozen=True)
class Plan:
    """nodes: each after those it reads; the last is the evaluation.   given: existing artifacts by the ids by which nodes read
    them."""

    nodes: tuple[Node, ...]
    given: Mapping[str, Manifest]

    def with_evaluation(self, **changes: Any) -> Plan:
        """The same plan with other fields of the node of the evaluation."""
        return replace(self, nodes=(*self.nodes[:-1], replace(self.nodes[-1], **changes)))


def open_model(version: ModelVersion, config: RunConfig) -> Model:
    """The artifact of a version, from the store of the config, or else from the store that the version names.

    Raises ValueError if neither has it.
    """
    stage, _, key = version.tags["enat.artifact"].partition("/")
    if stage != train.STAGE.name:
        raise ValueError(f"it is registered as {stage}/{key[:12]}, which is not a model")
    places = [place for place in (config.store, version.tags.get("enat.store")) if place]
    for place in dict.fromkeys(places):
        store = open_store(place, config.s3)
        manifest = store.read_manifest(stage, key)
        if manifest is None:
            continue
        if manifest.digest != version.tags.get(DIGEST_TAG, manifest.digest):
            raise ValueError(f"{stage}/{key[:12]} in {store.uri} is not what was registered: its digest differs")
        return Model(version, store, manifest)
    where = " or ".join(places) or "any known store"
    raise ValueError(f"{stage}/{key[:12]} is not in {where}; give its store with store=...")


def input_of(store: ArtifactStore, manifest: Manifest, name: str) -> Manifest:
    """An input of an artifact. Raises ValueError if it has no such input, or the store no longer has it."""
    if name not in manifest.inputs:
        raise ValueError(f"{short(name_of(manifest))} was made without {name}, which is needed here")
    found = store.read_input(manifest, name)
    if found is None:
        source = manifest.inputs[name]
        raise ValueError(f"the store {store.uri} no longer has {source['stage']}/{source['key'][:12]}, its {name}; give a CONFIG")
    return found


def make_plan(model: Model, last: Manifest | None, request: Request) -> Plan:
    """last: the model's last evaluation, if any. Raises ValueError if it is not known how to evaluate."""
    if request.has_config:
        planned = _wire(model, request.config, request, {})
    elif last is None:
        planned = _wire(model, _first_run(model, request), request, {})
    else:
        samples, compared_with = (input_of(model.store, last, name) for name in ("samples", "reference"))
        run = _recorded_run(last, samples, compared_with, request)
        conditions = [stage.name for stage in graph.stages().values() if stage.reevaluation == "conditions"]
        is_as_it_was = not request.names(*conditions) and (run.evaluate.judge is None or "dataset" in last.inputs)
        recorded = {generate.STAGE.name: samples, evaluate.STAGE.name: last} if is_as_it_was else {}
        planned = _wire(model, run, request, recorded)
    return _with_metric_version(planned, model.store)


def _recorded_run(last: Manifest, samples: Manifest, compared_with: Manifest, request: Request) -> RunConfig:
    """The run of a recorded evaluation. It has the dataset once, so one key=value replaces it everywhere."""
    recorded = {"generate": samples.config, "evaluate": last.config, "reference": compared_with.config}
    sections = run_config.with_new_names(recorded)
    shared = sections["reference"].get("dataset")
    for section in sections.values():
        section["dataset"] = None if section.get("dataset") == shared else section["dataset"]
    return request.over("the last evaluation", {**sections, **({} if shared is None else {"dataset": shared})})


def _first_run(model: Model, request: Request) -> RunConfig:
    values: dict[str, Any] = {"generate": {"sampler": dict(model.manifest.config["sampler"])}}
    if "token_map" in model.manifest.inputs:
        token_map = input_of(model.store, model.manifest, "token_map")
        values["dataset"] = dict(input_of(model.store, token_map, "dataset").config)
    elif not request.names("dataset") and not request.config.reference.npz:
        raise ValueError(
            "it was never evaluated, and the dataset that it was trained on is not known here; give a CONFIG, or dataset.kind=..."
        )
    return request.over("the model's card", values)


def _wire(model: Model, run: RunConfig, request: Request, recorded: Mapping[str, Manifest]) -> Plan:
    """The measured stages of a run, each with what it reads; the last node is the evaluation.

    What is part of the model is taken from the store. recorded: artifacts of an earlier evaluation by stage; what they read is
    read again, except for what is measured.
    """
    all_stages, kept = graph.stages(), {train.STAGE.name: model.manifest, tokenizer.STAGE.name: model.tokenizer}

    def existing(stage: Stage, name: str) -> Manifest | None:
        sources = stage.reads[name].stages
        if sources[0] in kept:
            return kept[sources[0]]
        if any(all_stages[source].reevaluation == "measured" for source in sources):
            return None
        for earlier in (recorded.get(stage.name), *recorded.values()):
            if earlier is not None and name in earlier.inputs:
                return input_of(model.store, earlier, name)
        is_of_model = sources[0] == token_map.STAGE.name or (sources[0] == captions.STAGE.name and run.captions.encoder is None)
        return input_of(model.store, model.manifest, name) if recorded or is_of_model else None

    own_model = replace(run.train, model=replace(run.train.model, text=model.is_text))
    size = TokenizerSummary.read(model.tokenizer).config.resolution
    compared_with = replace(run.reference, resolution=run.reference.resolution or size)
    wired = graph.Wiring(existing, request.identities)
    for part in graph.GRAPH:
        if part.stage.reevaluation == "measured":
            wired.add(part, replace(run, train=own_model, reference=compared_with, evaluate=replace(run.evaluate, images=None)))
    # Sampling comes when all else of the evaluation is there, so that it has the cluster for itself.
    sampled = driver.with_dependents(wired.nodes.values(), generate.STAGE.name)
    ordered = sorted(wired.nodes.values(), key=lambda node: (node.stage is evaluate.STAGE, node.id in sampled))
    return Plan(tuple(ordered), wired.given)


def _with_metric_version(planned: Plan, store: ArtifactStore) -> Plan:
    """An evaluation is not reused if the definition of its scores has changed since. The key of the stage does not contain it."""
    looked_up = driver.plan(planned.nodes, store, planned.given)
    found = {item.node.id: item.manifest for item in looked_up} | dict(planned.given)
    evaluation, node = found["evaluate"], planned.nodes[-1]
    if evaluation is None:
        return planned
    version = evaluation_protocol.metric_version(node.config.settings)
    if str(EvaluationSummary.read(evaluation).protocol.get("metric_version")) == version:  # was a number once
        return planned
    return planned.with_evaluation(identity={**configuration.identity(node.config), _METRIC_VERSION: version})


# What changed --------------------------------------------------------------------------------------------------------------


def changes(last: Manifest, store: ArtifactStore, planned: Sequence[PlannedStage], given: Mapping[str, Manifest]) -> str:
    """Why an evaluation by this plan differs from the last one, in a few words."""
    found = {item.node.id: item for item in planned}
    before = {"evaluate": last}
    if (samples := store.read_input(last, "samples")) is not None:
        before["generate"] = samples
    reasons = []
    for id, manifest in before.items():
        node = found[id].node
        if node.stage.version != manifest.stage_version:
            reasons.append(f"stage {id} is version {node.stage.version}, was {manifest.stage_version}")
        reasons += _changed(id, run_config.with_new_names({id: manifest.config})[id], configuration.redacted(node.config))
    was = last.inputs["reference"]["digest"]
    now = given["reference"] if "reference" in given else found["reference"].manifest
    if now is None or now.digest != was:
        reasons.append("another reference")
    if _METRIC_VERSION in (found["evaluate"].node.identity or {}):
        reasons.append("another metric version")
    more = [f"and {len(reasons) - _SHOWN_CHANGES} more"] if len(reasons) > _SHOWN_CHANGES else []
    return "; ".join([*reasons[:_SHOWN_CHANGES], *more]) or "other inputs"


def _changed(prefix: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        names = [name for name in now if name not in ("execution", "dataset", "images")]
        return [text for name in names for text in _changed(f"{prefix}.{name}", was.get(name), now[name])]
    return [] if was == now else [f"{prefix} is {now}, was {was}"]


def is_comparable(last: Manifest, now: Manifest, store: ArtifactStore) -> bool:
    """Whether two evaluations of a model are comparable: by the same protocol, of samples with the same config."""
    if EvaluationSummary.read(last).protocol_digest != EvaluationSummary.read(now).protocol_digest:
        return False
    before, after = store.read_input(last, "samples"), store.read_input(now, "samples")
    if before is None or after is None:
        return False
    asked = [_asked(samples) for samples in (before, after)]
    return asked[0] is not None and asked[0] == asked[1]


def _asked(samples: Manifest) -> Any:
    """What determines samples beside model and code. Defaults fill in what older configs lack; None if they cannot be read."""
    named = run_config.with_new_names({"generate": samples.config})
    try:
        config = configuration.merge(generate.GenerateConfig, [("samples", OmegaConf.create(named["generate"]))])
    except configuration.ConfigError:
        return None
    given = {name: source["digest"] for name, source in samples.inputs.items() if name != "model"}
    return configuration.identity(replace(config, shard_size=1)), given


# Running -------------------------------------------------------------------------------------------------------------------


def recomputed(planned: Plan, token: str) -> Plan:
    """The same plan with the measured stages computed again, as stages of other names. Existing artifacts are not touched.

    token: a later call with the same token resumes the work of an earlier one. Only the caller publishes the result.
    """

    def scratch(node: Node) -> Node:
        if node.stage.reevaluation != "measured":
            return node
        own = configuration.identity(node.config) if node.identity is None else node.identity
        stage = replace(node.stage, name=f"{SCRATCH}{node.stage.name}", publish=None)
        return replace(node, stage=stage, identity={**own, "token": token})

    return replace(planned, nodes=tuple(map(scratch, planned.nodes)))


def publishing(planned: Plan, also: Callable[[Manifest, PublishContext], None]) -> Plan:
    """The same plan, with `also` called for the evaluation and its tracking run."""
    stage = planned.nodes[-1].stage
    usual = stage.publish

    def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
        if usual is not None:
            usual(manifest, inputs, replace(context, titles={}))  # names that were recorded may have been corrected since
        also(manifest, context)

    return planned.with_evaluation(stage=replace(stage, publish=publish))
