"""The card of a model on the Hugging Face hub: a YAML header that the hub reads, and the model's card for people."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import DamagedManifestError, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.samples import SamplesSummary
from pipelines.evaluation.protocol import SCORES
from pipelines.registry import model_card
from pipelines.registry.evaluation_record import EvaluationSummary
from pipelines.registry.influences import with_interval
from pipelines.workflow.models import ModelSummary

PICTURE = "samples.png"
_A_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a dataset, as the hub takes it


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model's samples. sampler, labels: how they were made.   protocol: how they were measured."""

    artifact: str
    scores: Mapping[str, float]
    metrics: Mapping[str, float]
    sampler: SamplerConfig
    labels: str
    protocol: Mapping[str, Any]


def evaluations_of(store: ArtifactStore, model: Manifest) -> list[Evaluation]:
    """Those of the store, of samples by the last weights of this model. Damaged manifests are left out."""
    return sorted(_evaluations(store, model), key=lambda each: each.artifact)


def _evaluations(store: ArtifactStore, model: Manifest) -> Iterator[Evaluation]:
    for found in store.read_manifests(("evaluate", key) for key in store.keys("evaluate")):
        if isinstance(found, DamagedManifestError) or found.inputs.get("model", {}).get("digest") != model.digest:
            continue
        samples = store.read_input(found, "samples")
        if samples is None or samples.stage != "generate":
            continue
        made = SamplesSummary.read(samples)
        if made.train_steps is not None or made.ema_length is not None or made.mask_ratio is not None:
            continue
        scores = {name: found.metrics[name] for name in SCORES if name in found.metrics}
        protocol = EvaluationSummary.read(found).protocol
        yield Evaluation(f"evaluate/{found.key}", scores, found.metrics, made.sampler, made.labels, protocol)


def hub_card(
    model: Manifest, inputs: Mapping[str, Manifest], evaluations: Sequence[Evaluation], *, licence: str, has_picture: bool
) -> str:
    """README.md. licence: an identifier of the hub, such as mit."""
    import yaml

    header = yaml.safe_dump(_header(model, evaluations, licence), sort_keys=False, allow_unicode=True)
    picture = f"\n\n![Samples of this model]({PICTURE})" if has_picture else ""
    body = model_card.model_card(model, inputs, "", usage=_usage(model) + picture, scores=_scores(evaluations))
    return f"---\n{header}---\n\n{body}"


def _header(model: Manifest, evaluations: Sequence[Evaluation], licence: str) -> dict[str, Any]:
    summary = ModelSummary.read(model)
    is_text = summary.model.text_width is not None
    task = "text-to-image" if is_text else "unconditional-image-generation"
    condition = ["class-conditional"] if summary.model.num_classes else []
    dataset = summary.dataset if not summary.is_imported and _A_NAME.fullmatch(summary.dataset) else None
    used = sorted({name for each in evaluations for name in each.scores})
    index = {"name": model_card.registered_name(model), "results": [_result(each, task) for each in evaluations if each.scores]}
    return {
        "license": licence,
        "library_name": "enat-lab",
        "pipeline_tag": task,
        "tags": ["enat", "image-generation", *condition, "arxiv:2411.06959"],
        **({"datasets": [dataset]} if dataset else {}),
        **({"metrics": used} if used else {}),
        **({"model-index": [index]} if index["results"] else {}),
    }


def _result(evaluation: Evaluation, task: str) -> dict[str, Any]:
    """One evaluation as the hub's model-index has it: the protocol is the args of every metric."""
    name = str(evaluation.protocol.get("reference", "unknown"))
    metrics = []
    for score, value in evaluation.scores.items():
        error = evaluation.metrics.get(f"{score}_se")
        args = {**_plain(evaluation.protocol), "sampler": _plain(dataclasses.asdict(evaluation.sampler))}
        own = {**args, **({"standard_error": float(error)} if error is not None else {})}
        metrics.append({"type": score, "name": SCORES[score], "value": float(value), "args": own})
    return {"task": {"type": task}, "dataset": {"type": name, "name": name}, "metrics": metrics}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As YAML has it, without what is not set."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None}


def _usage(model: Manifest) -> str:
    config = ModelSummary.read(model).model
    if config.text_width is not None:
        opened, asked = 'ENATPipeline.from_pretrained("FOLDER or owner/name", text_encoder="FOLDER")', 'captions=["what it shows"]'
    else:
        opened = 'ENATPipeline.from_pretrained("FOLDER or owner/name")'
        asked = f"labels={[*range(min(config.num_classes, 4))] or [0]}"
    return f"""The folder holds safetensors and JSON only, and is opened by the Python package that wrote it.

```python
from enat import ENATPipeline

pipe = {opened}
made = pipe({asked}, num_inference_steps=8)
made.images[0].save("image.png")  # made.seeds make the same images again
```"""


def _scores(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "No evaluation of this model is known."
    return "\n\n".join(map(_score_table, evaluations))


def _score_table(evaluation: Evaluation) -> str:
    protocol, sampler = evaluation.protocol, evaluation.sampler
    count = protocol.get("num_samples")
    against = protocol.get("num_reference")
    rows = [(SCORES[name], with_interval(evaluation.metrics, name)) for name in evaluation.scores]
    return (
        f"Of {count:,} samples ({evaluation.labels}), {sampler.num_steps} steps at guidance {sampler.guidance_scale:g}, against "
        f"{f'{against:,} images of ' if against else ''}{model_card.escaped(protocol.get('reference'))}, with the features of "
        f"{model_card.escaped(protocol.get('extractor'))} (`{evaluation.artifact[:21]}`):\n\n{model_card.table(rows)}"
    )
