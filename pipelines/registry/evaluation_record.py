"""The last evaluation of a registered model, as tags on its version. A schedule reads them to find what is due.

`enat run` writes them after stage evaluate (record), and `enat reevaluate` writes the same tags. The tags name the artifact that
holds the numbers. Scores are tags, too, for people who look at the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipelines.artifacts.manifest import Manifest
from pipelines.registry import model_card
from pipelines.storage.base import digest_of
from pipelines.workflow.stage import PublishContext
from pipelines.workflow.summary import Summary

EVALUATED = "enat.evaluated"
EVALUATION = "enat.evaluation"
NODE = "enat.evaluation_node"
PROTOCOL = "enat.protocol_digest"
SAMPLING = "enat.sampling_digest"
SCORE = "enat.score."
DISTANCES = ("fid", "frechet_distance")  # metrics: the distance on Inception's features, and on those of another extractor
DRIFT = "enat.drift"
_MAIN_NODE = "evaluate"
_NO_QUESTION = ("execution", "dataset", "shard_size", "replicates")  # of a config of samples: how and from where, not what


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary(Summary):
    """protocol: how the scores were measured; see pipelines.evaluation.protocol.   metrics: which were computed.

    num_reference: None if published statistics do not give it.   settings: a ScoreSettings as it was applied.
    """

    extractor: str
    reference_digest: str
    num_samples: int
    num_reference: int | None
    rounding: str
    protocol: Mapping[str, Any]
    protocol_digest: str
    metrics: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The tags of a version.

    evaluated: UTC, when the scores were made, or last found to be what they still are.   evaluation: "evaluate/<key>".
    node: of the pipeline that made them, evaluate or evaluate@variant.   scores: by metric.   drift: what moved, if anything did.
    protocol, sampling: digests of how they were measured and of how samples were asked for, "" where that was not written.
    """

    evaluated: datetime
    evaluation: str
    node: str = _MAIN_NODE
    scores: Mapping[str, float] = field(default_factory=dict)
    drift: str | None = None
    protocol: str = ""
    sampling: str = ""

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> EvaluationRecord | None:
        """None if the version was not evaluated, or its tags cannot be read."""
        try:
            evaluated = datetime.fromisoformat(tags[EVALUATED])
            scores = {name.removeprefix(SCORE): float(value) for name, value in tags.items() if name.startswith(SCORE)}
            evaluation = tags[EVALUATION]
        except (KeyError, ValueError):
            return None
        return cls(
            evaluated=evaluated if evaluated.tzinfo else evaluated.replace(tzinfo=UTC),
            evaluation=evaluation,
            node=tags.get(NODE, _MAIN_NODE),
            scores=scores,
            drift=tags.get(DRIFT),
            protocol=tags.get(PROTOCOL, ""),
            sampling=tags.get(SAMPLING, ""),
        )

    def is_comparable(self, evaluation: Manifest, samples: Manifest) -> bool:
        """Whether an evaluation is comparable with these scores, whose own artifact may be gone."""
        own = (EvaluationSummary.read(evaluation).protocol_digest, sampling_digest(samples))
        return own == (self.protocol, self.sampling)


def sampling_digest(samples: Manifest) -> str:
    """Digest of what determines samples beside model and code."""
    config = {name: value for name, value in samples.config.items() if name not in _NO_QUESTION and value is not None}
    inputs = {name: source["digest"] for name, source in samples.inputs.items() if name != "model"}
    return digest_of({"config": config, "inputs": inputs})[:12]


def tags_of(
    manifest: Manifest, samples: Manifest, scores: Iterable[str], *, node: str, evaluated: datetime | None = None
) -> dict[str, str]:
    """Tags for the version of the evaluated model. scores: metrics to be written as tags.

    evaluated: the time of a later measurement with the same scores.
    """
    moment = evaluated or made_at(manifest)
    tags = {
        EVALUATED: moment.astimezone(UTC).isoformat(timespec="seconds"),
        EVALUATION: f"{manifest.stage}/{manifest.key}",
        NODE: node,
        PROTOCOL: EvaluationSummary.read(manifest).protocol_digest,
        SAMPLING: sampling_digest(samples),
    }
    return tags | {SCORE + name: repr(float(manifest.metrics[name])) for name in scores if name in manifest.metrics}


def made_at(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.provenance["created"])


def replacing(tags: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str | None]:
    """The same tags, and None for scores of an earlier evaluation that this one lacks."""
    return {**dict.fromkeys(name for name in found if name.startswith(SCORE)), **tags}


def record(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext, scores: Iterable[str]) -> None:
    """Write the tags after stage evaluate has run or was reused, if the model is registered.

    A variant that only samples differently evaluates the same model; it does not replace the run's own evaluation. Nor do
    samples of an earlier step of its training. An older evaluation that is reused does not replace a newer one.
    """
    model = inputs.get("model")
    if model is None or inputs["samples"].config.get("checkpoint") is not None:
        return
    made = made_at(manifest)
    tags = tags_of(manifest, inputs["samples"], scores, node=context.node)

    def choose(found: Mapping[str, str]) -> Mapping[str, str | None]:
        known = EvaluationRecord.of(found)
        if known is None:
            return replacing(tags, found)
        is_same = known.evaluation == tags[EVALUATION]
        if (is_same and known.evaluated >= made) or context.node not in (_MAIN_NODE, known.node):
            return {}
        return replacing(tags, found)

    context.run.tag_model(model_card.registered_name(model, context.titles.get("model")), model.digest, choose)
