"""`enat sample`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import JSON, console, echo_json, s3_options, split_overrides

if TYPE_CHECKING:
    from rich.console import Console

    from enat.sampler_config import SamplerConfig
    from enat.text import TextEncoder
    from pipelines.sampling.models import Generator
    from pipelines.storage.s3_client import S3Config

_DEFAULT_STORE = "runs/store"
_DEFAULT_IMAGES = 16


@click.command()
@click.argument("arguments", nargs=-1, metavar="[MODEL] [FIELD=VALUE]...")
@click.option("--labels", help='Classes, in order: "207,360-362 x2,golden retriever x4". xN repeats the item before it.')
@click.option(
    "--caption", "--captions", "captions", multiple=True, metavar="TEXT", help="A caption, for models of captions. Repeatable."
)
@click.option("--text-encoder", help="The CLIP text model of --caption: a folder, s3:// or hf://owner/name.")
@click.option("-n", "--num-images", type=click.IntRange(1, 1_000_000), help="[default: the number of labels or captions, or 16]")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Sample i has the same seed as in stage generate.",
)
@click.option("--inpaint", type=click.Path(path_type=Path), metavar="IMAGE", help="Generate a part of this image again.")
@click.option(
    "--box", metavar="LEFT,TOP,RIGHT,BOTTOM", help="The part for --inpaint, in pixels of the centre crop at the model's resolution."
)
@click.option(
    "--keep", type=click.Choice(["outside", "inside"]), default="outside", show_default=True, help="Which side of the box to keep."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--batch-size", default=64, show_default=True, type=click.IntRange(1, 65536), help="Number of images computed at once."
)
@click.option(
    "--images-per-pass",
    default=32,
    show_default=True,
    type=click.IntRange(1, 65536),
    help="Same as generate.forward_batch_size. Equal values give the codes of stage generate. 1 is faster for a few images on CPU.",
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--cuda-graph", is_flag=True, help="Run the sampler as one CUDA graph: faster for small models on a GPU.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("samples"), show_default=True, help="A folder.")
@click.option("--overwrite", is_flag=True, help="Replace earlier samples in the folder.")
@click.option("--grid/--no-grid", default=True, help="grid.png")
@click.option("--images/--no-images", default=True, help="images/000000.png and so on")
@click.option("--steps/--no-steps", default=True, help="steps.png: the first eight images, step by step")
@click.option("--gif/--no-gif", default=True, help="progress.gif: the same as an animation")
@click.option("--npz/--no-npz", default=True, help="samples.npz: uint8 (N, H, W, 3), the format of ADM's evaluator")
@click.option("--store", help=f"A folder or s3://bucket/prefix. [default: {_DEFAULT_STORE}]")
@click.option("--tracking-uri", help="MLflow's URI, for a MODEL given by name. [default: MLFLOW_TRACKING_URI, or runs/mlflow.db]")
@click.option("--weights", metavar="FILE", help="Weights of a generator, instead of MODEL. Needs --vqgan.")
@click.option("--preset", help="Architecture of published --weights: enat-s, enat-b, enat-l or enat-xl.")
@click.option("--vqgan", metavar="FILE", help="Weights of its tokenizer.")
@click.option("--vqgan-preset", help="Architecture of a published --vqgan. [default: vqgan-256]")
@s3_options
@JSON
def sample(arguments: tuple[str, ...], s3: S3Config, as_json: bool, **options: Any) -> None:
    """Generate images with one model on this machine.

    MODEL is a prefix of a model's key ([train/]KEY), or a registered model: name@alias. FIELD=VALUE replaces a value of its
    sampler, for example num_steps=12. A list with a value for each step replaces the scalar. samples.json, beside the images,
    records how they were made.
    """
    from rich.progress import Progress

    from pipelines.sampling import request as sampling_request
    from pipelines.sampling import sample as sampling_sample

    output = _checked_output(options["output"], options["overwrite"])
    outputs = tuple(name for name in sampling_request.OUTPUTS if options[name])
    device = sampling_request.choose_device(options["device"])
    box = _parse_box(options["inpaint"], options["box"])
    terminal = console(stderr=True)
    model, overrides = split_overrides(arguments, "MODEL")
    with terminal.status("loading the model"):
        generator = _load(model, options, s3)
        encoder = _load_encoder(generator, options["captions"], options["text_encoder"], s3)
    num_classes = generator.model.config.num_classes
    labels = (
        sampling_request.parse_labels(options["labels"], num_classes, generator.class_names)
        if options["labels"] is not None
        else ()
    )
    region = sampling_request.read_region(options["inpaint"], box, options["keep"], generator) if box is not None else None
    request = sampling_request.SampleRequest(
        num_images=options["num_images"] or len(labels) or len(options["captions"]) or _DEFAULT_IMAGES,
        sampler=_sampler(generator, overrides),
        labels=labels,
        captions=options["captions"],
        seed=options["seed"],
        device=device,
        batch_size=options["batch_size"],
        images_per_pass=options["images_per_pass"],
        is_bf16=options["precision"] == "bf16",
        is_graphed=options["cuda_graph"],
        outputs=outputs,
        region=region,
    )
    sampling_request.check_request(request, generator)
    _clear(output)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("sampling", total=request.num_images)
        record = sampling_sample.make_samples(generator, request, output, encoder, lambda count: progress.advance(task, count))
    if as_json:
        echo_json({**record, "folder": str(output)})
    else:
        _show(record, output, console())


def _load(model: str | None, options: Mapping[str, Any], s3: S3Config) -> Generator:
    from pipelines.artifacts.open import open_existing, open_store
    from pipelines.sampling import models
    from pipelines.tracking import run as tracking

    if options["weights"] is not None:
        if model is not None or options["vqgan"] is None:
            raise click.UsageError("--weights replaces MODEL and needs --vqgan, the weights of its tokenizer")
        presets = {name: options[name] for name in ("preset", "vqgan_preset")}
        return models.from_files(options["weights"], options["vqgan"], **presets, s3=s3)
    if stray := [f"--{name.replace('_', '-')}" for name in ("preset", "vqgan", "vqgan_preset") if options[name] is not None]:
        raise click.UsageError(f"{stray[0]} needs --weights")
    if model is None:
        raise click.UsageError("name a MODEL by a prefix of its key or as name@alias, or give --weights and --vqgan")
    if models.is_registered(model):
        uri = tracking.resolve_uri(tracking.TrackingConfig(uri=options["tracking_uri"]), Path("runs"))
        return models.from_registry(uri, model, open_store(options["store"], s3) if options["store"] else None, s3)
    return models.from_artifact(open_existing(options["store"] or _DEFAULT_STORE, s3), model)


def _load_encoder(generator: Generator, captions: tuple[str, ...], place: str | None, s3: S3Config) -> TextEncoder | None:
    from enat.text import load_text_encoder
    from pipelines.storage.external import folder_digest, local_folder

    if not captions or generator.model.config.text_width is None:
        return None
    if place is None:
        made_with = f"; it was trained with {generator.captions['encoder']}" if generator.captions else ""
        raise ValueError(f"--caption needs --text-encoder, the CLIP text model that this model was trained with{made_with}")
    folder = local_folder(place, "--text-encoder", s3)
    if generator.captions and folder_digest(folder) != generator.captions["encoder_digest"]:
        raise ValueError(f"--text-encoder {place} is not the one this model was trained with, {generator.captions['encoder']}")
    return load_text_encoder(folder)


def _sampler(generator: Generator, overrides: list[str]) -> SamplerConfig:
    """The sampler of the model, with the overrides of the command line."""
    from enat.sampler_config import SamplerConfig
    from pipelines.sampling.presets import with_preset
    from pipelines.workflow import config as configuration
    from pipelines.workflow.config import PRESET

    if not overrides:
        return generator.sampler
    layers, base = configuration.read_overrides(overrides), generator.sampler
    for source, name in [(source, values.pop(PRESET)) for source, values in layers if PRESET in values]:
        try:
            base = replace(base, **with_preset({PRESET: name}, Path()))
        except ValueError as error:
            raise configuration.ConfigError(f"{source}: {error}") from error
    given = {str(name): value for _, values in layers for name, value in values.items()}
    own = base.values_beside(given)
    return configuration.merge(SamplerConfig, [(f"the model's sampler with {' '.join(overrides)}", own), *layers])


def _parse_box(image: Path | None, box: str | None) -> tuple[int, ...] | None:
    if (image is None) != (box is None):
        raise click.UsageError("--inpaint and --box must be given together: the image, and the part of it to generate")
    if box is None:
        return None
    if not re.fullmatch(r"\s*\d{1,5}\s*(,\s*\d{1,5}\s*){3}", box):
        raise click.UsageError(f"--box {box} is not left,top,right,bottom in pixels")
    return tuple(map(int, box.split(",")))


def _checked_output(folder: Path, overwrite: bool) -> Path:
    """The folder. Raises ValueError if it is not a folder, or if it is not empty: samples must not be mixed or lost."""
    try:
        holds = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ValueError(f"--output {folder} is not a readable folder ({error.strerror})") from error
    if holds and not (overwrite and "samples.json" in holds):
        advice = "use --overwrite to replace earlier samples" if "samples.json" in holds else "give another folder"
        raise ValueError(f"--output {folder} already contains {holds[0]}; {advice}")
    return folder


def _clear(folder: Path) -> None:
    """Remove only the files that an earlier call may have written."""
    from pipelines.sampling import sample as sampling_sample

    numbered = (path for path in (folder / sampling_sample.FOLDER).glob("*.png") if re.fullmatch(r"\d{6,}", path.stem))
    for path in (*(folder / name for name in sampling_sample.FILES), *numbered):
        path.unlink(missing_ok=True)


def _show(record: Mapping[str, Any], folder: Path, terminal: Console) -> None:
    model, samples, sampler = record["model"], record["samples"], record["sampler"]
    stage, slash, key = model.get("artifact", "").partition("/")
    name = model.get("registered") or f"{stage}{slash}{key[:12]}" or model["weights"]
    asked = [str(sample.get("caption", sample.get("class", sample.get("label")))) for sample in samples]
    different = list(dict.fromkeys(asked))
    shown = ", ".join(different[:8]) + (f" and {len(different) - 8} more" if len(different) > 8 else "")
    lines = {
        "model": f"{name}, {record['parameters']:,} parameters",
        "of": shown,
        "sampler": f"{_settings(sampler)}, {record['precision']}, seed {record['seed']}",
        "took": f"{record['seconds']:.1f} s on {record['device']}, {record['images_per_second']:.3g} images/s",
        "files": f"{folder}/ {', '.join(record['files'])}",
    }
    first = f"{len(samples)} images of {record['resolution']} x {record['resolution']} pixels"
    terminal.print(f"[green]✓[/] {first}", highlight=False)
    for label, value in lines.items():
        terminal.print(f"{label:<9}{value}", highlight=False, markup=False, soft_wrap=True)


def _settings(sampler: Mapping[str, Any]) -> str:
    """Steps, guidance, and all settings with several values, which are None or the whole interval if they are not set."""
    given = {name: values for name, values in sampler.items() if isinstance(values, list) and values != [0.0, 1.0]}
    lists = {name: " ".join(f"{value:g}" for value in values) for name, values in given.items()}
    guidance = lists.pop("guidance_scales", None) or f"{sampler['guidance_scale']:g}"
    others = [f"{name.replace('_', ' ')} {values}" for name, values in lists.items()]
    return ", ".join([f"{sampler['num_steps']} steps", f"guidance {guidance}", *others])
