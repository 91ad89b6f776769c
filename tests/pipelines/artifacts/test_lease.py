"""Leases: of runs that make the same artifact, one works, the others wait, and a lost holder holds up nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pipelines.artifacts import lease
from pipelines.artifacts.lease import Leases
from pipelines.artifacts.manifest import Manifest, sealed
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import process
from pipelines.cluster.resources import Workers
from pipelines.storage.base import StorageError
from pipelines.workflow import driver
from pipelines.workflow.stage import Node, Stage, StageContext, StageResult

NAME = ("train", "a" * 64)
_PATH = f"{NAME[0]}/{NAME[1]}/.work/lease.json"


def _put(store: ArtifactStore, **replaced: Any) -> None:
    record = {"host": process.this_host(), "process": process.this_process(), "owner": "other", "beats": 0}
    store.folder.put(_PATH, sealed({**record, **replaced}))


def test_one_run_holds_a_lease_and_another_is_told_who(store: ArtifactStore) -> None:
    with Leases(store) as first, Leases(store) as second:
        assert first.take(*NAME) is None
        assert second.take(*NAME) == process.this_host().split()[0]
        second.release(*NAME)  # it has none
        assert second.take(*NAME) is not None
        first.release(*NAME)
        assert second.take(*NAME) is None
    assert store.folder.read_if_exists(_PATH) is None, "a lease goes with its run"


def test_a_holder_that_has_ended_on_this_machine_is_replaced_at_once(local_store: ArtifactStore) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _put(local_store, process=f"{ended.pid} {time.time():.0f}")
    with Leases(local_store) as leases:
        assert leases.take(*NAME) is None


def test_a_holder_elsewhere_is_replaced_once_its_lease_stays_unchanged(
    local_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(local_store, host="node-7 0000 pid")
    with Leases(local_store) as leases:
        assert leases.take(*NAME) == "node-7"
        monkeypatch.setattr(lease, "_LOST_AFTER", 0.0)
        _put(local_store, host="node-7 0000 pid", beats=1)
        assert leases.take(*NAME) == "node-7", "it has written"
        assert leases.take(*NAME) is None


def test_a_holder_writes_again_and_again(local_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_EVERY", 0.01)
    with Leases(local_store) as leases:
        leases.take(*NAME)
        deadline = time.monotonic() + 60
        while (record := leases._read(NAME)) is None or record.beats < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        leases.release(*NAME)
        time.sleep(0.05)  # no write comes after the release
        assert local_store.folder.read_if_exists(_PATH) is None


_DAMAGED = (b"", b"{}", sealed({"host": 7}), sealed({"host": 1, "process": 2, "owner": 3, "beats": True}))


@pytest.mark.parametrize("content", _DAMAGED)
def test_a_damaged_lease_holds_up_nobody(local_store: ArtifactStore, content: bytes) -> None:
    local_store.folder.put(_PATH, content)
    with Leases(local_store) as leases:
        assert leases.take(*NAME) is None
        record = leases._read(NAME)
        assert record is not None and record.process == process.this_process()


def test_work_goes_on_where_no_lease_can_be_written(local_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise StorageError("AccessDenied")

    monkeypatch.setattr(type(local_store.folder), "put_if_absent", refuse)
    with Leases(local_store) as leases:
        assert leases.take(*NAME) is None


@pytest.mark.parametrize("is_lost", [False, True])
def test_of_two_runs_one_makes_an_artifact_and_the_other_waits_for_it(
    local_store: ArtifactStore, make_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """is_lost: the first fails, and the other makes it."""
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.01)
    second_session = make_session(local_store)
    is_waiting, begun = threading.Event(), threading.Event()
    runs: list[str] = []

    def run(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        runs.append(threading.current_thread().name)
        if len(runs) == 1:
            begun.set()
            assert is_waiting.wait(60)
            if is_lost:
                raise RuntimeError("lost")
        return StageResult(files=[context.write("text", lambda path: path.write_text(str(os.getpid())))])

    nodes = [Node("n", Stage("write", 1, run), Workers())]
    outcomes: dict[str, Any] = {}

    def first() -> None:
        try:
            outcomes["first"] = driver.execute(nodes, make_session(local_store))
        except Exception as error:
            outcomes["first"] = error

    def tell() -> None:
        while "being made by another run" not in second_session.console.file.getvalue():
            time.sleep(0.01)
        is_waiting.set()

    threads = [threading.Thread(target=each, daemon=True) for each in (first, tell)]
    for thread in threads:
        thread.start()
        assert begun.wait(60)
    (second,) = driver.execute(nodes, second_session)
    threads[0].join(60)
    assert second.is_reused == (not is_lost) and len(runs) == 1 + is_lost
    assert isinstance(outcomes["first"], Exception) == is_lost
    assert second_session.console.file.getvalue().count("being made by another run") == 1
