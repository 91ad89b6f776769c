"""Inspection of an artifact: found by the beginning of its key, described by its manifest, shown as pictures."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from enat.images import to_uint8
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data import inspection
from pipelines.data.dataset import _opened
from pipelines.data.token_map import QUARANTINE, write_quarantine
from pipelines.storage.base import StorageError
from pipelines.workflow import driver

KEYS = ["abc1" + "0" * 60, "abc2" + "0" * 60, "def0" + "0" * 60]


def _commit(store: ArtifactStore, stage: str, key: str, folder: Path, **fields: Any) -> Manifest:
    (folder / "file.txt").write_text("content")
    provenance = {"created": "2026-01-01T00:00:00", "code": "0.0", "seconds": 1.0, "worker_seconds": 2.0, "device_seconds": 0.0}
    files = (store.put_file(stage, key, "file.txt", folder / "file.txt"),)
    values: dict[str, Any] = {"stage_version": 1, "config": {}, "inputs": {}, "files": files, "provenance": provenance}
    return store.commit(Manifest(stage=stage, key=key, **{**values, **fields}))


def _shown(store: ArtifactStore, manifest: Manifest) -> str:
    text = io.StringIO()
    Console(file=text, width=1000).print(inspection.facts_table(store, manifest), highlight=False)
    return text.getvalue()


# Finding -------------------------------------------------------------------------------------------------------------------


# Showing -------------------------------------------------------------------------------------------------------------------


def test_facts_of_a_manifest_are_shown(local_store, tmp_path):
    source = {"stage": "train", "key": KEYS[0], "digest": "d" * 64}
    manifest = _commit(
        local_store,
        "generate",
        KEYS[1],
        tmp_path,
        inputs={"model": source},
        summary={"names": ["[/red]a", "[b]"], "info": {"rows": 3}, "long": "x" * 1000},
        metrics={"loss": 0.125, "images": 1_000_000.0},
    )
    name, digest, place, *lines = _shown(local_store, manifest).splitlines()
    assert (name, digest) == (f"generate/{KEYS[1]}", f"digest {manifest.digest}")
    assert place == str(Path(local_store.uri) / "generate" / KEYS[1])
    shown = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in lines}
    assert shown["made"] == "2026-01-01T00:00:00 by 0.0 in 1.0 s" and shown["from"].split() == ["model", f"train/{KEYS[0][:12]}"]
    assert shown["names"] == '["[/red]a", "[b]"]', "what looks like markup is shown as it is"
    assert shown["info"] == "rows 3" and shown["loss"] == "0.125" and shown["images"] == "1e+06"
    assert (
        shown["files"] == "1, 7 bytes: file.txt" and "x" * 100 in shown["long"] and "x" * 500 not in _shown(local_store, manifest)
    )


# A token map ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(make_image_folder, tmp_path_factory):
    """Six photographs, and two files that are none."""
    root = make_image_folder(tmp_path_factory.mktemp("inspected") / "images", per_class=3)
    (root / "china" / "[bold]text.jpg").write_text("no image")
    (root / "flower" / "empty.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def token_map(ray_cluster, tiny_nodes, make_session, images, tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("store")))
    overrides = (f"dataset.path={images}", "token_map.max_quarantine_share=0.5", "token_map.shard_size=3")
    return store, driver.execute(tiny_nodes(*overrides, until="token_map"), make_session(store))[-1].manifest


@pytest.mark.slow
def test_token_map_is_shown_with_its_codebook_and_what_is_quarantined(token_map):
    store, manifest = token_map
    text = _shown(store, manifest)
    assert f"{manifest.metrics['code_usage']:.1%} of 32 codes in use, perplexity {manifest.metrics['code_perplexity']:.1f}" in text
    assert "china/[bold]text.jpg: it is neither JPEG nor PNG" in text and "flower/empty.png: it is empty" in text
    size = sum(record.size for record in manifest.files)
    assert f"{size / 6:,.1f}" in text and manifest.inputs["tokenizer"]["key"][:12] in text


def test_many_quarantined_images_are_shown_in_part(local_store, tmp_path):
    write_quarantine(tmp_path / QUARANTINE, [(f"{number:02d}.jpg", "it is empty") for number in range(12)])
    file = local_store.put_file("token_map", KEYS[0], QUARANTINE, tmp_path / QUARANTINE)
    summary = summary_of("token_map", info={"codebook_size": 32}, rows=0)
    metrics = {"code_usage": 0.0, "code_perplexity": 1.0}
    manifest = _commit(local_store, "token_map", KEYS[0], tmp_path, files=(file,), summary=summary, metrics=metrics)
    text = _shown(local_store, manifest)
    assert "04.jpg: it is empty" in text and "05.jpg" not in text and "and 7 more in quarantine.parquet" in text
    with pytest.raises(ValueError, match=r"token_map/abc100000000 has no rows to show"):
        inspection.write_contact_sheet(local_store, manifest, tmp_path / "sheet.png", 4)


def _tiles(path: Path, count: int) -> np.ndarray:
    """uint8 (count, 96, 96, 3), row by row; gaps are two pixels wide."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    return np.stack([picture[top : top + 96, left : left + 96] for top, left in _places(count)])


def _places(count: int) -> list[tuple[int, int]]:
    return [(2 + 98 * (number // 16), 2 + 98 * (number % 16)) for number in range(count)]


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """(R, H, W, 3) of 16 px, each pixel six times six."""
    return pixels.repeat(6, axis=1).repeat(6, axis=2)


def _expected(root: Path, vqgan: Any) -> tuple[np.ndarray, np.ndarray]:
    """Crops of the six photographs in order, and what their codes decode to: uint8 (6, 16, 16, 3)."""
    from enat.images import center_crop, decode_image

    files = sorted(path for path in root.rglob("0*.*") if path.is_file())
    crops = np.stack([np.asarray(center_crop(decode_image(path.read_bytes()), 16)) for path in files])
    codes = vqgan.encode(torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255)
    return crops, to_uint8(vqgan.decode(codes)).permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
def test_contact_sheet_shows_each_image_beside_what_its_codes_decode_to(token_map, images, vqgan, tmp_path):
    inspection.write_contact_sheet(*token_map, tmp_path / "deep" / "sheet.png", 24)
    assert (tmp_path / "deep" / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert Image.open(tmp_path / "deep" / "sheet.png").size[1] == 96 + 4
    tiles = _tiles(tmp_path / "deep" / "sheet.png", 12)
    crops, decoded = _expected(images, vqgan)
    np.testing.assert_array_equal(tiles[0::2], _enlarged(crops))
    assert abs(tiles[1::2].astype(int) - _enlarged(decoded)).max() <= 1, "one image at a time may round otherwise than six"
    assert (tiles[0::2] != tiles[1::2]).any()


@pytest.mark.slow
def test_fewer_images_are_evenly_spaced_and_the_first_and_last_are_among_them(token_map, images, vqgan, tmp_path):
    inspection.write_contact_sheet(*token_map, tmp_path / "sheet.png", 3)
    np.testing.assert_array_equal(_tiles(tmp_path / "sheet.png", 6)[0::2], _enlarged(_expected(images, vqgan)[0][[0, 2, 5]]))


@pytest.mark.slow
def test_source_image_that_no_longer_exists_is_black(token_map, images, vqgan, tmp_path):
    """If the folder was moved, and if a single image was removed."""
    decoded = _enlarged(_expected(images, vqgan)[1])
    moved = shutil.move(images, tmp_path / "elsewhere")
    _opened.cache_clear()  # as in a new process
    try:
        inspection.write_contact_sheet(*token_map, tmp_path / "none.png", 6)
    finally:
        shutil.move(moved, images)
    tiles = _tiles(tmp_path / "none.png", 12)
    assert not tiles[0::2].any() and abs(tiles[1::2].astype(int) - decoded).max() <= 1
    first = min(path for path in images.rglob("0*.*"))
    kept = first.read_bytes()
    first.unlink()
    try:
        inspection.write_contact_sheet(*token_map, tmp_path / "one.png", 6)
    finally:
        first.write_bytes(kept)
    tiles = _tiles(tmp_path / "one.png", 12)
    assert not tiles[0].any() and all(tile.any() for tile in tiles[2::2])


@pytest.mark.slow
def test_contact_sheet_needs_a_token_map_and_its_tokenizer(token_map, local_store, tmp_path):
    store, manifest = token_map
    gone = {**manifest.inputs, "tokenizer": {**manifest.inputs["tokenizer"], "key": KEYS[0]}}
    with pytest.raises(StorageError, match=r"no longer has tokenizer/abc100000000, the tokenizer"):
        inspection.write_contact_sheet(store, dataclasses.replace(manifest, inputs=gone), tmp_path / "sheet.png", 6)
    other = _commit(local_store, "train", KEYS[0], tmp_path)
    with pytest.raises(ValueError, match=r"a contact sheet shows a token map; train/abc100000000"):
        inspection.write_contact_sheet(local_store, other, tmp_path / "sheet.png", 6)
    assert not (tmp_path / "sheet.png").exists()


def test_artifact_is_found_by_the_beginning_of_its_key(local_store, tmp_path):
    for stage, key in (("train", KEYS[0]), ("train", KEYS[1]), ("generate", KEYS[0]), ("report", KEYS[2])):
        _commit(local_store, stage, key, tmp_path)
    names = {"def": "report/def0", "abc2": "train/abc2", "generate/": "generate/abc1", f"train/{KEYS[0]}": "train/abc1"}
    for name, found in names.items():
        manifest = inspection.find(local_store, name)
        assert f"{manifest.stage}/{manifest.key[:4]}" == found
    for name in ("abcd", "train/def", "trai/abc1", "bc1"):
        with pytest.raises(StorageError, match=rf"{local_store.uri} .*begins with {name}"):
            inspection.find(local_store, name)
    for name, among in (("abc1", "generate/abc100000000, train/abc1"), ("train/abc", "train/abc1.*, train/abc2")):
        with pytest.raises(StorageError, match=rf"{name} .*{among}"):
            inspection.find(local_store, name)
