"""Folders of files: listed in one order, read by ranges, and hashed once."""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from material.layouts import write
from pipelines.storage import cache as storage_cache
from pipelines.storage import local
from pipelines.storage.base import Folder, MissingFileError, StorageError, StoredFile, WrongContentError
from pipelines.storage.local import LocalFolder
from pipelines.storage.open import open_folder
from pipelines.storage.s3 import S3Folder
from pipelines.storage.s3_client import S3Config

NAMES = [*["a-b", "a.b", "a/1", "a/b/2", "a0", "b", "å/é", "￮", "𝒳", "A/1", "~", ".hidden/x", "a/-"], "s p+a%20c&e<>'\"", "x\x01y"]


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return LocalFolder(tmp_path / "new") if request.param == "folder" else request.getfixturevalue("make_bucket")("some/where")


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    for name in NAMES:
        write(tmp_path / "files" / name, name.encode())
    return LocalFolder(tmp_path / "files")


def _names(folder: LocalFolder, prefix: str = "") -> list[str]:
    return [file.name for file in folder.list(prefix)]


# Listing -------------------------------------------------------------------------------------------------------------------


def test_a_listing_is_complete_and_in_the_order_of_bytes(place: Folder) -> None:
    for name in NAMES:
        assert place.put_if_absent(name, name.encode())
    ordered = sorted(NAMES, key=str.encode)
    assert [(file.name, file.size) for file in place.list()] == [(name, len(name.encode())) for name in ordered]
    assert all(place.read(name) == name.encode() for name in NAMES)
    assert place.folders() == [".hidden", "A", "a", "å"]
    for prefix in ("a/", "a/b/", "å/"):
        assert [file.name for file in place.list(prefix)] == [name for name in ordered if name.startswith(prefix)]
    assert list(place.list("nowhere/")) == []


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


def test_circles_of_links_end(folder: LocalFolder) -> None:
    """A sub-folder lists the same files by itself as in the whole."""
    (folder.root / "a" / "up").symlink_to(folder.root)
    (folder.root / "a" / "b" / "back").symlink_to(folder.root / "a")
    (folder.root / "whole").symlink_to(folder.root)
    assert _names(folder) == sorted(NAMES, key=str.encode)
    assert _names(folder, "a/") == ["a/-", "a/1", "a/b/2"]
    assert _names(folder, "a/b/") == ["a/b/2"]
    assert _names(folder, "whole/") == []


def test_a_broken_link_is_named(folder: LocalFolder) -> None:
    for target in ("itself", "nowhere"):
        (folder.root / "itself").symlink_to(folder.root / target)
        with pytest.raises(StorageError, match=rf"{folder.root}/itself cannot be read \(.*\)"):
            list(folder.list())
        (folder.root / "itself").unlink()


def test_what_is_not_a_file_is_refused_before_it_is_read(folder: LocalFolder, tmp_path: Path) -> None:
    """A device may never end, and a pipe waits for a writer."""
    root = folder.root
    write(root / "b.jpg", b"1")
    for name, make in {"zero.jpg": lambda path: path.symlink_to("/dev/zero"), "pipe.jpg": os.mkfifo}.items():
        make(root / name)
        sentence = rf"{root / name} is a device, pipe or socket, not a file; remove it"
        for act in (lambda: list(folder.list()), lambda name=name: folder.read(name), lambda name=name: folder.open(name)):
            with pytest.raises(StorageError, match=sentence):
                act()
        (root / name).unlink()


def test_a_listing_without_links_leaves_out_their_files(folder: LocalFolder, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "x", b"12345")
    (folder.root / "c").symlink_to(tmp_path / "elsewhere")
    (folder.root / "d").symlink_to(tmp_path / "nowhere")
    write(folder.root / os.fsdecode(b"caf\xe9"), b"")
    found = {file.name: file.size for file in folder.list(follow_links=False)}
    assert set(found) == {*NAMES, "d"} and list(folder.list("c/", follow_links=False)) == []


def test_a_name_that_is_not_utf_8_is_named(folder: LocalFolder) -> None:
    for name in (b"caf\xe9.jpg", b"caf\xe9/1.jpg"):
        path = write(folder.root / "c" / os.fsdecode(name), b"")
        with pytest.raises(StorageError, match=r"the name 'c/caf\\udce9.*' in .*/c is not UTF-8; rename it") as caught:
            list(folder.list())
        str(caught.value).encode()  # can be printed
        path.unlink()
        if path.parent.name != "c":
            path.parent.rmdir()


# Reading -------------------------------------------------------------------------------------------------------------------


def test_ranges_are_read_exactly(place: Folder) -> None:
    content = bytes(range(256))
    place.put("file", content)
    place.put("empty", b"")
    assert place.read("file") == content and place.read("empty") == b"" and place.read("file", 7) == content[7:]
    assert place.read("file", 3, 5) == content[3:8] and place.read("file", 250, 6) == content[250:]
    assert place.read("file", 3, 0) == b""
    with place.open("file") as file:
        file.seek(250)
        assert file.read() == content[250:]
    for start, length in ((250, 7), (256, 1), (999, 1)):
        with pytest.raises(StorageError, match=rf"{place.uri}/file ends after .* {start + length} were expected"):
            place.read("file", start, length)
    for act in (place.read, place.open):
        with pytest.raises(MissingFileError, match=f"{place.uri}/none (does not exist|cannot be read)"):
            act("none")


def test_places_are_opened_by_their_uri(folder: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/files", S3Config()).uri == folder.uri == str(tmp_path / "files")
    assert isinstance(open_folder("s3://bucket/x", S3Config()), S3Folder)
    with pytest.raises(StorageError, match="https://host/x is not a place that is read; give a folder, s3://bucket/prefix"):
        open_folder("https://host/x", S3Config())
    for path in (tmp_path / "nowhere", folder.root / "b"):
        with pytest.raises(StorageError, match=f"{path} is not a directory"):
            open_folder(str(path), S3Config())


# Writing -------------------------------------------------------------------------------------------------------------------


def test_a_name_keeps_its_first_bytes_unless_it_is_replaced(place: Folder, tmp_path: Path) -> None:
    source = write(tmp_path / "source", b"first")
    assert place.put_if_absent("a/b", source) and place.put_if_absent("a/b", b"first") and not place.put_if_absent("a/b", b"other")
    assert place.read_if_exists("a/b") == b"first" and place.read_if_exists("none") is None
    for content in (b"second", b""):
        place.put("a/c", content)
        assert place.read("a/c") == content
    assert place.entries() == ["a/"] and place.entries("a/") == ["b", "c"] and place.folders("a/") == [] == place.entries("none/")


def test_exactly_the_named_files_are_deleted_and_no_empty_folder_stays(place: Folder) -> None:
    for name in ("a/b/1", "a/b/2", "a/b.bin", "c/1"):
        place.put(name, b"x")
    for _ in range(2):
        place.delete(["a/b/1", "a/b/2", "c/1", "none/1"])
        assert [file.name for file in place.list()] == ["a/b.bin"] and place.entries() == ["a/"]


def test_a_file_is_fetched_only_with_the_expected_bytes(place: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    place.put("a.bin", b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    path = place.fetch("a.bin", 7, sha256)
    assert path.read_bytes() == b"".join(place.chunks("a.bin")) == b"weights" and path.suffix == ".bin"
    for size, digest in ((8, sha256), (7, "0" * 64)):
        with pytest.raises(WrongContentError):
            place.fetch("a.bin", size, digest)
    for act in (lambda: place.fetch("none", 7, "0" * 64), lambda: list(place.chunks("none")), lambda: place.read("none")):
        with pytest.raises(MissingFileError, match="none"):
            act()


def test_writers_succeed_while_others_remove_the_empty_folder(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)

    def run(number: int) -> None:
        for _ in range(100):
            assert folder.put_if_absent(f"a/b/{number}", b"x")
            folder.delete([f"a/b/{number}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert folder.entries() == []


# Hashing -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the database of digests."""
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
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFolder:
    """Files that were last changed long ago, as far as their digests are concerned."""
    monkeypatch.setattr(storage_cache, "_SETTLED_SECONDS", 0.0)
    for number in range(5):
        os.utime(write(tmp_path / "settled" / f"{number}", b"%d" % number), (1e9, 1e9))
    return LocalFolder(tmp_path / "settled")


def _fingerprints(folder: LocalFolder) -> list[str]:
    return list(folder.fingerprints(folder.list()))


SHA256 = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(5)]


def test_a_file_is_hashed_once(settled: LocalFolder, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_HASHED_AT_ONCE", 2)
    assert _fingerprints(settled) == SHA256 and sorted(hashed) == list("01234")
    assert _fingerprints(settled) == SHA256 and len(hashed) == 5
    assert cache.is_file()


def test_a_changed_file_is_hashed_again(settled: LocalFolder, cache: Path, hashed: list[str]) -> None:
    path = settled.root / "3"
    for change, content in {"content": b"x", "size": b"longer", "time": b"3", "replaced": b"y", "times set back": b"z"}.items():
        os.utime(write(path, b"3"), (1e9, 1e9))
        _fingerprints(settled)
        hashed.clear()
        before = path.stat()
        if change == "replaced":
            write(settled.root.parent / "new", content).replace(path)
        else:
            path.write_bytes(content)
        os.utime(path, (1e9, 1e9) if change in ("size", "replaced", "times set back") else (2e9, 1.1e9))
        while path.stat().st_ctime_ns == before.st_ctime_ns:  # within the clock's resolution
            os.utime(path, (1e9, 1e9))
        assert _fingerprints(settled)[3] == hashlib.sha256(content).hexdigest() and hashed == ["3"], change


def test_the_digest_of_a_file_that_changed_just_now_is_not_cached(
    settled: LocalFolder, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice within the clock's resolution, and with the same size."""
    monkeypatch.setattr(storage_cache, "_SETTLED_SECONDS", 60.0)
    path = write(settled.root / "3", b"x")
    now = path.stat().st_mtime_ns
    _fingerprints(settled)
    os.utime(write(path, b"y"), ns=(now, now))
    assert _fingerprints(settled)[3] == hashlib.sha256(b"y").hexdigest()


def test_a_cache_that_cannot_be_written_is_not_an_error(
    settled: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(write(tmp_path / "file", b"") / "cache"))
    assert _fingerprints(settled) == _fingerprints(settled) == SHA256 and len(hashed) == 10


def test_a_damaged_cache_is_not_an_error(settled: LocalFolder, cache: Path, tmp_path: Path) -> None:
    _fingerprints(settled)
    content = cache.read_bytes()
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE checked (name TEXT)")
    database.close()
    for damaged in (
        content[: len(content) // 2],
        content[:4096] + b"\xff" * (len(content) - 4096),  # the header is whole, so it can be opened
        (tmp_path / "other").read_bytes(),
        b"not a database" * 1000,
    ):
        cache.write_bytes(damaged)
        assert _fingerprints(settled) == _fingerprints(settled) == SHA256


def test_no_flipped_bit_of_the_cache_is_believed(settled: LocalFolder, cache: Path) -> None:
    _fingerprints(settled)
    whole, generator = cache.read_bytes(), random.Random(0)
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        cache.write_bytes(flipped)
        assert _fingerprints(settled) == SHA256


def test_processes_share_the_cache(settled: LocalFolder, cache: Path) -> None:
    start = threading.Barrier(4)

    def run(_: int) -> list[str]:
        start.wait()
        return _fingerprints(settled)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [SHA256] * 4


def test_a_file_that_is_removed_before_it_is_hashed_is_named(settled: LocalFolder, cache: Path) -> None:
    with pytest.raises(StorageError, match=rf"{settled.root}/gone cannot be read \(No such file or directory\)"):
        list(settled.fingerprints([StoredFile("gone", 1, "1-1")]))
