"""Finding, describing and listing artifacts, and sizes and ages as people write them."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from material.places import Place, key_of, make
from material.summaries import summary_of
from pipelines.artifacts import inventory
from pipelines.artifacts.inventory import Query
from pipelines.artifacts.manifest import MANIFEST, DamagedManifestError, FileRecord, Manifest, sealed
from pipelines.formatting import parse_age, parse_size, show_age, show_size
from pipelines.run import graph
from pipelines.storage.base import StorageError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


def _made(created: str, **fields: Any) -> dict[str, Any]:
    return {"provenance": {"created": created}, **fields}


def _manifest(stage: str, name: str, size: int = 0, **fields: Any) -> Manifest:
    values: dict[str, Any] = {"config": {}, "inputs": {}, "files": (FileRecord("a", "a", size, "1" * 64),), **fields}
    return Manifest(stage=stage, key=key_of(name), stage_version=1, **values)


# Units ---------------------------------------------------------------------------------------------------------------------


def test_sizes_and_ages_are_parsed() -> None:
    sizes = {"0": 0, "500": 500, "500B": 500, "3k": 3000, "1.5GB": 1_500_000_000, "200 MiB": 200 << 20, " 2tib ": 2 << 40}
    ages = {"30d": 30 * 86400, "12h": 43200, "90m": 5400, "45s": 45, "2W": 14 * 86400, "0.5 h": 1800}
    assert {text: parse_size(text) for text in sizes} == sizes and {text: parse_age(text) for text in ages} == ages


def test_other_sizes_and_ages_are_refused_with_an_example() -> None:
    for text in ("", "-1MB", "MB", "1e3", "1.", "1 x", "1,5GB", "٣MB", "9" * 20, "nan", "inf", "1kk"):
        with pytest.raises(ValueError, match=r"write .* 500MB"):
            parse_size(text)
    for text in ("", "30", "-1d", "d", "1y", "30 days", "nan d"):
        with pytest.raises(ValueError, match=r"write .* 30d"):
            parse_age(text)


@given(st.integers(0, 10**15))
def test_a_shown_size_is_near_the_size(size: int) -> None:
    number, unit = show_size(size).replace(",", "").split()
    assert abs(parse_size(f"{number}{unit}") - size) <= max(0.06 * size if size < 1e15 else size, 0) and len(number) <= 6


def test_sizes_and_ages_as_they_are_shown() -> None:
    assert [show_size(size) for size in (0, 999, 1000, 99_949, 123_456, 999_499, 999_500, 2.5e9, 1e15)] == [
        "0 B", "999 B", "1.0 kB", "99.9 kB", "123 kB", "999 kB", "1.0 MB", "2.5 GB", "1,000.0 TB",
    ]  # fmt: skip
    assert [show_age(age) for age in (-5, 0, 119, 120, 7199, 7200, 172_799, 172_800, 1e8)] == [
        "0 s", "0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 d", "1,157 d",
    ]  # fmt: skip


# Finding -------------------------------------------------------------------------------------------------------------------


def test_damaged_and_unfinished_artifacts_are_not_found_and_hide_no_others(place: Place) -> None:
    good, bad = make(place.store, "train/a"), make(place.store, "train/b")
    place.damage(f"train/{bad.key}/{MANIFEST}", b"not JSON")
    place.store.put_part("train", key_of("c"), "part-0", {})
    assert inventory.find(place.store, good.key[:8]) == good
    with pytest.raises(StorageError, match=rf"train/{bad.key}/{MANIFEST} is not a manifest"):
        inventory.find(place.store, bad.key[:8])
    found, damaged = inventory.look_up(place.store, [good.key[:8], f"train/{bad.key[:8]}"])
    assert found == good and isinstance(damaged, DamagedManifestError)
    with pytest.raises(StorageError, match="no artifact whose key begins with train/"):
        inventory.find(place.store, f"train/{key_of('c')}")


def test_only_manifests_that_may_match_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = [make(place.store, f"train/{number}") for number in range(6)]
    read, kind = [], type(place.store)
    monkeypatch.setattr(
        kind, "read_manifest", lambda self, *name, original=kind.read_manifest: read.append(name) or original(self, *name)
    )
    assert inventory.find_all(place.store, [m.key[:16] for m in manifests[:2]]) == manifests[:2]
    assert sorted(read) == sorted((m.stage, m.key) for m in manifests[:2])


# Listing -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifests() -> list[Manifest]:
    """A dataset of 10 bytes, what was made from it, and a train artifact of another dataset; the last does not contain its time."""
    digits = _manifest("dataset", "digits", 10, summary=summary_of("dataset"), **_made("2026-01-01T00:00:00+00:00"))
    source = {"stage": "dataset", "key": digits.key, "digest": digits.digest}
    tokenizer = _manifest("tokenizer", "t", 200, inputs={"dataset": source}, **_made("2026-02-01T12:00:00"))
    between = {"stage": "tokenizer", "key": tokenizer.key, "digest": tokenizer.digest}
    samples = _manifest("generate", "g", 5, inputs={"model": between}, **_made("2026-03-01T11:00:00+00:00"))
    return [
        samples,
        digits,
        tokenizer,
        _manifest("train", "x", 70, summary=summary_of("train", dataset="faces"), **_made("yesterday")),
    ]


def _entries(manifests: list[Manifest], query: Query | None = None, by_size: bool = False) -> list[inventory.Entry]:
    given = {"describe": graph.describe, "dataset_name": graph.dataset_name}
    return inventory.list_artifacts(manifests, query or Query(), now=NOW, by_size=by_size, **given)


def _listed(manifests: list[Manifest], *, by_size: bool = False, **query: Any) -> list[str]:
    return [entry.stage for entry in _entries(manifests, Query(**query), by_size)]


def test_artifacts_are_listed_newest_or_largest_first(manifests: list[Manifest]) -> None:
    assert _listed(manifests) == ["generate", "tokenizer", "dataset", "train"]
    assert _listed(manifests, by_size=True) == ["tokenizer", "train", "dataset", "generate"]
    assert _entries(manifests)[0] == inventory.Entry("generate", key_of("g"), 5, 3600.0, "digits", "")


def test_filters_select_and_artifacts_of_unknown_age_are_neither_older_nor_newer(manifests: list[Manifest]) -> None:
    for query, found in (
        ({"stages": ("train", "dataset")}, ["dataset", "train"]),
        ({"datasets": ("digits",)}, ["generate", "tokenizer", "dataset"]),
        ({"datasets": ("digits", "faces"), "stages": ("train",)}, ["train"]),
        ({"larger_than": 70}, ["tokenizer", "train"]),
        ({"smaller_than": 10}, ["generate", "dataset"]),
        ({"older_than": 28 * 86400.0}, ["tokenizer", "dataset"]),
        ({"newer_than": 28 * 86400.0}, ["generate", "tokenizer"]),
        ({"newer_than": 3600.0}, ["generate"]),
        ({"stages": ("report",)}, []),
    ):
        assert _listed(manifests, **query) == found, query


def test_missing_and_circular_inputs_name_no_dataset() -> None:
    one, other = ({"stage": "train", "key": key_of(name), "digest": ""} for name in "ab")
    gone = {**one, "key": "f" * 64}
    manifests = [_manifest("train", "a", inputs={"x": other}), _manifest("train", "b", inputs={"x": one, "y": gone})]
    assert [entry.dataset for entry in _entries(manifests)] == [None, None]


@pytest.mark.parametrize(
    ("stage", "fields", "phrase"),
    [
        ("dataset", {"summary": summary_of("dataset", class_names=["0", "1"])}, "1,797 images, 2 classes"),
        (
            "token_map",
            {"summary": summary_of("token_map", rows=1797, quarantined=3)},
            "1,797 images, 16 px, 4 x 4 codes, 3 quarantined",
        ),
        (
            "train",
            {
                "config": {"model": {"preset": "enat-s"}},
                "summary": summary_of("train", parameters=98_100_000, num_steps=1200),
            },
            "enat-s, 98.1 M parameters, 1,200 steps",
        ),
        ("evaluate", {"summary": summary_of("evaluate", num_samples=500), "metrics": {"fid": 2.7912}}, "fid 2.791, 500 samples"),
        ("train", {"metrics": {"final/loss": 2.5}}, "loss 2.5"),  # a manifest of another version
        ("novel", {"metrics": {"a": 1.0, "b": float("inf"), "c": 3.0}}, "a 1, b inf"),
        ("novel", {}, ""),
        ("dataset", {"summary": {"num_images": "many", "class_names": 5}}, ""),
    ],
)
def test_a_phrase_describes_an_artifact(stage: str, fields: dict[str, Any], phrase: str) -> None:
    assert inventory.phrase(_manifest(stage, "x", **fields), graph.describe) == phrase


def test_a_list_shows_foreign_text_without_control_characters() -> None:
    manifest = _manifest("report", "x", summary=summary_of("report", name="[red]\x1b[31m\na[/]"))
    text = io.StringIO()
    inventory.show_list(_entries([manifest]), "s3://b/[x]", Console(file=text, width=200))
    assert "[red] [31m a[/]" in text.getvalue() and "\x1b" not in text.getvalue() and "\x07" not in text.getvalue()
    assert "1 artifacts, 0 B, in s3://b/[x]" in text.getvalue()


# Unfinished ----------------------------------------------------------------------------------------------------------------


def test_unfinished_artifacts_are_listed_last_used_first(place: Place) -> None:
    store = place.store
    make(store, "token_map/done")
    for name, parts in (("old", 3), ("new", 1)):
        for part in range(parts):
            store.put_part("token_map", key_of(name), f"part-{part}", {"rows": 1})
    place.damage(f"token_map/{key_of('old')}/part-00000.parquet", bytes(1000))
    place.age(f"token_map/{key_of('old')}", 7200)
    place.damage(f"token_map/{key_of('bare')}/file", b"x")  # killed before its first part: its stage is one of this program
    place.age(f"token_map/{key_of('bare')}", 9000)
    place.damage(f"photos/{key_of('foreign')}/file", b"x")  # whose stage is not
    place.damage(f"web/{key_of('foreign')}/{MANIFEST}", b"{}")
    place.damage(f"web/{key_of('other')}/index.html", b"x")
    found = inventory.find_unfinished(store.folders(), [m for m in store.read_manifests() if isinstance(m, Manifest)])
    assert [(each.stage, each.key, each.num_parts) for each in found] == [
        ("token_map", key_of("new"), 1),
        ("token_map", key_of("old"), 3),
        ("token_map", key_of("bare"), 0),
    ]
    assert found[1].size == 1000 + 3 * len(sealed({"rows": 1})) and 7190 < found[0].used - found[1].used < 7210
