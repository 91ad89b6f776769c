"""Scores of a model while it trains: few samples of its EMA weights, against the stored features of a reference.

The first training worker hands over the weights. An actor of its own computes the scores beside the training if the cluster has
room for one; otherwise the training worker computes them between two steps. The samples of all steps have the same seeds, labels or
captions, so that most of their randomness cancels between two steps.

Shape legend: N samples, P images of a pass, L codes of an image, F features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from enat.config import ENATConfig
from enat.sampler_config import IMAGES_PER_PASS, SamplerConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster import connection
from pipelines.cluster.resources import Workers
from pipelines.data.captions import CaptionFeatures
from pipelines.data.samples import sample_label
from pipelines.evaluation.extractors import ExtractorFile, ReferenceSummary, require_same_features
from pipelines.evaluation.features import feature_files, read_rows, stored_moments
from pipelines.evaluation.readers import code_decoder, run_pass
from pipelines.evaluation.scores import published_name
from pipelines.training.config import ScoresConfig
from pipelines.training.task import score_part
from pipelines.workflow.stage import WorkerContext

if TYPE_CHECKING:
    import torch

    from enat.model import ENAT, TextCondition

_log = logging.getLogger(__name__)
_START_SECONDS = 60.0  # for an actor, before the training computes the scores itself
_MOST_WAITING = 2  # weights in Ray's object store, of steps that are not scored yet


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """What scores are computed from. captions: of a model of captions."""

    config: ScoresConfig
    architecture: ENATConfig
    sampler: SamplerConfig
    seed: int
    is_bf16: bool
    context: WorkerContext
    tokenizer: Manifest
    reference: Manifest
    captions: Manifest | None


class Scorer:
    """Computes the scores of one step after the other, in this process. Everything is loaded for the first one."""

    def __init__(self, task: ScoringTask, device: str) -> None:
        self.task, self.device = task, device
        self._tools: _Tools | None = None

    def is_ready(self) -> bool:
        return True

    def score(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Compute, record and track the scores of weights. A failure is recorded: it does not stop the training."""
        started = time.monotonic()
        try:
            if self._tools is None:
                self._tools = _Tools(self.task, self.device)
            found = self._tools.scores(weights)
        except Exception as error:  # noqa: BLE001 (no memory, an unavailable store)
            _log.warning("the scores of step %d were not computed", step, exc_info=True)
            record_failure(self.task.context, step, f"{type(error).__name__}: {error}")
            return
        row = {"step": step, **found, "seconds": time.monotonic() - started}
        context = self.task.context
        context.store.put_part(context.stage, context.key, score_part(step), row)
        context.run.log_metrics({f"scores/{name}": value for name, value in row.items() if name != "step"}, step)

    def flush(self) -> None:
        """Send what a tracking server that was away has missed."""
        self.task.context.run.flush()


def record_failure(context: WorkerContext, step: int, reason: str) -> None:
    """The stage says at its end which scores are missing."""
    context.store.put_part(context.stage, context.key, score_part(step), {"error": reason})


class BetweenSteps:
    """Scores by the training worker itself, which the other workers wait for."""

    def __init__(self, task: ScoringTask) -> None:
        self._task = task

    def submit(self, step: int, model: ENAT) -> None:
        """The networks are loaded for each step again: between scores, the memory of the device belongs to the training."""
        from pipelines.sampling.fixed_batches import fixed_numerics

        device = str(model.token_embedding.weight.device)
        with fixed_numerics(device):
            Scorer(self._task, device).score(step, model.state_dict())

    def finish(self) -> None:
        """Nothing waits."""


class BesideTraining:
    """Scores by an actor that has resources of its own."""

    def __init__(self, actor: Any, context: WorkerContext) -> None:
        self._actor, self._context = actor, context
        self._waiting: list[Any] = []

    def submit(self, step: int, model: ENAT) -> None:
        """Copies the weights. A step is left out if the actor has fallen behind by two: training does not wait."""
        import ray

        self._waiting = ray.wait(self._waiting, num_returns=len(self._waiting), timeout=0)[1] if self._waiting else []
        if len(self._waiting) >= _MOST_WAITING:
            record_failure(self._context, step, "scores take longer than train.scores.every steps; set it higher")
            return
        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self._waiting.append(self._actor.score.remote(step, ray.put(weights)))

    def finish(self) -> None:
        """Wait for what was submitted. If the actor was lost, its scores are missing."""
        import ray

        waiting = [*self._waiting, self._actor.flush.remote()]
        ray.wait(waiting, num_returns=len(waiting), timeout=None)
        self._waiting = []


def start_scoring(task: ScoringTask, training: Workers) -> BetweenSteps | BesideTraining:
    """An actor beside the training if the cluster has room for it, or else the training worker."""
    import ray

    one = Workers(cpus_per_worker=training.cpus_per_worker, gpus_per_worker=training.gpus_per_worker)
    workers = task.config.execution or one
    if not connection.capacity().has_room_beside(training, workers):
        return BetweenSteps(task)
    actor = ray.remote(**workers.resources, max_restarts=3)(Scorer).remote(task, workers.device)
    if not ray.wait([actor.is_ready.remote()], timeout=_START_SECONDS)[0]:  # others use what is free
        ray.kill(actor)
        return BetweenSteps(task)
    return BesideTraining(actor, task.context)


class _Tools:
    """A model, the decoder of the tokenizer, the extractor and the reference, on one device."""

    def __init__(self, task: ScoringTask, device: str) -> None:
        import torch

        from enat.model import ENAT
        from pipelines.sampling.fixed_batches import PassSampler

        store, reference = task.context.store, task.reference
        require_same_features(reference)
        self.task, self.device, self.summary = task, device, ReferenceSummary.read(reference)
        with torch.random.fork_rng(devices=[]):  # training draws nothing from the global generator, and must not begin to
            self.model: ENAT = ENAT(task.architecture).to(device).eval().requires_grad_(False)
        self.captions = None if task.captions is None else CaptionFeatures.open(store, task.captions)
        labels = [sample_label(index, task.architecture.num_classes) for index in range(task.config.num_samples)]
        self.labels = np.array(labels, np.int64)  # of a model of classes
        self.decoder = code_decoder(store, task.tokenizer, device)
        self.extractor = ExtractorFile.of_reference(store, reference).load().to(device)
        self.moments = stored_moments(store, reference)["features"]
        self.real: np.ndarray | None = None
        if "sliced_distance" in task.config.metrics:
            self.real = read_rows(store, reference.stage, reference.key, feature_files(reference), "features")
        self.sampler = PassSampler(
            model=self.model,
            sampler=task.sampler,
            run_seed=task.seed,
            images_per_pass=IMAGES_PER_PASS,
            is_bf16=task.is_bf16,
            conditions=self._condition,
        )

    def scores(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        from enat.metrics.errors import frechet_influence, standard_error
        from enat.metrics.moments import FeatureMoments, frechet_distance
        from enat.metrics.sliced import sliced_distance

        self.model.load_state_dict(weights)
        features = np.concatenate([*self._features()])
        found: dict[str, float] = {}
        if "frechet_distance" in self.task.config.metrics:
            own = FeatureMoments(features.shape[1]).add(features)
            influence = frechet_influence(features, own, self.moments)
            found["frechet_distance"] = frechet_distance(own, self.moments)
            found["frechet_distance_se"] = standard_error(influence, None if self.captions is not None else self.labels)
        if self.real is not None:
            found["sliced_distance"] = sliced_distance(features, self.real)
        return {published_name(name, self.summary.extractor): value for name, value in found.items()}

    def _features(self) -> Iterator[np.ndarray]:
        """float32 (P, F) of one pass after the other."""
        from pipelines.sampling.fixed_batches import split_into_passes

        def outputs(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"features": self.extractor(self.decoder(rows).images)["features"]}

        for index in split_into_passes(0, self.task.config.num_samples, IMAGES_PER_PASS):
            codes = self.sampler.states(index)[:, -1].numpy()
            yield run_pass(outputs, {"codes": codes}, IMAGES_PER_PASS, self.device)["features"]

    def _condition(self, samples: np.ndarray) -> torch.Tensor | TextCondition:
        import torch

        from enat.model import TextCondition

        if self.captions is None:
            return torch.from_numpy(self.labels[samples])
        captions = samples * len(self.captions) // self.task.config.num_samples  # evenly spread
        return TextCondition(*map(torch.from_numpy, self.captions.take(captions)))
