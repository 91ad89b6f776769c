"""The runs of MLflow that people compare: one for each model that a command makes, with the runs of its stages nested below it.

The run's own model and each variant have one. What a variant shares with another model is made by the other's stages; the run of
the variant links to their runs. A variant that shares everything links to all of them, and has the other's scores.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.tracking.run import RunHandle, fail
from pipelines.workflow.stage import MAIN, Node

# Tags of the run of a model: the id of the run that made an artifact, by the name of the node without the variant.
LINK = "enat.run."
KIND = "enat.kind"  # a tag
MODEL_KIND = "model"  # its value for the run of a model
NAME = "enat.name"  # a tag: the name of the config run
# Values that say in a few words how a run differs. {} is the value.
_WORDS = {
    "generate.sampler.num_steps": "{} steps",
    "generate.sampler.guidance_scale": "guidance {}",
    "generate.mask_ratio": "mask ratio {}",
    "train.model.preset": "{}",
    "seed": "seed {}",
}
_MODEL, _SCORED = "train", "evaluate"  # nodes: that makes a model, and whose scores the run of a model has
_NAMED, _LETTERS = 3, 40  # values in a title, and letters of each
_NO_DIFFERENCE = ("name", "workspace", "store", "targets", "cluster", "tracking", "s3", "buckets", "prices", "report")


def words(values: Mapping[str, Any]) -> str | None:
    """Values by their keys, as a title says them. None if there are none, or one of them has no short words."""
    parts = [_WORDS[key].format(value) for key, value in values.items() if key in _WORDS]
    return ", ".join(parts) if parts and len(parts) == len(values) else None


def of_overrides(overrides: Sequence[str]) -> str | None:
    """How a command's overrides ("train.num_steps=10") make its run differ. Places and machines make no difference."""
    values = dict(each.partition("=")[::2] for each in overrides)
    kept = {key: value for key, value in values.items() if key.partition(".")[0] not in _NO_DIFFERENCE and ".execution." not in key}
    parts = [_WORDS[key].format(value) for key, value in kept.items() if key in _WORDS]
    other = [
        f"{' '.join(dict.fromkeys((key.partition('.')[0], key.rpartition('.')[2])))} {value}"
        for key, value in kept.items()
        if key not in _WORDS
    ]
    shown = other[-max(1, _NAMED - len(parts)) :] if len(parts) < _NAMED else []
    more = len(other) - len(shown)
    return ", ".join([*parts, *(each[:_LETTERS] for each in shown), *([f"{more} more"] if more else [])]) or None


class ModelRuns:
    """start: starts the run of a variant, which happens when its first stage begins. nodes: of the command."""

    def __init__(
        self,
        main: RunHandle,
        start: Callable[[str], RunHandle] | None = None,
        variants: Iterable[str] = (),
        nodes: Sequence[Node] = (),
    ) -> None:
        self.by_variant = {MAIN: main}
        self._start, self._variants, self._lock = start or (lambda variant: main), frozenset(variants), threading.RLock()
        self._stages: dict[str, RunHandle] = {}
        self._left: dict[str, set[str]] = {}
        for node in nodes:
            self._left.setdefault(self._variant_of(node.id), set()).add(node.id)

    def of(self, node: str) -> RunHandle:
        """The run of the model that a node belongs to. node: its id."""
        variant = self._variant_of(node)
        with self._lock:
            if variant not in self.by_variant:
                self.by_variant[variant] = self._start(variant)
            return self.by_variant[variant]

    def record(self, node: Node, stage_run: RunHandle, *, is_reused: bool) -> None:
        """Note the run that made a node's artifact. The run of the model links to it unless it contains it, and to those of inputs
        that belong to other models."""
        with self._lock:
            self._stages[node.id] = stage_run
            linked = {node.id} if is_reused else set()
            linked |= {id for id in node.inputs.values() if self._variant_of(id) != self._variant_of(node.id)}
            if not any(read.is_per_variant for read in node.stage.reads.values()):
                found = {LINK + id.partition("@")[0]: self._stages[id] for id in sorted(linked) if id in self._stages}
                self.of(node.id).link(found)

    def end(self, node: str) -> None:
        """A node is done. The run of a variant ends with its last node, that of the run's own model with the command."""
        variant = self._variant_of(node)
        with self._lock:
            self._left.get(variant, set()).discard(node)
            if variant != MAIN and not self._left.get(variant):
                self.of(node).finish()

    def without_nodes(self) -> list[str]:
        """The variants whose artifacts are all made by other models."""
        return sorted(self._variants - self._left.keys() - self.by_variant.keys())

    def link_all(self, variant: str, nodes: Iterable[str]) -> None:
        """Make the run of a variant that shares everything, unless no model is among it. nodes: that made its artifacts."""
        with self._lock:
            found = {node: self._stages[node] for node in nodes if node in self._stages}
            if not any(node.partition("@")[0] == _MODEL for node in found):
                return
            run = self.by_variant[variant] = self._start(variant)
            run.link({LINK + node.partition("@")[0]: made for node, made in found.items()})
            evaluated = next((node for node in found if node.partition("@")[0] == _SCORED), None)
            if evaluated is not None:
                run.copy_from(self.of(evaluated))
            run.finish()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Mark the runs of variants that are not done as FAILED or KILLED if the work raises."""
        try:
            yield
        except BaseException as error:
            for variant, run in self.by_variant.items():
                if variant != MAIN and self._left.get(variant):
                    fail(run, error)
            raise

    def _variant_of(self, node: str) -> str:
        """A second node of a stage has a number after the variant."""
        label = node.partition("@")[2]
        if not label:
            return MAIN
        found = next((each for each in (label, re.sub(r"-\d+$", "", label)) if each in self._variants), None)
        return found or MAIN
