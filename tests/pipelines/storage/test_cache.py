"""The cache of fetched files: it returns the right bytes although other processes use, damage or clear it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.storage import cache
from pipelines.storage.base import StorageError

HOUR = 3600
MIB = 1 << 20


class Origin:
    """The source of files, which counts downloads."""

    def __init__(self) -> None:
        self.downloads = 0

    def fetch(self, content: bytes, *answers: bytes, suffix: str = "") -> Path:
        """Ask the cache for `content`. A download writes the next of `answers`, or else `content`."""
        remaining = list(answers)

        def download(path: Path) -> None:
            self.downloads += 1
            path.write_bytes(remaining.pop(0) if remaining else content)

        return cache.fetch(hashlib.sha256(content).hexdigest(), len(content), download, suffix)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def origin(root: Path) -> Origin:
    return Origin()


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "downloads").iterdir())


def _fetch_folder(name: str, hours: float = 0) -> Path:
    """A folder with a MiB of files, one of them in a folder of its own, last fetched `hours` ago."""

    def download(path: Path) -> None:
        (path / "inside").mkdir()
        (path / "inside" / "model.bin").write_bytes(bytes(MIB))
        (path / "config.json").write_bytes(b"")

    path = cache.fetch_folder(name, MIB, download)
    os.utime(path, (time.time() - hours * HOUR,) * 2)
    return path


# Fetching ------------------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_again_only_if_it_is_damaged(root: Path, origin: Origin) -> None:
    paths = {origin.fetch(b"weights", suffix=".bin") for _ in range(3)}
    name = f"{hashlib.sha256(b'weights').hexdigest()}.bin"
    assert paths == {root / "downloads" / name / name} and origin.downloads == 1
    for number, damage in enumerate((b"weightz", b"weight", b"")):
        path = origin.fetch(b"weights")
        path.write_bytes(damage)
        assert origin.fetch(b"weights").read_bytes() == b"weights" and origin.downloads == number + 3
    path.unlink()
    assert origin.fetch(b"weights").read_bytes() == b"weights"


def test_a_file_is_hashed_once_while_it_does_not_change(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    path = origin.fetch(b"once")
    digest = cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda path: hashed.append(path) or digest(path))
    for _ in range(5):
        origin.fetch(b"once")
    assert hashed == [path]


def test_a_wrong_download_is_repeated_once(root: Path, origin: Origin) -> None:
    assert origin.fetch(b"weights", b"weightz").read_bytes() == b"weights" and origin.downloads == 2
    with pytest.raises(StorageError, match=f"expected content: 5 bytes with the sha256 {hashlib.sha256(b'other').hexdigest()}"):
        origin.fetch(b"other", b"otter", b"othe")
    assert origin.downloads == 4 and len(_folders(root)) == 1


def test_a_download_that_fails_leaves_nothing(root: Path) -> None:
    def download(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("the connection is closed")

    with pytest.raises(RuntimeError, match="the connection is closed"):
        cache.fetch("ab" * 32, 8, download)
    assert _folders(root) == []


def test_a_folder_that_is_not_whole_is_fetched_again(root: Path) -> None:
    def is_whole(found: Path) -> bool:
        return (found / "codes").read_bytes() == b"whole"

    for _ in range(2):
        folder = cache.fetch_folder("map", 5, lambda folder: (folder / "codes").write_bytes(b"whole"), is_whole)
        assert is_whole(folder) and _folders(root) == ["map"]
        (folder / "codes").write_bytes(b"half")


# Room ----------------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_make_room(root: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, hours in (("a", 2), ("b", 5), ("c", 4), ("d", 3), ("e", 48)):
        _fetch_folder(name, hours=hours)
    (root / "files" / "ab").mkdir(parents=True)
    (root / "files" / "ab" / "of-an-earlier-version").write_bytes(bytes(MIB))
    os.utime(root / "files" / "ab", (time.time() - 6 * HOUR,) * 2)
    cache.fetch_folder("b", MIB, lambda path: pytest.fail("it exists"))  # which counts as use
    monkeypatch.setenv("ENAT_CACHE_GB", str(4 / 1024))
    new = origin.fetch(bytes(MIB))
    assert _folders(root) == sorted(["a", "b", "d", new.name]) and not (root / "files" / "ab").exists()
    origin.fetch(b"\xff" * MIB)
    assert set(_folders(root)) >= {"a", "b", new.name} and "d" not in _folders(root), "looking for room does not count as use"


def test_what_was_fetched_within_the_last_hour_stays_whatever_the_limit(root: Path, origin: Origin, monkeypatch) -> None:
    folders = [_fetch_folder(name, hours) for name, hours in (("a", 0.9), ("b", 0.5), ("c", 1.1))]
    monkeypatch.setenv("ENAT_CACHE_GB", "0")
    new = origin.fetch(bytes(MIB))
    assert [path.exists() for path in (*folders, new)] == [True, True, False, True]


def test_downloads_of_killed_processes_are_removed_and_active_ones_stay(root: Path, origin: Origin) -> None:
    downloads = _fetch_folder("a").parent
    for name, hours in ((".partial-abandoned", 25), (".partial-active", 1)):
        (downloads / name).mkdir()
        (downloads / name / "half").write_bytes(b"half")
        os.utime(downloads / name / "half", (time.time() - hours * HOUR,) * 2)
        os.utime(downloads / name, (time.time() - 25 * HOUR,) * 2)
    new = origin.fetch(b"weights")
    assert _folders(root) == sorted([".partial-active", "a", new.name])


def test_a_limit_that_is_not_a_size_is_refused(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("ENAT_CACHE_GB", limit)
        with pytest.raises(StorageError, match=f"ENAT_CACHE_GB={limit} is not a size"):
            origin.fetch(b"weights")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=rf"the cache {tmp_path}/file/cache cannot be used .*ENAT_CACHE"):
        Origin().fetch(b"weights")


# Many processes ------------------------------------------------------------------------------------------------------------

_FETCH = """
import hashlib, sys, time
from pathlib import Path
from pipelines.storage import cache
go, made = map(Path, sys.argv[1:])
contents = [bytes([number]) * 500_000 for number in range(6)]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for _ in range(4):
    for content in contents:
        def download(path):
            (made / f"{path.name}-{time.monotonic_ns()}").touch()
            path.write_bytes(content)
        path = cache.fetch(hashlib.sha256(content).hexdigest(), len(content), download)
        assert path.read_bytes() == content
"""


@pytest.mark.parametrize("limit", ["50", "0"])
def test_of_processes_that_fetch_the_same_at_once_one_does_it(root, tmp_path: Path, monkeypatch, limit: str) -> None:
    monkeypatch.setenv("ENAT_CACHE_GB", limit)
    go, made = tmp_path / "go", tmp_path / "made"
    made.mkdir()
    command = [sys.executable, "-c", _FETCH, str(go), str(made)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    go.touch()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0] * 4
    assert len([*made.iterdir()]) == 6 == len(_folders(root))
