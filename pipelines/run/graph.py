"""The stages of the pipeline, each with its config for a run, and how they are wired. This is the only list of the stages.

dataset, tokenizer -> token_map -> train -> generate -> evaluate -> report, and reference -> evaluate; on request token_map,
reference -> reconstruction and token_map -> audit, generate -> memorization. A variant is the same pipeline with some values
replaced. What it shares with the run's own model is the same artifact, made once. Images of other generators are scored by the
same stages: images, reference -> evaluate.

To add a stage, write one file in pipelines/stages and add a line to GRAPH. If a run should be able to configure it, add a field of
its name to RunConfig, too.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from pipelines.artifacts.manifest import Manifest
from pipelines.data.image_sets import ImageSetConfig
from pipelines.run.config import RunConfig
from pipelines.stages import (
    audit,
    captions,
    dataset,
    evaluate,
    generate,
    image_set,
    memorization,
    reconstruction,
    reference,
    report,
    token_map,
    tokenizer,
    train,
)
from pipelines.storage.base import digest_of
from pipelines.workflow import config as configuration
from pipelines.workflow.config import ConfigError
from pipelines.workflow.stage import SCRATCH, Node, Stage


def section(stage: Stage, run: RunConfig) -> Any:
    """A stage's config: the run's section of its name, or its defaults, with the run's dataset, seed, sampler and s3.

    None if the run leaves the section out.
    """
    own = getattr(run, stage.name) if hasattr(run, stage.name) else stage.config() if stage.config else None
    if own is None:
        return None
    filled = replace(own, **{name: getattr(run, name) for name in ("dataset", "seed") if getattr(own, name, ...) is None})
    if (read := getattr(filled, "dataset", None)) is not None and read.s3 is None:
        filled = replace(filled, dataset=replace(read, s3=run.s3_of(*(getattr(read, name) for name in dataset.STAGE.external))))
    files = [getattr(filled, name) for name in stage.external]
    rest = {"s3": run.s3_of(*files), "sampler": run.generate.sampler}
    return replace(filled, **{name: value for name, value in rest.items() if getattr(filled, name, ...) is None})


@dataclass(frozen=True)
class Part:
    """A stage of the graph.

    custom: the stage's config for a run, and for the config of the stage that reads it (None for a stage of the run itself), if it
    is not just the run's section of that name. It returns None if the stage is not part of the run.
    is_per_protocol: there is one for each protocol of the run, too.
    """

    stage: Stage
    custom: Callable[[RunConfig, Any], Any] | None = None
    is_per_protocol: bool = False

    def config(self, run: RunConfig, reader: Any = None) -> Any:
        return section(self.stage, run) if self.custom is None else self.custom(run, reader)


def _dataset(run: RunConfig, reader: Any) -> Any:
    return section(token_map.STAGE, run).dataset if reader is None else reader.dataset


def _captions(run: RunConfig, reader: Any) -> Any:
    """Samples are asked for by captions of their own dataset, which may be another than that of the token map."""
    if run.captions.encoder is None:
        return None
    config = section(captions.STAGE, run)
    is_of_samples = isinstance(reader, generate.GenerateConfig | evaluate.EvaluateConfig | report.ReportConfig)
    return replace(config, dataset=section(generate.STAGE, run).dataset) if is_of_samples else config


def _reference(run: RunConfig, reader: Any) -> Any:
    config = section(reference.STAGE, run)
    return config if config.resolution is not None else replace(config, resolution=run.tokenizer.architecture().resolution)


def _reconstruction(run: RunConfig, reader: Any) -> Any:
    config = run.reconstruction
    return None if config is None else replace(config, dataset=section(token_map.STAGE, run).dataset)


def _audit(run: RunConfig, reader: Any) -> Any:
    """Stage memorization needs one, also if the run asks for none."""
    is_needed = run.audit is None and run.memorization is not None
    return section(audit.STAGE, replace(run, audit=audit.AuditConfig()) if is_needed else run)


def _report(run: RunConfig, reader: Any) -> Any:
    data = section(token_map.STAGE, run).dataset
    return replace(run.report, name=run.name, dataset_name=None if data is None else data.title, variants=tuple(run.variants))


GRAPH: tuple[Part, ...] = (
    Part(tokenizer.STAGE),  # before the dataset, unless it is trained on it: weights that cannot be used are refused at once
    Part(dataset.STAGE, _dataset),
    Part(token_map.STAGE),
    Part(captions.STAGE, _captions),
    Part(reference.STAGE, _reference, is_per_protocol=True),
    Part(reconstruction.STAGE, _reconstruction),
    Part(audit.STAGE, _audit),
    Part(train.STAGE),
    Part(generate.STAGE),
    Part(memorization.STAGE),
    Part(image_set.STAGE, lambda run, reader: run.evaluate.images),
    Part(evaluate.STAGE, is_per_protocol=True),
    Part(report.STAGE, _report),
)


_NO_DATASET = (
    "this run reads a dataset, and its config names none; set dataset.kind and dataset.path, or let `enat init FOLDER` write a "
    "config for a folder of images"
)


# Wiring --------------------------------------------------------------------------------------------------------------------


class Wiring:
    """Nodes of the graph, each after those it reads.

    existing: the artifact that a stage reads under a name, if it is not to be made: `(stage, name) -> manifest`. `given` collects
    those that are read, by the ids by which nodes read them.   identities: of configs, kept by the caller to be computed once.
    """

    def __init__(
        self,
        existing: Callable[[Stage, str], Manifest | None] = lambda stage, name: None,
        identities: dict[Any, Any] | None = None,
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.given: dict[str, Manifest] = {}
        self._existing = existing
        self._own_identities = {} if identities is None else identities
        self._identities: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        # By what was asked for, with the run, so that no other one gets its id(): many stages read the same ones.
        self._added: dict[tuple[str, int, str, Any], tuple[RunConfig, str | None]] = {}

    def add(self, part: Part, run: RunConfig, label: str = "", reader: Any = None) -> str | None:
        """The id of a stage's node for a run. What the stage reads is added before it. None if the run does not have the stage.

        label: of the id after the stage's name: "/protocol", "@variant" or "/protocol@variant".
        """
        asked = (part.stage.name, id(run), label, reader)
        if asked not in self._added:
            self._added[asked] = run, self._add(part, run, label, reader)
        return self._added[asked][1]

    def _add(self, part: Part, run: RunConfig, label: str, reader: Any) -> str | None:
        config = part.config(run, reader)
        if config is None and part.stage is dataset.STAGE:
            raise ConfigError(_NO_DATASET)
        if config is None:
            return None
        if not isinstance(self._own_identities, Unread):
            config = pinned(config)
        inputs: dict[str, str] = {}
        for name, read in part.stage.reads.items():
            runs = {"": run} | ({f"@{variant}": each for variant, each in run.variant_runs.items()} if read.is_per_variant else {})
            if read.is_per_protocol:
                runs = {of: each for variant, one in runs.items() for of, each in _by_protocol(one, variant).items()}
            for suffix, each in runs.items():
                id = self._input(part.stage, name, each, suffix or label, config)
                inputs |= {} if id is None else {name + suffix: id}
        return self._node(part.stage, label, config, inputs)

    def _input(self, stage: Stage, name: str, run: RunConfig, label: str, config: Any) -> str | None:
        read = stage.reads[name]
        if not read.is_needed(config, run):
            return None
        if (manifest := self._existing(stage, name)) is not None:
            self.given[name], self._identities[name] = manifest, manifest.digest
            return name
        ids = (self.add(part, run, label, config) for part in map(_part, read.stages))
        return next((id for id in ids if id is not None), None)

    def _node(self, stage: Stage, label: str, config: Any, inputs: Mapping[str, str]) -> str:
        """A node that would make the same as an earlier one is that one. A second one of a stage gets a number."""
        if (stage.name, config) not in self._own_identities:
            self._own_identities[stage.name, config] = configuration.identity(config)
        own = self._own_identities[stage.name, config]
        read = {name: self._identities[id] for name, id in inputs.items() if stage.is_in_key(name)}
        identity = digest_of({"stage": stage.name, "config": own, "inputs": read})
        if identity not in self._ids:
            base = stage.name + label
            numbered = chain([base], (f"{base}-{number}" for number in count(2)))
            id = next(id for id in numbered if id not in self.nodes and id not in self.given)
            self.nodes[id], self._identities[id] = Node(id, stage, config, dict(inputs), own), identity
            self._ids[identity] = id
        return self._ids[identity]


def pinned(config: Any) -> Any:
    """A stage's config whose datasets and images on the Hugging Face hub are read at the commits that they have now."""
    if hasattr(config, "pinned"):
        return config.pinned()
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = {name: value.pinned() for name, value in own.items() if hasattr(value, "pinned")}
    return replace(config, **own) if own else config


class Unread(dict[Any, Any]):
    """Identities of configs whose files are not read: what a run would take can be asked before its data exists."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: tuple[str, Any]) -> Any:
        self[key] = configuration.to_dict(key[1])
        return self[key]


def _by_protocol(run: RunConfig, label: str = "") -> dict[str, RunConfig]:
    """A run and those of its protocols, by the labels of their nodes. label: of the run's own."""
    return {label: run} | {f"/{name}{label}": each for name, each in run.protocol_runs.items()}


def build(run: RunConfig, identities: dict[Any, Any] | None = None) -> list[Node]:
    """The nodes of a run and its variants, each after those it reads. Raises ConfigError for targets that it does not have, and
    for a missing dataset that one of the nodes reads.

    identities: see Wiring; Unread() reads neither datasets nor weights.
    """
    runs = (run, *run.variant_runs.values())
    is_known = {
        part.stage.name: part.stage is dataset.STAGE or any(part.config(each) is not None for each in runs) for part in GRAPH
    }
    check_targets(run.targets, [name for name in is_known if is_known[name]])
    return _nodes(run, Wiring(identities=identities))


def _nodes(run: RunConfig, wiring: Wiring) -> list[Node]:
    variants = {"": run, **{f"@{name}": each for name, each in run.variant_runs.items()}}
    for label, variant in variants.items():
        for part in GRAPH:
            if run.targets and part.stage.name not in run.targets:
                continue  # what a target reads is added with it; files of other stages are not looked at
            is_of_all_variants = any(read.is_per_variant for read in part.stage.reads.values())
            if not label or not is_of_all_variants:
                for own, each in (_by_protocol(variant, label) if part.is_per_protocol else {label: variant}).items():
                    wiring.add(part, each, own)
    return [*wiring.nodes.values()]


def nodes_of_variant(run: RunConfig, variant: str, nodes: Sequence[Node]) -> list[str]:
    """The ids of the nodes of a run that make what one of its variants asks for, apart from the report of all.

    nodes: of the run, from build(), whose datasets are not listed again.
    """
    identities = {(node.stage.name, node.config): node.identity for node in nodes}
    wiring = Wiring(identities=identities)
    _nodes(run, wiring)  # the same ids
    first = len(wiring.nodes)
    own = [id for part in GRAPH if not run.targets or part.stage.name in run.targets for id in _ids_of(wiring, part, run, variant)]
    assert len(wiring.nodes) == first, "a variant has no other nodes than its run"
    needed, waiting = dict.fromkeys(own), list(own)
    while waiting:
        found = [id for id in wiring.nodes[waiting.pop()].inputs.values() if id not in needed]
        needed |= dict.fromkeys(found)
        waiting += found
    return [id for id in wiring.nodes if id in needed]


def _ids_of(wiring: Wiring, part: Part, run: RunConfig, variant: str) -> list[str]:
    if any(read.is_per_variant for read in part.stage.reads.values()):
        return []
    own = run.variant_runs[variant]
    runs = _by_protocol(own, f"@{variant}") if part.is_per_protocol else {f"@{variant}": own}
    return [id for label, each in runs.items() if (id := wiring.add(part, each, label)) is not None]


def needed_stages(run: RunConfig) -> set[str]:
    """Names of the stages that the targets of a run need, without its variants. Reads no files. Raises ConfigError for a missing
    dataset."""
    return {node.stage.name for node in _nodes(replace(run, variants={}, protocols={}), Wiring(identities=Unread()))}


def build_evaluation(run: RunConfig, images: ImageSetConfig, resolution: int | None = None) -> list[Node]:
    """The nodes that score images of another generator as a run scores its own samples.

    resolution: of the reference, if its config gives none; None takes that of the run's own samples.
    """
    source = replace(images, s3=images.s3 or run.s3_of(images.path))
    wiring = Wiring()
    for label, each in _by_protocol(run).items():
        # Judge and CLIP score need to know what was asked for.
        scored = replace(each.evaluate, images=source, judge=None, clip_score=None)
        compared_with = replace(each.reference, resolution=each.reference.resolution or resolution)
        wiring.add(_part(evaluate.STAGE.name), replace(each, evaluate=scored, reference=compared_with), label)
    return [*wiring.nodes.values()]


def build_samples(runs: Mapping[str, RunConfig], made: Mapping[str, Manifest]) -> tuple[list[Node], dict[str, Manifest]]:
    """The nodes that make and score samples of one model in several ways, and the artifacts that they read.

    runs: by the variants of the ids, such as evaluate@NAME.   made: what exists already, by the names by which stages read it.
    """
    wiring = Wiring(lambda stage, name: made.get(name))
    for name, run in runs.items():
        wiring.add(_part(evaluate.STAGE.name), run, f"@{name}")
    return [*wiring.nodes.values()], wiring.given


# What is known of the stages -----------------------------------------------------------------------------------------------


def stages() -> dict[str, Stage]:
    """All stages by name, in the order of the graph."""
    return {part.stage.name: part.stage for part in GRAPH}


def _part(name: str) -> Part:
    return next(part for part in GRAPH if part.stage.name == name)


def needed_by(targets: Iterable[str]) -> set[str]:
    """The stages that are needed to make some, with these. Stages that only some configs need are included."""
    known, needed, waiting = stages(), set[str](), list(targets)
    while waiting:
        if (name := waiting.pop()) not in needed:
            needed.add(name)
            reads = known[name].reads.values() if name in known else ()
            waiting += [each for read in reads if read.is_in_key for each in read.stages]
    return needed


def check_targets(targets: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a target that is not one of the stages of the run."""
    for target in targets:
        if target not in known:
            raise ConfigError(f"targets names {target!r}; the stages of this run are {', '.join(known)}")


def check_stages(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is not the name of a stage: a list of its artifacts would be empty and mislead."""
    known = stages()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"stages are {', '.join(known)}"
            raise ValueError(f"unknown stage {name}; {hint}")


def external_files(run: RunConfig) -> dict[str, str]:
    """Key -> file or folder outside the store that a run names, such as tokenizer.weights and generate.dataset.path."""
    found = {f"dataset.{name}": getattr(run.dataset, name, None) for name in dataset.STAGE.external}
    for part in GRAPH:
        stage, config = part.stage, part.config(run)
        if stage is not dataset.STAGE and config is not None:
            found |= {f"{stage.name}.{name}": getattr(config, name) for name in stage.external}
            own = getattr(getattr(run, stage.name, None), "dataset", None)
            found |= {f"{stage.name}.dataset.{name}": getattr(own, name) for name in dataset.STAGE.external if own is not None}
    return {key: place for key, place in found.items() if place is not None}


def describe(manifest: Manifest) -> str:
    """An artifact in a few words; "" if its stage is not known or it was made by another version of it."""
    stage = stages().get(manifest.stage.removeprefix(SCRATCH))
    try:
        return "" if stage is None else stage.describe(manifest)
    except (ValueError, TypeError, AttributeError):  # anyone who may write to the store may have written the manifest
        return ""


def dataset_name(manifest: Manifest) -> str | None:
    """The dataset that an artifact was made from, if its own manifest names it."""
    stage = stages().get(manifest.stage.removeprefix(SCRATCH))
    try:
        return None if stage is None else stage.summary.read(manifest).dataset_name
    except ValueError:
        return None
