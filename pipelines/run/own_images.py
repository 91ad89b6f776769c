"""A config for a folder of images: what the folder holds, and a commented YAML file sized for the machine.

On CPUs a small tokenizer, model and few steps. On GPUs the published architectures, trained on these images.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from enat.config import VQGANConfig
from enat.images import ImageError, decode_image
from pipelines.cluster.hardware import Machines
from pipelines.data.image_sets import kinds_in
from pipelines.data.sources import names
from pipelines.data.sources.base import Entry, Findings, Source
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.data.sources.parquet import ParquetSource
from pipelines.formatting import printable, show_count
from pipelines.storage.base import Folder
from pipelines.storage.open import open_folder
from pipelines.workflow.config import ConfigError

_NOUNS = {"folder": "image", "tar": "tar file", "parquet": "Parquet file"}
_LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")  # names that dataset hubs use, the usual one first
_TRIED = 8  # images that are decoded
_LEAST, _MOST = 16, 512  # resolution
_PUBLISHED_FROM = 128  # resolution from which on a GPU takes the published tokenizer, whose codes stand for 16 x 16 px
_GRID = 8  # codes along one side that small tokenizers are built for, at least
_NAMED = 10  # classes that the config names
_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """What a folder holds. class_names: by label; empty if images have no labels.   num_captions: of all images."""

    dataset: DatasetConfig
    num_images: int
    class_names: tuple[str, ...] = ()
    num_captions: int = 0


# What the folder holds ------------------------------------------------------------------------------------------------------


def find_images(path: str, *, needs_classes: bool = False) -> OwnImages:
    """Determine the layout of a folder or bucket, and list and count its images. Some of them are decoded.

    needs_classes: raises ValueError if the images have no classes. Raises ValueError also for a folder without images that can be
    read, or with several kinds of them.
    """
    if "${" in path:
        raise ConfigError(f"{path} contains '${{', which a config takes for a reference to another key; rename the folder")
    folder = open_folder(path)
    folder.entries()  # raises for a folder that may not be read, which list() would take for an empty one
    if not (kinds := kinds_in(folder)):
        raise ConfigError(f"{path} holds no images, tar files or Parquet files; name the folder that holds them")
    if len(kinds) > 1:
        found = " and ".join(show_count(count, _NOUNS[kind]) for kind, count in kinds.items())
        raise ConfigError(f"{path} holds {found}; name a folder that holds one kind of them")
    dataset = _dataset(path, folder, next(iter(kinds)))
    source = open_source(dataset)
    entries = [entry for unit in source.units() for entry in source.scan(unit, Findings())]
    if not entries:
        raise ConfigError(f"{path} holds no images, only files without any; name the folder that holds them")
    _check_decodable(path, source, entries)
    largest = max(entry.label for entry in entries)
    class_names = tuple(source.known_classes() or map(str, range(largest + 1))) if largest >= 0 else ()
    if needs_classes and not class_names:
        raise ConfigError(f"{path} has no classes: {_WANTED[dataset.kind]}; do so, or leave --classes out")
    return OwnImages(
        dataset=dataset, num_images=len(entries), class_names=class_names, num_captions=sum(len(each.captions) for each in entries)
    )


_WANTED = {  # what gives images classes, by kind
    "images": "put each image into a folder named after its class, at least two of them and no image beside them",
    "image_folder": "put each image into a folder named after its class",
    "tar": "write the class number of <key>.jpg into <key>.cls",
    "parquet": f"write class numbers into an integer column named {' or '.join(_LABEL_COLUMNS[:2])}",
}


def _dataset(path: str, folder: Folder, kind: str) -> DatasetConfig:
    """The layout of the files, with the split for training if they are of several."""
    name = printable(path.rstrip("/").rpartition("/")[2]) or None
    name = None if name in (None, ".", "..") else name
    if kind == "folder":
        inside = folder.folders()
        split = "train" if names.are_several(inside) else None
        parts = names.folder_of_split(folder, split) + "/" if split is not None else ""
        images = [file.name.removeprefix(parts) for file in folder.list(parts) if names.is_image(file.name)]
        classes = {name.partition("/")[0] for name in images}
        has_classes = all("/" in name for name in images) and len(classes) > 1
        return DatasetConfig(kind="image_folder" if has_classes else "images", name=name, path=path, split=split)
    splits = {names.split_of(file.name) for file in names.own_files(folder, (f".{kind}",))} - {None}
    dataset = DatasetConfig(kind=kind, name=name, path=path, split="train" if len(splits) > 1 else None)
    source = open_source(dataset)
    if isinstance(source, ParquetSource):
        integers = source.integer_columns()
        found = next((column for column in _LABEL_COLUMNS if column in integers), "label")
        dataset = replace(dataset, label_column=found)
    return dataset


def _check_decodable(path: str, source: Source, entries: Sequence[Entry]) -> None:
    """Raises ValueError if none of some images, evenly spaced, can be decoded."""
    tried, problem = entries[:: -(-len(entries) // _TRIED)], ""
    for content in source.read(tried):
        try:
            decode_image(content)
            return
        except ImageError as error:
            problem = str(error)
    raise ConfigError(f"none of {show_count(len(tried), 'image')} of {path} can be read ({problem}); JPEG and PNG files can")


# The config -----------------------------------------------------------------------------------------------------------------


def config_text(images: OwnImages, resolution: int, machines: Machines, file: str) -> str:
    """The YAML file. file: its path, for the command at its head. Raises ValueError for a resolution that no tokenizer takes."""
    if not _LEAST <= resolution <= _MOST:
        raise ConfigError(f"--resolution is {resolution}; it must be {_LEAST} to {_MOST}")
    has_gpu, has_classes, dataset = machines.gpu is not None, bool(images.class_names), images.dataset
    tokenizer = _tokenizer(resolution, has_gpu)
    architecture = _architecture(resolution, tokenizer)
    grid = architecture.grid_size
    num_classes = len(images.class_names)
    what = show_count(images.num_images, "image")
    what += f" in {num_classes:,} classes" if has_classes else " without classes"
    given = {"kind": dataset.kind, "name": dataset.name, "path": dataset.path, "split": dataset.split}
    given |= {"label_column": dataset.label_column} if dataset.label_column != "label" else {}
    head = f"""\
# {what} at {resolution} px, from `enat init`: tokenizer, token map, model, samples and scores.
#   command   enat run {printable(file)}
#   hardware  {_hardware(machines)}
#   duration  `enat plan {printable(file)}` predicts it
#   expected  {_expected(has_classes)}
"""
    named = [printable(name) for name in images.class_names[:_NAMED]]
    more = f" and {num_classes - _NAMED:,} more" if num_classes > _NAMED else ""
    classes = f"# classes: {', '.join(named)}{more}\n" if has_classes else ""
    body = _GPU_BODY if has_gpu else _CPU_BODY
    return head + body.format(
        name=_value(run_name(file)),
        classes=classes,
        dataset=_flow(given),
        tokenizer="\n".join(f"  {key}: {_value(value)}" for key, value in tokenizer.items()),
        codes=f"{resolution} x {resolution} pixels -> {grid} x {grid} codes out of {architecture.codebook_size:,}",
        tokenizer_batch=16 if resolution >= _PUBLISHED_FROM else 64,
        gpu_cpus=max(1, round(machines.capacity.total("CPU") // max(1, machines.capacity.total("GPU")))),
        cpus=max(1, round(machines.capacity.total("CPU"))),
        workers=min(2, max(1, round(machines.capacity.total("CPU")))),
        extractor="classifier" if has_classes else "inception",
        extractor_note="trained on the classes" if has_classes else "downloaded once; reference.weights names a file instead",
        guidance="2.0" if has_classes else "1.0",
        num_samples=_SAMPLES if num_classes <= _SAMPLES else num_classes,
        many_samples=max(5000, num_classes),
        judge="\n  judge: svc                # another classifier, which has nothing to do with the extractor"
        if has_classes
        else "",
    )


def run_name(file: str) -> str:
    """A name for the run, from that of its file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip("-._") or "own-images"


def _tokenizer(resolution: int, has_gpu: bool) -> dict[str, Any]:
    if has_gpu and resolution >= _PUBLISHED_FROM:
        return {"preset": "vqgan-512" if resolution > 256 else "vqgan-256", "resolution": resolution}
    halvings = max(1, int(math.log2(resolution / _GRID)))
    values: dict[str, Any] = {
        "preset": "vqgan-small",
        "resolution": resolution,
        "channel_multipliers": [1] * halvings + [2],
    }
    return values | ({"base_channels": 64, "latent_dim": 32, "codebook_size": 1024} if has_gpu else {})


def _architecture(resolution: int, tokenizer: dict[str, Any]) -> VQGANConfig:
    try:
        return VQGANConfig.preset(**{("name" if key == "preset" else key): value for key, value in tokenizer.items()})
    except ValueError as error:
        raise ConfigError(f"--resolution {resolution} does not suit the tokenizer: {error}") from error


def _hardware(machines: Machines) -> str:
    cpus, gpus = round(machines.capacity.total("CPU")), round(machines.capacity.total("GPU"))
    return f"{gpus} x {machines.gpu}, {show_count(cpus, 'CPU core')}" if gpus else f"{show_count(cpus, 'CPU core')}, no accelerator"


def _expected(has_classes: bool) -> str:
    agreement = "class_agreement well above chance, " if has_classes else ""
    return f"samples in the colours of the images, {agreement}better with more images and steps"


def _flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_value(value)}" for key, value in values.items() if value is not None) + "}"


def _value(value: Any) -> str:
    """JSON is YAML. Plain words need no quotes."""
    return (
        value if isinstance(value, str) and re.fullmatch(r"[a-z][a-z_-]*\d*", value) and value not in _WORDS else json.dumps(value)
    )


_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # that YAML does not take for text

_CPU_BODY = """\
name: {name}

{classes}dataset: {dataset}

tokenizer:                   # {codes}
{tokenizer}
  recipe: {{num_steps: 150, batch_size: 32}}   # more steps: sharper images
  execution: {{cpus_per_worker: {cpus}}}

token_map:
  shard_size: 512
  execution: {{num_workers: 1}}

reference:                   # what samples are compared with: these images
  extractor: {extractor}      # {extractor_note}
  num_epochs: 10
  execution: {{cpus_per_worker: 1}}

train:
  model: {{encoder_layers: 4, decoder_layers: 1, embed_dim: 128, num_heads: 4}}
  num_steps: 250             # more steps: better samples
  batch_size: 64
  num_groups: 2
  learning_rate: 1.0e-3
  warmup_steps: 25
  betas: [0.9, 0.99]
  flip: true                 # false if a mirrored image would be wrong, such as one of letters
  cond_drop_prob: 0.1
  ema_decay: 0.98
  execution: {{num_workers: {workers}, checkpoint_every: 100, log_every: 20, sample_every: 100}}

generate:
  num_samples: {num_samples}
  shard_size: 256
  sampler: {{num_steps: 8, guidance_scale: {guidance}, sampling_temperature: 4.0, remask_temperature: 6.0}}
  execution: {{num_workers: 1, worker_batch_size: 256}}

memorization: {{}}             # how near samples come to these images: of few images, copies are likely

evaluate:{judge}
  execution: {{num_workers: 1, worker_batch_size: 256}}
"""

_GPU_BODY = """\
name: {name}

{classes}dataset: {dataset}

tokenizer:                   # {codes}
{tokenizer}
  recipe: {{num_steps: 4000, batch_size: {tokenizer_batch}}}
  # weights: hf://owner/name/vqgan_jax_strongaug.ckpt   # the published tokenizer at 256 and 512 px, instead of training one
  execution: {{gpus_per_worker: 1}}

token_map:
  shard_size: 4096
  precision: tf32
  execution: {{num_workers: all, gpus_per_worker: 1}}

reference:                   # what samples are compared with: these images
  extractor: {extractor}      # {extractor_note}
  precision: tf32
  forward_batch_size: 128
  execution: {{num_workers: all, gpus_per_worker: 1}}

train:
  model: {{preset: enat-s}}    # published sizes: enat-s, enat-b, enat-l, enat-xl
  num_steps: 20000           # more steps: better samples
  batch_size: 256
  num_groups: 16
  warmup_steps: 1000
  precision: bf16
  flip: true                 # false if a mirrored image would be wrong, such as one of letters
  ema_decay: 0.999
  execution: {{num_workers: all, gpus_per_worker: 1, cpus_per_worker: {gpu_cpus}, compile: true, checkpoint_every: 2000}}

generate:
  num_samples: {many_samples}
  sampler: {{num_steps: 8, guidance_scale: {guidance}, sampling_temperature: 6.0, remask_temperature: 1.5}}
  precision: bf16
  forward_batch_size: 128
  execution: {{num_workers: all, gpus_per_worker: 1}}

memorization: {{}}             # how near samples come to these images: of few images, copies are likely

evaluate:{judge}
  precision: tf32
  execution: {{num_workers: all, gpus_per_worker: 1}}
"""
