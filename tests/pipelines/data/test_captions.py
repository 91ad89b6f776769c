"""Caption features: the format on disk, and reading captions in any order."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from enat.text import TextFeatures
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data import captions as data_captions
from pipelines.data.captions import EMPTY, CaptionFeatures, CaptionFeaturesInfo, captions_name, write_captions, write_empty

INFO = CaptionFeaturesInfo(num_captions=23, captions_per_file=5, num_positions=4, width=6, encoder_digest="ab" * 32)


def features(info: CaptionFeaturesInfo = INFO) -> TextFeatures:
    """Of all captions and, last, of the empty one; no value occurs twice."""
    count = info.num_captions + 1
    hidden = torch.arange(count * info.num_positions * info.width).reshape(count, info.num_positions, info.width) - 300
    return TextFeatures(hidden.half(), (hidden[:, 1] + 0.5).half(), torch.arange(count) + 2)


def part(whole: TextFeatures, start: int, stop: int | None) -> TextFeatures:
    return TextFeatures(whole.hidden[start:stop], whole.pooled[start:stop], whole.num_tokens[start:stop])


def write_all(folder: Path, whole: TextFeatures, info: CaptionFeaturesInfo = INFO) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(info.num_files):
        start = number * info.captions_per_file
        stop = start + info.captions_from(start)
        write_captions(folder / captions_name(number), info, start, part(whole, start, stop))
    write_empty(folder / EMPTY, info, part(whole, info.num_captions, None))


@pytest.fixture
def commit(local_store, tmp_path):
    """The files of a folder as an artifact."""

    def commit(folder: Path, key: str = "k", **info: Any) -> Manifest:
        files = tuple(local_store.put_file("captions", key, path.name, path) for path in sorted(folder.iterdir()))
        summary = summary_of("captions", info={**dataclasses.asdict(INFO), **info})
        return local_store.commit(
            Manifest(stage="captions", key=key, stage_version=1, config={}, inputs={}, files=files, summary=summary)
        )

    return commit


@pytest.fixture
def folder(tmp_path):
    write_all(tmp_path / "written", features())
    return tmp_path / "written"


@pytest.fixture
def reader(local_store, commit, folder):
    return CaptionFeatures.open(local_store, commit(folder))


# Format --------------------------------------------------------------------------------------------------------------------


def test_files_have_the_documented_names_tensors_and_header(folder, tmp_path):
    whole = features()
    assert sorted(path.name for path in folder.iterdir()) == [*(captions_name(number) for number in range(5)), EMPTY]
    for number, rows in enumerate([5, 5, 5, 5, 3]):
        arrays, start = load_file(folder / captions_name(number)), 5 * number
        dtypes = {"hidden": np.float16, "pooled": np.float16, "num_tokens": np.int16}
        assert {name: array.dtype for name, array in arrays.items()} == dtypes
        for name in dtypes:
            np.testing.assert_array_equal(arrays[name], getattr(whole, name)[start : start + rows].numpy())
    shapes = {name: (array.dtype.name, array.shape) for name, array in load_file(folder / EMPTY).items()}
    assert shapes == {"hidden": ("float16", (4, 6)), "pooled": ("float16", (6,))}
    for name, start in (("captions-00003.safetensors", 15), (EMPTY, -1)):
        expected = {"start": start, "encoder_digest": "ab" * 32, "format_version": 1}
        assert header_of(folder / name) == {"enat": json.dumps(expected, sort_keys=True)}
    write_all(tmp_path / "again", whole)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), "equal features give equal bytes"


def test_features_that_do_not_fit_are_not_written(tmp_path):
    """Too few captions, a start between files or beyond the end, another dtype, another number of positions."""
    whole = part(features(), 0, 5)
    wrong = [
        (5, part(features(), 0, 4)),
        (3, whole),
        (25, whole),
        (0, dataclasses.replace(whole, hidden=whole.hidden.float())),
        (0, dataclasses.replace(whole, hidden=whole.hidden[:, :3])),
    ]
    for start, features_given in wrong:
        with pytest.raises(AssertionError):
            write_captions(tmp_path / "file", INFO, start, features_given)
        assert not (tmp_path / "file").exists()


# Reading -------------------------------------------------------------------------------------------------------------------


def expected_rows(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    whole = features()
    return whole.hidden.numpy()[indices], whole.pooled.numpy()[indices]  # -1 is the last row, the empty caption's


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(-1, 22), max_size=40))
def test_captions_are_taken_in_any_order_and_repeatedly(reader, indices):
    asked = np.array(indices, np.int64)
    for _ in range(2):
        for taken, expected in zip(reader.take(asked), expected_rows(asked), strict=True):
            np.testing.assert_array_equal(taken, expected)
            assert taken.dtype == np.float16 and taken.shape == expected.shape
            taken[:] = 0  # the caller's own copy


def test_index_out_of_range_is_refused(reader):
    for index in (-2, 23, 2**40):
        with pytest.raises(ValueError, match=rf"caption {index} .*0\.\.22"):
            reader.take(np.array([0, index]))


def test_only_the_files_that_are_needed_are_fetched(reader, monkeypatch):
    fetched: list[str] = []
    fetch = ArtifactStore.fetch
    monkeypatch.setattr(ArtifactStore, "fetch", lambda store, manifest, name: fetched.append(name) or fetch(store, manifest, name))
    assert len(reader) == 23
    reader.take(np.array([7, 22, 6]))
    reader.take(np.array([21, 5]))
    assert fetched == [captions_name(1), captions_name(4)]
    reader.take(np.array([-1, -1]))
    reader.take(np.array([-1, 8]))
    assert fetched[2:] == [EMPTY]


def mapped(folder: Path) -> set[str]:
    """Names of the files below folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(folder) in line}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc tells which files are mapped")
def test_few_files_are_open_at_a_time(local_store, reader, monkeypatch):
    monkeypatch.setattr(data_captions, "MAX_OPEN_FILES", 2)
    hidden, _ = reader.take(np.arange(23))
    np.testing.assert_array_equal(hidden, expected_rows(np.arange(23))[0])
    assert mapped(Path(local_store.uri)) == {captions_name(3), captions_name(4)}
    reader.take(np.array([15, 0]))
    assert mapped(Path(local_store.uri)) == {captions_name(0), captions_name(3)}


def test_file_is_mapped_and_not_read_whole(local_store, commit, tmp_path):
    """The file has 9 MB; a caption 8 kB."""
    info = dataclasses.replace(INFO, num_captions=1000, captions_per_file=1000, num_positions=8, width=512)
    ones = TextFeatures(torch.ones(1000, 8, 512).half(), torch.ones(1000, 512).half(), torch.ones(1000))
    (tmp_path / "large").mkdir()
    write_captions(tmp_path / "large" / captions_name(0), info, 0, ones)
    write_empty(tmp_path / "large" / EMPTY, info, part(ones, 0, 1))
    reader = CaptionFeatures.open(local_store, commit(tmp_path / "large", **dataclasses.asdict(info)))
    reader.take(np.array([0]))  # fetched and verified now
    before = resident_bytes()
    hidden, pooled = reader.take(np.array([500]))
    assert (hidden == 1).all() and (pooled == 1).all()
    assert resident_bytes() - before < 2_000_000 < (tmp_path / "large" / captions_name(0)).stat().st_size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# Damaged files and files of other features -----------------------------------------------------------------------------------


def test_files_of_other_features_are_refused(local_store, commit, folder):
    others = [
        ({"encoder_digest": "cd" * 32}, "its header is"),
        ({"width": 7}, "its tensors are"),
        ({"num_positions": 5}, "its tensors are"),
        ({"num_captions": 24}, "its tensors are"),
        ({"captions_per_file": 6, "num_captions": 30}, "its tensors are"),
    ]
    for number, (info, message) in enumerate(others):
        reader = CaptionFeatures.open(local_store, commit(folder, f"k{number}", **info))
        with pytest.raises(ValueError, match=message):
            reader.take(np.array([0, reader.info.num_captions - 1]))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"this is not a safetensors file"),
        lambda path: save_file({"hidden": np.zeros(3, np.float16)}, path, metadata={"enat": "{"}),
        lambda path: save_file({name: a.astype(np.float32) for name, a in load_file(path).items()}, path, metadata=header_of(path)),
        lambda path: path.write_bytes(path.with_name(captions_name(1)).read_bytes()),
    ],
    ids=["not safetensors", "not JSON", "float32", "another file's"],
)
def test_foreign_file_is_refused(local_store, commit, folder, write):
    write(folder / captions_name(0))
    reader = CaptionFeatures.open(local_store, commit(folder))
    with pytest.raises(ValueError, match=r"captions-00000\.safetensors (does not belong to|is not a readable)"):
        reader.take(np.array([2]))


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return file.metadata()


def test_manifest_of_something_else_is_refused(local_store, commit, folder):
    for key, info, message in (
        ("a", {"format_version": 2}, "of format 2; only 1 can be read"),
        ("b", {"language": "de"}, "captions/b.*info.language"),
    ):
        with pytest.raises(ValueError, match=message):
            CaptionFeatures.open(local_store, commit(folder, key, **info))
    manifest = Manifest(stage="tokenizer", key="k", stage_version=1, config={}, inputs={}, files=())
    with pytest.raises(ValueError, match=r"tokenizer/k .*info"):
        CaptionFeatures.open(local_store, manifest)
    for number, name in enumerate((captions_name(3), EMPTY), start=1):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"lacks {number} files of caption features, including captions-00003"):
            CaptionFeatures.open(local_store, commit(folder, f"without-{number}"))
