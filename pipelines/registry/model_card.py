"""A trained model in MLflow's model registry: its name, its tags, and a card for people.

The weights stay in the artifact store. A registered version names its artifact, and contains the card and the manifest.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from enat.config import ENATConfig, MaskingConfig, VQGANConfig
from enat.cost import generation_cost
from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import MANIFEST, Manifest
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import registry
from pipelines.tracking.models import TrackedModel
from pipelines.workflow.inputs import checkpoint_of, tracked_inputs
from pipelines.workflow.models import ModelSummary, TokenizerSummary, milestones_of
from pipelines.workflow.stage import MAIN, PublishContext

CARD = "README.md"
VARIANT = "enat.variant"  # a tag of a model that MLflow lists beside runs
PLACE = "store.json"  # where the weights of a version are
_LOADER = "pipelines.sampling.pyfunc"  # imported by MLflow to load a version
# Fields of a model that are not part of its name: those that the data determines, and sizes.
_FROM_DATA = {"grid_size", "codebook_size", "num_classes", "text_width", "num_text_tokens"}
_SIZES = {"encoder_layers", "decoder_layers", "embed_dim", "num_heads"}
_NOT_RECIPE = {"execution", "model", "s3", "sampler"}  # parts of a TrainConfig that are elsewhere on a card, or not on it


def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Register a trained or imported model. Untrained models are for comparison only and are not registered."""
    summary = ModelSummary.read(manifest)
    if not context.tracking.enabled or (summary.num_steps == 0 and not summary.is_imported):
        return
    title = context.titles.get("")
    card = model_card(manifest, inputs, context.store.uri, title=title)
    context.run.register_model(
        registered_name(manifest, title),
        files={
            CARD: card.encode(),
            MANIFEST: manifest.to_json(),
            PLACE: json.dumps({"store": without_credentials(context.store.uri)}).encode(),
            **_pyfunc(manifest, inputs),
        },
        tags=model_tags(manifest, inputs, context.store.uri, title),
        description=card,
        alias=context.tracking.model_alias,
        checkpoint=checkpoint_of(manifest),
    )


def list_models(
    manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext, scores: Mapping[int, Mapping[str, float]]
) -> None:
    """List the checkpoints of a training beside its run. scores: of steps, which the checkpoints of these steps get."""
    summary, variant, title = ModelSummary.read(manifest), context.node.partition("@")[2], context.titles.get("")
    last = summary.num_steps
    recipe = {key: manifest.config.get(key) for key in ("batch_size", "learning_rate", "seed")} if last else {}
    params = {
        "parameters": summary.parameters,
        "dataset": trained_on(manifest, title),
        "resolution": _tokenizer_config(inputs).resolution,
        "train_steps": last,
        "key": manifest.key[:12],
        **{key: value for key, value in recipe.items() if value is not None},
    }
    read = [inputs["reference"]] if scores else []
    reference = next(iter(tracked_inputs(context.store, context.stages, read)), None)
    found = []
    for step in [*milestones_of(manifest), last]:
        if (checkpoint := checkpoint_of(manifest, step)) is not None:
            model = TrackedModel(
                checkpoint=checkpoint,
                # MLflow's table shows some 20 letters: what differs comes first.
                name=" · ".join(
                    [
                        *([variant] if variant else []),
                        *([f"step {step:,}"] if step != last else []),
                        registered_name(manifest, title),
                    ]
                ),
                params={**params, "step": step},
                tags={VARIANT: variant or MAIN, registry.DIGEST_TAG: manifest.digest},
                scores=scores.get(step, {}),
            )
            found.append(model)
    context.run.log_models(found, reference)


def _pyfunc(manifest: Manifest, inputs: Mapping[str, Manifest]) -> dict[str, bytes]:
    """What MLflow needs to load the version, and shows of its inputs and outputs."""
    sampler, resolution = _sampler(manifest), _tokenizer_config(inputs).resolution
    is_text = ModelSummary.read(manifest).model.text_width is not None
    params: dict[str, int | float | str] = {"num_steps": sampler.num_steps, "seed": 0, "device": "auto"}
    if sampler.guidance_scales is None:
        params["guidance_scale"] = float(sampler.guidance_scale)
    if is_text:
        params["text_encoder"] = ""
    column = ("caption", "string") if is_text else ("label", "long")
    return registry.pyfunc_files(_LOADER, column=column, output=(resolution, resolution, 3), params=params)


def trained_on(manifest: Manifest, title: str | None = None) -> str:
    """The name of the data that a model was trained on: what it is called now, or else what it was called then."""
    summary = ModelSummary.read(manifest)
    return summary.dataset if title is None or summary.is_imported else title


def registered_name(manifest: Manifest, title: str | None = None) -> str:
    """enat-<size>-<dataset> and what differs from the usual: enat-s-imagenet-decoder_attention-full, enat-b-coco-text for captions.

    An alias moves among the versions of a name, so an ablation gets a name of its own. The size is the preset's. For a model
    without a preset it is the number of parameters and the layers of encoder and decoder.

    title: of the data, see trained_on.
    """
    summary, preset = ModelSummary.read(manifest), manifest.config["model"]["preset"]
    model = summary.model
    if preset:
        size, usual = preset, ENATConfig.preset(preset)
    else:
        size = f"enat-{_short_count(summary.parameters)}-{model.encoder_layers}e{model.decoder_layers}d"
        usual = ENATConfig(**{name: getattr(model, name) for name in _SIZES})
    changed = _differences(model, usual, without=_FROM_DATA)
    if model.reuse and not summary.is_imported:
        changed |= _differences(MaskingConfig(**manifest.config["masking"]), MaskingConfig())
    condition = ["text"] if model.text_width is not None else []
    parts = [size, trained_on(manifest, title), *condition, *(f"{name}-{_plain(value)}" for name, value in changed.items())]
    return registry.model_name("-".join(parts))


def _differences(config: Any, usual: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    values, expected = dataclasses.asdict(config), dataclasses.asdict(usual)
    return {name: value for name, value in values.items() if name not in without and value != expected[name]}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def model_tags(manifest: Manifest, inputs: Mapping[str, Manifest], store_uri: str, title: str | None = None) -> dict[str, str]:
    """Tags that identify the artifact and its inputs."""
    summary = ModelSummary.read(manifest)
    tags = {
        registry.DIGEST_TAG: manifest.digest,
        registry.CREATED_TAG: manifest.provenance["created"],
        "enat.key": manifest.key,
        "enat.artifact": f"{manifest.stage}/{manifest.key}",
        "enat.store": without_credentials(store_uri),
        "enat.code": manifest.provenance["code"],
        "enat.dataset": trained_on(manifest, title),
        "enat.resolution": _tokenizer_config(inputs).resolution,
        "enat.num_steps": summary.num_steps,
    }
    for name, source in inputs.items():
        tags |= {f"enat.input.{name}": f"{source.stage}/{source.key}", f"enat.{name}_digest": source.digest}
    return {name: str(value) for name, value in tags.items()}


def model_card(
    manifest: Manifest,
    inputs: Mapping[str, Manifest],
    store_uri: str,
    *,
    title: str | None = None,
    usage: str | None = None,
    scores: str | None = None,
) -> str:
    """The card as Markdown, from manifests alone.

    title: of the data, see trained_on.   usage: how to load it; None for how to do so from the store.
    scores: None if they are elsewhere.
    """
    sections = [
        _head(manifest, inputs, title),
        f"## Load and sample\n\n{usage or _usage(manifest, inputs, store_uri)}",
        *([f"## Scores\n\n{scores}"] if scores is not None else []),
        f"## Model\n\n{_model(manifest)}",
        f"## Data\n\n{_data(manifest, inputs, title)}",
        f"## Training\n\n{_training(manifest)}",
        f"## Cost\n\n{_cost(manifest, inputs)}",
        f"## Limits\n\n{_limits(manifest, inputs, title, has_scores=scores is not None)}",
    ]
    return "\n\n".join(sections) + "\n"


def _head(manifest: Manifest, inputs: Mapping[str, Manifest], title: str | None) -> str:
    summary, provenance = ModelSummary.read(manifest), manifest.provenance
    dataset, resolution = escaped(trained_on(manifest, title)), _tokenizer_config(inputs).resolution
    origin = (
        f"These are published weights for images of {resolution} px, imported and not trained here."
        if summary.is_imported
        else f"It was trained on {dataset} at {resolution} px for {summary.num_steps:,} steps."
    )
    return (
        f"# {escaped(registered_name(manifest, title))}\n\n"
        f"ENAT (EfficientNAT, NeurIPS 2024, arXiv 2411.06959) with {summary.parameters:,} parameters: a non-autoregressive "
        f"transformer that generates the tokens of an image in a few parallel steps, {_condition(manifest)}. {origin}\n\n"
        f"Artifact `{manifest.stage}/{manifest.key}`, made {provenance['created']} by code {provenance['code']}."
    )


def _condition(manifest: Manifest) -> str:
    model = ModelSummary.read(manifest).model
    if model.text_width is not None:
        return "given a caption"
    return f"given one of {model.num_classes:,} classes" if model.num_classes else "given nothing"


def _usage(manifest: Manifest, inputs: Mapping[str, Manifest], store_uri: str) -> str:
    tokenizer, model = inputs["tokenizer"], ModelSummary.read(manifest).model
    if model.text_width is not None:
        labels = (
            "from enat import TextCondition\nfrom enat.text import load_text_encoder\n\n"
            'features = load_text_encoder("folder of the text encoder").encode(["what the image shows"])\n'
            "labels = TextCondition(features.hidden, features.pooled)"
        )
    else:
        labels = f"labels = torch.arange({min(model.num_classes, 8)})" if model.num_classes else "labels = torch.tensor([0])"
    return f"""The weights are not among the files of this version. They are in the artifact store, under the key above. Set
`AWS_ENDPOINT_URL` for an S3 service other than AWS. Files are checked against their sha256 when they are fetched.

```python
import torch
from enat import SamplerConfig, sample
from enat.checkpoint import load_enat, load_vqgan
from pipelines.artifacts.open import open_store

store = open_store({without_credentials(store_uri)!r})
trained = store.read_manifest({manifest.stage!r}, {manifest.key!r})
tokenizer = store.read_manifest({tokenizer.stage!r}, {tokenizer.key!r})
model = load_enat(store.fetch(trained, "model.safetensors"))
vqgan = load_vqgan(store.fetch(tokenizer, "vqgan.safetensors"))

{labels}
codes = sample(model, labels, {_sampler_call(_sampler(manifest))}, seeds=range(len(labels)))
images = vqgan.decode(codes.view(-1, {model.grid_size}, {model.grid_size}))  # float (B, 3, H, W) in [0, 1]
```"""


def _model(manifest: Manifest) -> str:
    preset = manifest.config["model"]["preset"]
    return table([*([("preset", preset)] if preset else []), *dataclasses.asdict(ModelSummary.read(manifest).model).items()])


def _data(manifest: Manifest, inputs: Mapping[str, Manifest], title: str | None) -> str:
    tokenizer, token_map = _tokenizer_config(inputs), inputs.get("token_map")
    rows = [
        ("dataset", trained_on(manifest, title)),
        ("images", f"{token_map.metrics['rows']:,.0f}" if token_map else "not known"),
        ("resolution", f"{tokenizer.resolution} px"),
        ("codes of an image", f"{tokenizer.grid_size} x {tokenizer.grid_size}, out of {tokenizer.codebook_size:,}"),
        *((f"{name.replace('_', ' ')} digest", source.digest) for name, source in inputs.items()),
    ]
    return table(rows)


def _training(manifest: Manifest) -> str:
    if ModelSummary.read(manifest).is_imported:
        return "The weights were trained elsewhere. Their publisher describes the recipe and the metrics."
    metrics = [(name, f"{value:,.6g}") for name, value in manifest.metrics.items() if name.startswith("final/")]
    recipe = [(name, value) for name, value in manifest.config.items() if name not in _NOT_RECIPE and value is not None]
    return f"{table(recipe)}\n\nAt the end of it:\n\n{table(metrics)}" if metrics else table(recipe)


def _cost(manifest: Manifest, inputs: Mapping[str, Manifest]) -> str:
    sampler, provenance = _sampler(manifest), manifest.provenance
    cost = generation_cost(ModelSummary.read(manifest).model, sampler, _tokenizer_config(inputs))
    most = "at most " if sampler.entropy_bound is not None else ""
    rows = [
        ("making it, worker-seconds", f"{provenance['worker_seconds']:,.1f}"),
        ("making it, device-seconds", f"{provenance['device_seconds']:,.1f}"),
        ("one image, as published code computes it", f"{cost.total_macs / 1e9:,.4g} GMACs"),
        ("one image, as this code does", f"{cost.executed_total_macs / 1e9:,.4g} GMACs"),
    ]
    return (
        f"{table(rows)}\n\nAn image is {most}{sampler.num_steps} steps at guidance {sampler.guidance_scale:g}, and the tokenizer's "
        "decoder. A MAC is one multiply-accumulate of a linear layer, convolution or attention product; they are counted from the "
        "architecture."
    )


def _limits(manifest: Manifest, inputs: Mapping[str, Manifest], title: str | None, *, has_scores: bool) -> str:
    summary, resolution = ModelSummary.read(manifest), _tokenizer_config(inputs).resolution
    measured = (
        "The scores hold for the stated sampler and protocol only."
        if has_scores
        else "The numbers on this card are from training. The stage evaluate measures the quality of samples, for one sampler at a "
        "time."
    )
    learned = "the data it was published for" if summary.is_imported else escaped(trained_on(manifest, title))
    return "\n".join(
        [
            f"- It makes images of {resolution} px like those of {learned}, {_condition(manifest)}, with the biases of that data. "
            "Nothing filters what it makes.",
            "- It generates codes of the tokenizer named above; the decoder of another tokenizer turns them into noise.",
            f"- {measured} Whether the model reproduces training images was not examined.",
        ]
    )


def _sampler(manifest: Manifest) -> SamplerConfig:
    """The sampler of the previews in training."""
    return SamplerConfig(**manifest.config["sampler"])


def _sampler_call(sampler: SamplerConfig) -> str:
    """As Python code, without fields at their defaults."""
    usual = SamplerConfig()
    shown = ("num_steps", "guidance_scale", "sampling_temperature", "remask_temperature")
    values = [(name, value) for name, value in vars(sampler).items() if name in shown or value != getattr(usual, name)]
    return f"SamplerConfig({', '.join(f'{name}={value!r}' for name, value in values)})"


def _tokenizer_config(inputs: Mapping[str, Manifest]) -> VQGANConfig:
    return TokenizerSummary.read(inputs["tokenizer"]).config


def _short_count(count: int) -> str:
    """1_300_000 -> "1.3m", 574_300_000 -> "574m"."""
    for unit, size in (("b", 10**9), ("m", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 9.95 * size else f"{count / size:.0f}{unit}"
    return str(count)


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """A Markdown table of names and values, escaped."""
    return "\n".join(["| | |", "|---|---|", *(f"| {escaped(name)} | {escaped(_text(value))} |" for name, value in rows)])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def escaped(text: object) -> str:
    """On one line, with nothing that Markdown would take for its own: a dataset may be called anything."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))
