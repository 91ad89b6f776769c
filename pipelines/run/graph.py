"""The pipeline from a dataset to a scored model: its configuration, and the stages it consists of.

dataset, tokenizer -> token_map -> train -> generate -> evaluate -> report, and reference -> evaluate; where asked for, token_map,
reference -> reconstruction. A variant is the same pipeline with some values replaced; what a variant shares with the run's own
model is the same artifact, made once. Images of other generators are scored by the same stages: images, reference -> evaluate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

from pipelines.data.image_sets import ImageSetConfig
from pipelines.data.sources.config import DatasetConfig
from pipelines.run.config import RunConfig, at_resolution, completed
from pipelines.stages import (
    captions,
    dataset,
    evaluate,
    generate,
    image_set,
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
from pipelines.workflow.stage import MAIN, Node, Stage


def build(run: RunConfig) -> list[Node]:
    """All nodes, each after those it reads from."""
    nodes: dict[str, Node] = {}
    ids_by_identity: dict[str, str] = {}
    identities: dict[str, str] = {}
    own_identities: dict[DatasetConfig, Any] = {}

    def add(stage: Stage, variant: str, config: Any, inputs: Mapping[str, str]) -> str:
        """The id of a node; an earlier one's where it would make the same. A second one of a stage is told apart by a number."""
        if stage is dataset.STAGE and config not in own_identities:
            own_identities[config] = configuration.identity(config)
        own = own_identities[config] if stage is dataset.STAGE else configuration.identity(config)
        identity = digest_of({"stage": stage.name, "config": own, "inputs": {k: identities[v] for k, v in inputs.items()}})
        if identity not in ids_by_identity:
            id = base = stage.name if variant == MAIN else f"{stage.name}@{variant}"
            id = next(id for id in chain([base], (f"{base}-{n}" for n in count(2))) if id not in nodes)
            nodes[id], identities[id] = Node(id, stage, config, dict(inputs), own), identity
            ids_by_identity[identity] = id
        return ids_by_identity[identity]

    report_inputs: dict[str, str] = {}
    for name, variant in {MAIN: run, **run.variant_runs}.items():
        ids = _add_model_stages(name, variant, add)
        kept = ids if name == MAIN else {f"{key}@{name}": ids[key] for key in ("model", "samples", "evaluation")}
        report_inputs |= kept
    page = replace(run.report, name=run.name, variants=tuple(run.variants))
    add(report.STAGE, MAIN, page, report_inputs)
    return _needed(nodes, run.targets)


def _add_model_stages(name: str, run: RunConfig, add: Any) -> dict[str, str]:
    """Nodes of one variant up to its evaluation; input name -> node id."""
    filled = {
        section: completed(getattr(run, section), run)
        for section in ("tokenizer", "token_map", "captions", "reference", "train", "generate", "evaluate")
    }
    resolution = run.tokenizer.architecture().resolution

    def dataset_of(section: str) -> dict[str, str]:
        return {"dataset": add(dataset.STAGE, name, filled[section].dataset, {})}

    ids = {"tokenizer": add(tokenizer.STAGE, name, filled["tokenizer"], {} if run.tokenizer.weights else dataset_of("tokenizer"))}
    ids["token_map"] = add(token_map.STAGE, name, filled["token_map"], {**dataset_of("token_map"), "tokenizer": ids["tokenizer"]})
    features, asked_for = {}, {}
    if run.captions.encoder is not None:
        features = {"captions": add(captions.STAGE, name, filled["captions"], dataset_of("captions"))}
        if run.train.model.text:
            of_samples = replace(filled["captions"], dataset=filled["generate"].dataset)
            asked_for = {"captions": add(captions.STAGE, name, of_samples, dataset_of("generate"))}
    given = {} if run.reference.npz else dataset_of("reference")
    ids["reference"] = add(reference.STAGE, name, at_resolution(filled["reference"], resolution), given)
    if run.reconstruction is not None:
        kept = {key: ids[key] for key in ("tokenizer", "token_map", "reference")} | dataset_of("token_map")
        measured = replace(run.reconstruction, dataset=filled["token_map"].dataset)
        ids["reconstruction"] = add(reconstruction.STAGE, name, measured, kept)
    learned_from = {} if run.train.weights else {"token_map": ids["token_map"]}
    learned_from |= features if run.train.model.text else {}
    ids["model"] = add(train.STAGE, name, filled["train"], {**learned_from, "tokenizer": ids["tokenizer"]})
    asked_for |= {"token_map": ids["token_map"]} if run.generate.mask_ratio is not None else {}
    ids["samples"] = add(generate.STAGE, name, filled["generate"], {"model": ids["model"], **asked_for})
    scored = {key: ids[key] for key in ("samples", "tokenizer", "reference", "model")}
    scored |= dataset_of("evaluate") if run.evaluate.judge else {}
    ids["evaluation"] = add(evaluate.STAGE, name, filled["evaluate"], scored)
    return ids | ({"captions": asked_for["captions"]} if "captions" in asked_for else {})


def build_evaluation(run: RunConfig, images: ImageSetConfig, resolution: int | None = None) -> list[Node]:
    """The nodes that score images of another generator as a run scores its own samples. resolution: of the reference, where it
    does not say it; None takes that of the run's own samples."""
    filled = {section: completed(getattr(run, section), run) for section in ("reference", "evaluate")}
    source = replace(images, s3=images.s3 or run.s3_of(images.path))
    nodes = [Node("images", image_set.STAGE, source)]
    given = {}
    if not run.reference.npz:
        nodes.append(Node("dataset", dataset.STAGE, filled["reference"].dataset))
        given = {"dataset": "dataset"}
    of_reference = resolution or run.tokenizer.architecture().resolution
    nodes.append(Node("reference", reference.STAGE, at_resolution(filled["reference"], of_reference), given))
    scored = replace(filled["evaluate"], images=source, judge=None)  # which class was asked for is not known
    nodes.append(Node("evaluate", evaluate.STAGE, scored, {"samples": "images", "reference": "reference"}))
    return nodes


def _needed(nodes: dict[str, Node], targets: Sequence[str]) -> list[Node]:
    """The targets and what they read from, in order."""
    stages = list(dict.fromkeys(node.stage.name for node in nodes.values()))
    for target in targets:
        if target not in stages:
            raise ConfigError(f"targets names {target!r}; the stages of this run are {', '.join(stages)}")
    needed = {id for id, node in nodes.items() if not targets or node.stage.name in targets}
    for id in reversed(nodes):
        needed |= set(nodes[id].inputs.values()) if id in needed else set()
    return [node for id, node in nodes.items() if id in needed]
