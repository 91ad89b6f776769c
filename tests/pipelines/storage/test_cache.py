"""The cache of fetched files: it returns the right bytes although other processes use, damage or clear it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.storage import cache
from pipelines.storage.base import StorageError

HOUR = 3600


class Origin:
    """Where files come from, and how often each was asked for."""

    def __init__(self) -> None:
        self.downloads = 0

    def fetch(self, content: bytes, *answers: bytes, suffix: str = "") -> Path:
        """Ask the cache for `content`; a download brings the next of `answers`, or else what was asked for."""
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


@pytest.fixture
def fill(origin: Origin) -> Callable[..., list[Path]]:
    """Files of a MiB each, the first of which was last fetched `hours[0]` ago."""

    def fill(*hours: float) -> list[Path]:
        paths = [origin.fetch(bytes([number]) * (1 << 20)) for number in range(len(hours))]
        for path, ago in zip(paths, hours, strict=True):
            os.utime(path, (time.time() - ago * HOUR, path.stat().st_mtime))
        return paths

    return fill


def _files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "files").rglob("*") if path.is_file())


def test_a_file_is_fetched_once_and_named_by_its_sha256(root: Path, origin: Origin) -> None:
    paths = {origin.fetch(b"weights", suffix=".bin") for _ in range(3)}
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert paths == {root / "files" / sha256[:2] / f"{sha256}.bin"} and origin.downloads == 1
    assert paths.pop().read_bytes() == b"weights" and len(_files(root)) == 1


def test_a_damaged_file_is_fetched_again(origin: Origin) -> None:
    for number, damage in enumerate((b"weightz", b"weight", b"")):
        origin.fetch(b"weights").write_bytes(damage)
        assert origin.fetch(b"weights").read_bytes() == b"weights" and origin.downloads == number + 2


def test_a_file_is_hashed_once_while_it_does_not_change(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    path = origin.fetch(b"once")
    digest = cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda path: hashed.append(path) or digest(path))
    for _ in range(5):
        origin.fetch(b"once")
    assert hashed == [path]


def test_a_wrong_download_is_repeated_once(origin: Origin) -> None:
    assert origin.fetch(b"weights", b"weightz").read_bytes() == b"weights" and origin.downloads == 2


def test_two_wrong_downloads_are_an_error_and_leave_nothing(root: Path, origin: Origin) -> None:
    with pytest.raises(StorageError, match=f"expected content: 7 bytes with the sha256 {hashlib.sha256(b'weights').hexdigest()}"):
        origin.fetch(b"weights", b"weightz", b"weight")
    assert origin.downloads == 2 and _files(root) == []


def test_a_download_that_fails_leaves_nothing(root: Path) -> None:
    def download(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("the line is cut")

    with pytest.raises(RuntimeError, match="the line is cut"):
        cache.fetch("ab" * 32, 8, download)
    assert _files(root) == []


def test_the_least_recently_used_files_make_room(root: Path, origin: Origin, fill, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fill(2, 5, 4, 3)
    monkeypatch.setenv("ENAT_CACHE_GB", str(3 / 1024))
    new = origin.fetch(b"\xff" * (1 << 20))
    assert _files(root) == sorted([paths[0], paths[3], new])


def test_a_file_that_is_fetched_again_counts_as_used(root: Path, origin: Origin, fill, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fill(9, 3)
    assert origin.fetch(b"\x00" * (1 << 20)) == paths[0]
    monkeypatch.setenv("ENAT_CACHE_GB", str(2 / 1024))
    new = origin.fetch(b"\xff" * (1 << 20))
    assert _files(root) == sorted([paths[0], new])


def test_files_fetched_within_the_last_hour_stay_whatever_the_limit(root, origin: Origin, fill, monkeypatch) -> None:
    paths = fill(0.9, 0.5, 1.1)
    monkeypatch.setenv("ENAT_CACHE_GB", "0")
    new = origin.fetch(b"\xff" * (1 << 20))
    assert _files(root) == sorted([*paths[:2], new])


def test_downloads_of_killed_processes_are_removed_and_those_under_way_are_not(root: Path, origin: Origin) -> None:
    folder = origin.fetch(b"weights").parent
    for name, hours in (("abandoned", 25), ("under-way", 1)):
        (folder / f".partial-{name}").write_bytes(b"half")
        os.utime(folder / f".partial-{name}", (time.time() - hours * HOUR,) * 2)
    origin.fetch(b"other weights")
    assert [path.name for path in _files(root) if path.name.startswith(".partial")] == [".partial-under-way"]


# Folders -------------------------------------------------------------------------------------------------------------------


def _fetch_folder(name: str, mib: int = 1, hours: float = 0) -> Path:
    """A folder of two files, one of them in a folder of its own, last fetched `hours` ago."""

    def download(path: Path) -> None:
        (path / "inside").mkdir()
        (path / "inside" / "model.bin").write_bytes(bytes(mib << 20))
        (path / "config.json").write_bytes(b"")

    path = cache.fetch_folder(name, mib << 20, download)
    os.utime(path, (time.time() - hours * HOUR,) * 2)
    return path


@pytest.mark.usefixtures("root")
def test_the_least_recently_used_of_folders_and_files_makes_room(origin: Origin, fill, monkeypatch) -> None:
    paths = fill(5, 3)
    folders = [_fetch_folder("a", hours=6), _fetch_folder("b", hours=4)]
    monkeypatch.setenv("ENAT_CACHE_GB", str(3 / 1024))
    new = _fetch_folder("c")
    assert [path.exists() for path in (*paths, *folders, new)] == [False, True, False, True, True]
    newest = origin.fetch(b"\xff" * (1 << 20))
    assert [path.exists() for path in (paths[1], folders[1], new, newest)] == [True, False, True, True]
    assert [path.name for path in new.parent.iterdir()] == ["c"], "nothing is left of what is gone"


def test_a_folder_that_is_fetched_again_counts_as_used_and_one_of_the_last_hour_stays(root: Path, monkeypatch) -> None:
    folders = [_fetch_folder("a", hours=6), _fetch_folder("b", hours=0.9), _fetch_folder("c", hours=1.1)]

    def unasked(path: Path) -> None:
        raise AssertionError("it exists")

    assert cache.fetch_folder("a", 1 << 20, unasked) == folders[0]
    monkeypatch.setenv("ENAT_CACHE_GB", "0")
    _fetch_folder("d")
    assert [path.exists() for path in folders] == [True, True, False]


def test_looking_for_room_does_not_count_as_use(root: Path, origin: Origin, monkeypatch) -> None:
    """Many file systems note when a folder was listed."""
    folder = _fetch_folder("a", hours=48)
    origin.fetch(b"weights")
    monkeypatch.setenv("ENAT_CACHE_GB", "0")
    origin.fetch(b"other weights")
    assert not folder.exists()


def test_folders_of_killed_processes_are_removed_and_those_under_way_are_not(root: Path, origin: Origin) -> None:
    downloads = _fetch_folder("a").parent
    for name, hours in ((".partial-abandoned", 25), (".tmp-abandoned", 25), (".partial-under-way", 1)):
        (downloads / name).mkdir()
        (downloads / name / "half").write_bytes(b"half")
        os.utime(downloads / name / "half", (time.time() - hours * HOUR,) * 2)
        os.utime(downloads / name, (time.time() - 25 * HOUR,) * 2)
    origin.fetch(b"weights")
    assert sorted(path.name for path in downloads.iterdir()) == [".partial-under-way", "a"]


# Many processes ------------------------------------------------------------------------------------------------------------


def _run_at_once(count: int, code: str, go: Path, *arguments: Path) -> None:
    """The same code in many processes, which wait for `go` once they are ready."""
    command = [sys.executable, "-c", code, str(go), *map(str, arguments)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    go.touch()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0] * count


_FETCH = """
import hashlib, sys, time
from pathlib import Path
from pipelines.storage import cache
go = Path(sys.argv[1])
contents = [bytes([number]) * 500_000 for number in range(6)]
digests = [hashlib.sha256(content).hexdigest() for content in contents]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for _ in range(4):
    for content, digest in zip(contents, digests):
        path = cache.fetch(digest, len(content), lambda path: path.write_bytes(content))
        assert path.read_bytes() == content
"""


@pytest.mark.parametrize("limit", ["50", "0"])
def test_processes_that_fetch_the_same_files_at_once_all_get_them(root, tmp_path: Path, monkeypatch, limit: str) -> None:
    monkeypatch.setenv("ENAT_CACHE_GB", limit)
    _run_at_once(4, _FETCH, tmp_path / "go")
    assert [path.stat().st_size for path in _files(root)] == [500_000] * 6


_FETCH_FOLDER = """
import sys, time
from pathlib import Path
from pipelines.storage import cache
go, made = map(Path, sys.argv[1:])
def fill(folder):
    (made / folder.name).touch()
    time.sleep(0.3)
    (folder / "codes").write_bytes(b"whole")
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
assert (cache.fetch_folder("map", 5, fill) / "codes").read_bytes() == b"whole"
"""


def test_of_processes_that_fetch_the_same_folder_at_once_one_does_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    _run_at_once(3, _FETCH_FOLDER, tmp_path / "go", tmp_path / "made")
    assert len(list((tmp_path / "made").iterdir())) == 1
    assert [path.name for path in (root / "downloads").iterdir()] == ["map"]


def test_a_folder_that_is_not_whole_is_fetched_again(root: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "codes").write_bytes(b"whole")

    folder = cache.fetch_folder("map", 5, fill)
    (folder / "codes").write_bytes(b"half")

    def is_whole(found: Path) -> bool:
        return (found / "codes").read_bytes() == b"whole"

    assert cache.fetch_folder("map", 5, fill, is_whole) == folder and is_whole(folder)
    assert [path.name for path in (root / "downloads").iterdir()] == ["map"], "the old one is gone"


def test_a_limit_that_is_not_a_size_is_named(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("ENAT_CACHE_GB", limit)
        with pytest.raises(StorageError, match=f"ENAT_CACHE_GB={limit} is not a size"):
            origin.fetch(b"weights")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=rf"the cache {tmp_path}/file/cache cannot be used .*ENAT_CACHE"):
        Origin().fetch(b"weights")
