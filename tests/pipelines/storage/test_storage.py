"""Folders of files: listed in one order, read by ranges, and hashed once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import write

from pipelines.storage import cache as storage_cache
from pipelines.storage import local
from pipelines.storage.base import StorageError, StoredFile
from pipelines.storage.local import LocalFolder
from pipelines.storage.open import open_folder
from pipelines.storage.s3 import S3Folder
from pipelines.storage.s3_client import S3Config

NAMES = ["a-b", "a.b", "a/1", "a/b/2", "a0", "b", "s p+a%20", "å/é", "\uffee", "𝒳", "A/1", "~", ".hidden/x", "a/-"]


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    for name in NAMES:
        write(tmp_path / "files" / name, name.encode())
    return LocalFolder(tmp_path / "files")


def _names(folder: LocalFolder, prefix: str = "") -> list[str]:
    return [file.name for file in folder.list(prefix)]


# Listing -------------------------------------------------------------------------------------------------------------------


def test_a_listing_is_complete_and_in_the_order_of_bytes(folder: LocalFolder) -> None:
    assert _names(folder) == sorted(NAMES, key=str.encode)
    assert [file.size for file in folder.list()] == [len(name.encode()) for name in sorted(NAMES, key=str.encode)]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.text("ab-./0é", min_size=1, max_size=6), max_size=12))
def test_names_of_any_kind_are_in_the_order_of_bytes(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    root = tmp_path_factory.mktemp("names")
    written = set()
    for name in names:
        parts = [part for part in name.split("/") if part.strip(".")]
        path = root.joinpath(*parts)
        if parts and not any(above.is_file() for above in [path, *path.parents]) and not path.is_dir():
            write(path, b"")
            written.add("/".join(parts))
    assert _names(LocalFolder(root)) == sorted(written, key=str.encode)


def test_a_bucket_and_a_folder_with_the_same_files_are_listed_alike(
    folder: LocalFolder, make_bucket: Callable[..., S3Folder], s3_endpoint
) -> None:
    bucket = make_bucket("some/where")
    s3_endpoint.fill(bucket, {name: name.encode() for name in NAMES})
    assert [(f.name, f.size) for f in bucket.list()] == [(f.name, f.size) for f in folder.list()]
    assert bucket.folders() == folder.folders() == [".hidden", "A", "a", "å"]
    assert [f.name for f in bucket.list("a/")] == _names(folder, "a/") == ["a/-", "a/1", "a/b/2"]


def test_what_lies_below_a_name_is_that_part_of_the_whole(folder: LocalFolder) -> None:
    for prefix in ("a/", "a/b/", "å/"):
        assert _names(folder, prefix) == [name for name in _names(folder) if name.startswith(prefix)]
    assert _names(folder, "nowhere/") == []


def test_the_version_changes_with_the_content(folder: LocalFolder) -> None:
    before = {file.name: file.version for file in folder.list()}
    path = folder.root / "b"
    os.utime(write(path, b"c"), ns=(0, path.stat().st_mtime_ns + 1))
    assert {file.name for file in folder.list() if file.version != before[file.name]} == {"b"}


def test_links_to_files_and_folders_are_followed(folder: LocalFolder, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "x", b"1")
    (folder.root / "c").symlink_to(tmp_path / "elsewhere")
    (folder.root / "d").symlink_to(folder.root / "a/1")
    assert {"c/x", "d"} == set(_names(folder)) - set(NAMES)
    assert folder.read("c/x") == b"1" and folder.read("d") == b"a/1"


def test_links_that_lead_round_in_a_circle_end(folder: LocalFolder) -> None:
    """However the listing came there: a folder by itself gives what it gives in the whole."""
    (folder.root / "a" / "up").symlink_to(folder.root)
    (folder.root / "a" / "b" / "back").symlink_to(folder.root / "a")
    (folder.root / "whole").symlink_to(folder.root)
    assert _names(folder) == sorted(NAMES, key=str.encode)
    assert _names(folder, "a/") == ["a/-", "a/1", "a/b/2"]
    assert _names(folder, "a/b/") == ["a/b/2"]
    assert _names(folder, "whole/") == []


@pytest.mark.parametrize("target", ["itself", "nowhere"])
def test_a_link_that_leads_nowhere_is_named(folder: LocalFolder, target: str) -> None:
    (folder.root / "itself").symlink_to(folder.root / target)
    with pytest.raises(StorageError, match=rf"{folder.root}/itself cannot be read \(.*\)"):
        list(folder.list())


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"caf\xe9/1.jpg"])
def test_a_name_that_is_not_utf_8_is_named(folder: LocalFolder, name: bytes) -> None:
    write(folder.root / "c" / os.fsdecode(name), b"")
    with pytest.raises(StorageError, match=r"the name 'c/caf\\udce9.*' in .*/c is not UTF-8; rename it") as caught:
        list(folder.list())
    str(caught.value).encode()  # can be printed


# Reading -------------------------------------------------------------------------------------------------------------------


def test_ranges_are_read_exactly(folder: LocalFolder) -> None:
    write(folder.root / "c", b"0123456789")
    assert folder.read("c") == b"0123456789" and folder.read("c", 4) == b"456789"
    assert folder.read("c", 2, 3) == b"234" and folder.read("c", 10, 0) == b""
    with folder.open("c") as file:
        file.seek(7)
        assert file.read() == b"789"


def test_a_range_that_is_not_there_is_named(folder: LocalFolder) -> None:
    with pytest.raises(StorageError, match=rf"{folder.root}/b ends after 1 bytes; 5 were expected"):
        folder.read("b", 1, 4)
    with pytest.raises(StorageError, match=rf"{folder.root}/gone cannot be read \(No such file or directory\)"):
        folder.read("gone")
    with pytest.raises(StorageError, match="gone cannot be read"):
        folder.open("gone")


def test_places_are_opened_by_their_uri(folder: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/files", S3Config()).uri == folder.uri == str(tmp_path / "files")
    assert isinstance(open_folder("s3://bucket/x", S3Config()), S3Folder)
    for uri in ("gs://bucket/x", "https://host/x"):
        with pytest.raises(StorageError, match=f"{uri} is neither a local folder nor s3://bucket/prefix"):
            open_folder(uri, S3Config())
    for path in (tmp_path / "nowhere", folder.root / "b"):
        with pytest.raises(StorageError, match=f"{path} is not a directory"):
            open_folder(str(path), S3Config())


# Hashing -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the database of digests will lie."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests.sqlite"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed, as that happens."""
    names: list[str] = []
    original = storage_cache.file_digest

    def count(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(storage_cache, "file_digest", count)
    return names


@pytest.fixture
def settled(tmp_path: Path) -> LocalFolder:
    """Files that were last changed long ago."""
    for number in range(5):
        os.utime(write(tmp_path / "settled" / f"{number}", b"%d" % number), (1e9, 1e9))
    return LocalFolder(tmp_path / "settled")


def _fingerprints(folder: LocalFolder) -> list[str]:
    return list(folder.fingerprints(folder.list()))


SHA256 = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(5)]


def test_a_file_is_hashed_once(settled: LocalFolder, cache: Path, hashed: list[str]) -> None:
    assert _fingerprints(settled) == SHA256 and sorted(hashed) == list("01234")
    assert _fingerprints(settled) == SHA256 and len(hashed) == 5
    assert cache.is_file()


@pytest.mark.parametrize("change", ["content", "size", "time", "replaced"])
def test_a_changed_file_is_hashed_again(settled: LocalFolder, cache: Path, hashed: list[str], change: str) -> None:
    _fingerprints(settled)
    hashed.clear()
    path = settled.root / "3"
    content = {"content": b"x", "size": b"longer", "time": b"3", "replaced": b"y"}[change]
    if change == "replaced":
        path = write(settled.root.parent / "new", content).replace(path)
    else:
        path.write_bytes(content)
    os.utime(path, (1e9, 1e9) if change in ("size", "replaced") else (2e9, 1.1e9))
    assert _fingerprints(settled)[3] == hashlib.sha256(content).hexdigest() and hashed == ["3"]


def test_a_digest_of_a_file_that_may_still_change_unseen_is_not_remembered(
    settled: LocalFolder, cache: Path, hashed: list[str]
) -> None:
    """Twice within the clock's resolution, and with the same size."""
    path = write(settled.root / "3", b"x")
    now = path.stat().st_mtime_ns
    _fingerprints(settled)
    os.utime(write(path, b"y"), ns=(now, now))
    assert _fingerprints(settled)[3] == hashlib.sha256(b"y").hexdigest()


def test_many_files_are_hashed_some_at_a_time(settled: LocalFolder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_HASHED_AT_ONCE", 2)
    assert _fingerprints(settled) == SHA256


def test_a_cache_that_cannot_be_written_is_no_error(
    settled: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(write(tmp_path / "file", b"") / "cache"))
    assert _fingerprints(settled) == _fingerprints(settled) == SHA256 and len(hashed) == 10


def _garbage(cache: Path) -> None:
    write(cache, b"this is no database" * 1000)


def _cut(cache: Path) -> None:
    content = cache.read_bytes()
    cache.write_bytes(content[: len(content) // 2])


def _pages(cache: Path) -> None:
    """The header is whole, so that it opens."""
    content = cache.read_bytes()
    cache.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def _other_columns(cache: Path) -> None:
    cache.unlink()
    with sqlite3.connect(cache) as database:
        database.execute("CREATE TABLE digests (name TEXT)")
    database.close()


@pytest.mark.parametrize("damage", [_garbage, _cut, _pages, _other_columns])
def test_a_damaged_cache_is_no_error(settled: LocalFolder, cache: Path, damage: Callable[[Path], None]) -> None:
    _fingerprints(settled)
    damage(cache)
    assert _fingerprints(settled) == _fingerprints(settled) == SHA256


def test_processes_share_the_cache(settled: LocalFolder, cache: Path) -> None:
    start = threading.Barrier(4)

    def run(_: int) -> list[str]:
        start.wait()
        return _fingerprints(settled)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [SHA256] * 4


def test_a_file_that_is_gone_before_it_is_hashed_is_named(settled: LocalFolder, cache: Path) -> None:
    with pytest.raises(StorageError, match=rf"{settled.root}/gone cannot be read \(No such file or directory\)"):
        list(settled.fingerprints([StoredFile("gone", 1, "1-1")]))
