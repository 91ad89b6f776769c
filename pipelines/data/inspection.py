"""The contents of an artifact: its facts as a table, and a token map beside the images it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text

from enat.checkpoint import load_vqgan
from enat.images import ImageError, make_grid, png_bytes, to_uint8
from pipelines.artifacts.inventory import find
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import INDEX, Dataset
from pipelines.data.sources.config import DatasetConfig
from pipelines.data.token_map import QUARANTINE, TokenMapSummary, read_codes
from pipelines.formatting import one_line, printable
from pipelines.storage.base import StorageError
from pipelines.workflow import config as configuration

__all__ = ["contact_sheet", "facts_table", "find", "input_of", "write_contact_sheet"]

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")  # the first characters are enough to name it
_SHOWN_QUARANTINED = 5
_SHOWN_FILES = 6
_COLUMNS = 8  # pairs of a source image and its decoded codes in a row of a contact sheet
_MIN_PIXELS = 96  # smaller images are enlarged on a contact sheet


def facts_table(store: ArtifactStore, manifest: Manifest) -> Group:
    """Names and values. Hashes are on lines of their own, which are not broken."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    more = _token_map_facts(store, manifest) if manifest.stage == "token_map" else ()
    for name, value in (*_facts(manifest), *more):
        table.add_row(one_line(name), one_line(_HASH.sub(r"\1", value)))
    title = Text(printable(f"{manifest.stage}/{manifest.key}"), style="bold", no_wrap=True, overflow="ignore")
    others = (f"digest {manifest.digest}", store.place(manifest.stage, manifest.key))
    return Group(title, *(Text(printable(line), no_wrap=True, overflow="ignore") for line in others), table)


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    provenance = manifest.provenance
    if {"created", "code", "seconds", "worker_seconds", "device_seconds"} <= provenance.keys():
        yield "made", f"{provenance['created']} by {provenance['code']} in {provenance['seconds']:.1f} s"
        yield "cost", f"{provenance['worker_seconds']:.1f} worker-seconds, {provenance['device_seconds']:.1f} device-seconds"
    for name, source in manifest.inputs.items():
        yield f"from {name}", f"{source['stage']}/{source['key'][:12]}"
    for name, value in manifest.summary.items():
        yield name, _short(value)
    for name, metric in manifest.metrics.items():
        yield name, f"{metric:,.6g}"
    files = [*manifest.files, *manifest.records]
    size = sum(file.size for file in files)
    more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
    yield "files", f"{len(files)}, {size:,} bytes: {', '.join(file.name for file in files[:_SHOWN_FILES])}{more}"


def _token_map_facts(store: ArtifactStore, manifest: Manifest) -> Iterator[tuple[str, str]]:
    summary = TokenMapSummary.read(manifest)
    info, rows = summary.info, summary.rows
    size = sum(file.size for file in manifest.files)
    yield "classes", str(len(summary.class_names))
    usage, perplexity = manifest.metrics["code_usage"], manifest.metrics["code_perplexity"]
    yield "codebook", f"{usage:.1%} of {info.codebook_size} codes in use, perplexity {perplexity:.1f}"
    yield "bytes per row", f"{size / rows:,.1f}" if rows else "-"
    quarantined = pq.read_table(store.fetch(manifest, QUARANTINE)).to_pylist()
    for row in quarantined[:_SHOWN_QUARANTINED]:
        yield "quarantined", f"{row['key']}: {row['reason']}"
    if len(quarantined) > _SHOWN_QUARANTINED:
        yield "", f"and {len(quarantined) - _SHOWN_QUARANTINED} more in {QUARANTINE}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {inner}" for name, inner in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]}…"


def write_contact_sheet(store: ArtifactStore, manifest: Manifest, path: Path, num_images: int) -> None:
    """Write contact_sheet as a PNG."""
    sheet = contact_sheet(store, manifest, num_images)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(sheet))


def contact_sheet(store: ArtifactStore, manifest: Manifest, num_images: int) -> Image.Image:
    """Draw evenly spaced rows of a token map: each source image, and to its right the image decoded from its codes.

    A source image that no longer exists is black. Raises ValueError for artifacts of other stages.
    """
    if manifest.stage != "token_map":
        raise ValueError(f"a contact sheet shows a token map; {manifest.stage}/{manifest.key[:12]} is not one")
    if num_images < 1:
        raise ValueError(f"a contact sheet of {num_images} images is empty; ask for at least 1")
    summary = TokenMapSummary.read(manifest)
    if not summary.rows:
        raise ValueError(f"token_map/{manifest.key[:12]} has no rows to show")
    info = summary.info
    rows = np.unique(np.linspace(0, summary.rows - 1, num_images).round().astype(int)).tolist()
    keys, codes = read_codes(store, manifest, rows)
    vqgan = load_vqgan(store.fetch(input_of(store, manifest, "tokenizer"), "vqgan.safetensors"))
    grid = torch.from_numpy(codes.astype(np.int64)).view(-1, info.grid_size, info.grid_size)
    decoded = torch.cat([to_uint8(vqgan.decode(one)) for one in grid.split(1)])
    sources = torch.from_numpy(_source_images(store, manifest, keys, info.resolution))
    pairs = torch.stack([sources, decoded], dim=1).flatten(0, 1)
    return make_grid(pairs, columns=2 * _COLUMNS, scale=max(1, _MIN_PIXELS // info.resolution))


def _source_images(store: ArtifactStore, manifest: Manifest, keys: list[str], resolution: int) -> np.ndarray:
    """uint8 (R, 3, H, W)"""
    from omegaconf import OmegaConf

    index = input_of(store, manifest, "dataset")
    config = configuration.merge(DatasetConfig, [("the artifact's config", OmegaConf.create(dict(index.config)))])
    dataset = Dataset(config, store, index)
    all_keys = pq.read_table(store.fetch(index, INDEX), columns=["key"])["key"]
    images = np.zeros((len(keys), 3, resolution, resolution), np.uint8)
    for slot, key in enumerate(keys):
        row = pc.index(all_keys, key).as_py()
        try:
            images[slot] = next(iter(dataset.read(row, row + 1))).pixels(resolution)
        except (ImageError, ValueError):
            continue  # moved or changed: its place stays black
    return images


def input_of(store: ArtifactStore, manifest: Manifest, name: str) -> Manifest:
    """The manifest of an input. Raises StorageError if the store no longer has it."""
    found = store.read_input(manifest, name)
    if found is None:
        artifact = f"{manifest.inputs[name]['stage']}/{manifest.inputs[name]['key'][:12]}"
        raise StorageError(f"the store {store.uri} no longer has {artifact}, the {name} that this artifact was made from")
    return found
