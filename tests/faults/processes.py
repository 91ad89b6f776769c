"""Signals and errors of the disk: to the driver, its workers and Ray's own processes, at commit points and at random moments.

One case is a stage that is interrupted up to four times in a row and then completed by the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from oracle import (
    STAGES,
    Command,
    Laboratory,
    Outcome,
    committed,
    differences,
    family,
    iterate_new,
    leftovers,
    trained_rows,
    wait_until,
)

from pipelines.artifacts.open import open_store

_LONG = ("token_map", "captions", "train", "generate")  # stages with parts: drawn more often
_SIGNALS = ("KILL", "KILL", "TERM", "STOP")
_ERRORS = ("ENOSPC", "EIO", "EDQUOT")
_ATTEMPTS = 3  # of the last, undisturbed command
_RAY = {
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
    "agent": ("ray::DashboardAgent", "ray::RuntimeEnvAgent"),
}  # in command lines


@dataclass
class Fault:
    """What is done to a command. what: in words.   strike: does it, and returns the time; None if its moment never came."""

    what: str
    strike: Callable[[Command], float | None]


def signals(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """Driver and workers, at commit points and at random moments."""
    stage = rng.choice(STAGES + 2 * _LONG)
    faults = [
        at_point(lab, rng, stage, _SIGNALS) if rng.random() < 0.6 else at_moment(lab, rng, stage, rng.choice(("driver", "worker")))
        for _ in range(rng.randint(1, 4))
    ]
    return chain(lab, stage, faults, lambda: lab.cluster)


def ray(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """The raylet, the GCS and the agents of a Ray that the command itself started."""
    stage = rng.choice((*_LONG, "reference", "evaluate"))
    return chain(lab, stage, [at_moment(lab, rng, stage, rng.choice([*_RAY])) for _ in range(rng.randint(1, 2))], lambda: None)


def disk(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """A disk that is full or fails when something is committed."""
    stage = rng.choice(STAGES + 2 * _LONG)
    return chain(lab, stage, [at_point(lab, rng, stage, _ERRORS) for _ in range(rng.randint(1, 4))], lambda: lab.cluster)


def garbage(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """`enat artifacts gc` beside a stage that is killed and continued."""
    stage = rng.choice(_LONG)
    faults = [at_point(lab, rng, stage, ("KILL",)) for _ in range(rng.randint(0, 2))]
    return chain(lab, stage, [*faults, beside_gc(lab)], lambda: lab.cluster)


# Faults --------------------------------------------------------------------------------------------------------------------


def at_point(lab: Laboratory, rng: random.Random, stage: str, acts: tuple[str, ...]) -> Fault:
    points = lab.points[stage]["points"]
    if acts == _ERRORS:  # where bytes are written; a removal needs no room
        points = [point for point in points if point[1] in ("link", "fsync")]
    process, call, target, times = rng.choice(points)
    act, when = rng.choice(acts), "before" if acts == _ERRORS else rng.choice(("before", "after"))
    ask = {"call": call, "target": target, "when": when, "skip": rng.randrange(times), "act": act}
    pause = rng.uniform(0.1, 1.5)

    def strike(command: Command) -> float | None:
        struck = Path(f"{lab.fault}.struck")
        struck.unlink(missing_ok=True)
        lab.fault.write_text(json.dumps(ask))
        is_hit = wait_until(lambda: struck.exists() or command.is_over, 60)
        lab.fault.unlink(missing_ok=True)
        if not is_hit or not wait_until(lambda: struck.exists() and struck.read_text(), 0.1):
            return None
        if act == "STOP":
            time.sleep(pause)
            _send(int(struck.read_text()), signal.SIGCONT)
        return struck.stat().st_mtime

    return Fault(f"{act} of the {process} {when} {call} {target}", strike)


def at_moment(lab: Laboratory, rng: random.Random, stage: str, target: str) -> Fault:
    act, after, pause = rng.choice(_SIGNALS), rng.uniform(0, lab.points[stage]["seconds"]), rng.uniform(0.1, 3)
    which = rng.random()

    def strike(command: Command) -> float | None:
        wait_until(lambda: command.is_over, after)
        found: list[int] = []
        wait_until(lambda: command.is_over or found.extend(_processes(lab, command, target)) or found, 20)
        if command.is_over or not found:
            return None
        pid, now = found[int(which * len(found))], time.time()
        _send(pid, getattr(signal, f"SIG{act}"))
        if act == "STOP":
            time.sleep(pause)
            _send(pid, signal.SIGCONT)
        return now

    return Fault(f"{act} of the {target} after {after:.1f} s", strike)


def beside_gc(lab: Laboratory) -> Fault:
    """Removals as often as they can be made, as long as the command is at work."""

    def strike(command: Command) -> float | None:
        now, store = time.time(), lab.folder / "work" / "store"
        abandoned = store / "dataset" / ("0" * 64) / "part-00000.parquet"  # of a stage that has artifacts; else it may be others'
        abandoned.parent.mkdir(parents=True)
        abandoned.write_bytes(b"of a run that was killed")
        os.utime(abandoned, (now - 7200, now - 7200))
        while not command.is_over:
            removal = lab.start("artifacts", "gc", "--older-than", "1h", "--delete", "--ignore-registry", "--store", store)
            assert removal.wait() == 0, removal.text
        assert not abandoned.exists(), "it removes what it should"
        return now

    return Fault("gc beside", strike)


def _processes(lab: Laboratory, command: Command, target: str) -> list[int]:
    if target == "driver":  # the command, and the child that does its work
        return [process.pid for process in family(command.pid)[:2]]
    found = []
    is_shared = target == "worker" and lab.cluster_pid is not None  # the faults of Ray are for the Ray of the command itself
    for process in family(command.pid) + (family(lab.cluster_pid) if is_shared else []):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()).split(" --")[0]
            is_worker = title.startswith("ray::") and not any(word in title for word in ("IDLE", "StatsActor", "Agent"))
            if is_worker if target == "worker" else any(name in title for name in _RAY[target]):
                found.append(process.pid)
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        psutil.Process(pid).send_signal(number)


# A case --------------------------------------------------------------------------------------------------------------------


def chain(lab: Laboratory, stage: str, faults: list[Fault], cluster: Callable[[], str | None]) -> list[Outcome]:
    """Each fault strikes the same command once more; at the end the command runs undisturbed."""
    workspace = lab.folder / "work"
    store = lab.copy_before(workspace, stage)
    arguments = lab.run_of(workspace, stage)
    outcomes: list[Outcome] = []
    kept: dict[str, tuple[int, int]] = committed(store)
    rows: list[dict[str, Any]] = []
    struck: list[tuple[float, Outcome]] = []
    attempts: Iterator[Fault | None] = iter([*faults, *[None] * _ATTEMPTS])
    code: int | None = 1
    for fault in attempts:
        if code == 0 and fault is not None:
            continue  # the stage is complete: nothing is left to disturb
        if code == 0:
            break
        started = time.time()
        command = lab.start(*arguments, cluster=cluster())
        at = fault.strike(command) if fault is not None else None
        code = command.wait()
        text = command.text
        if fault is not None and at is not None:
            outcome = Outcome(f"{stage}: {fault.what}", is_rough="Traceback (most recent call last)" in text, log=str(command.log))
            outcomes.append(outcome)
            struck.append((at if code == 0 else time.time(), outcome))
        if not outcomes:
            continue
        latest = outcomes[-1]
        if any(line.startswith("enat: ") for line in text.splitlines()):
            latest.verdict = "detected"
        if code is None:
            latest.verdict, latest.note = "hung", f"no end in {time.time() - started:.0f} s"
            return outcomes
        now = {name: each for name, each in committed(store).items() if name in kept}
        gone = [name for name in kept if now.get(name, kept[name]) != kept[name] or not Path(name).exists()]
        if gone:
            latest.verdict, latest.note = "lost", f"made again or gone: {gone[0]}"
        kept = committed(store)
        if code != 0:
            rows = trained_rows(store / "train") or rows
    if not outcomes:
        return []
    latest = outcomes[-1]
    if code != 0:
        latest.verdict, latest.note = "hung", f"exit code {code} after {_ATTEMPTS} more commands: {text.strip().splitlines()[-1:]}"
        return outcomes
    if wrong := differences(store, lab.oracle, STAGES[: STAGES.index(stage) + 1]):
        latest.verdict, latest.note = "silent", "; ".join(wrong[:3])
    elif twice := leftovers(store):
        latest.verdict, latest.note = "doubled", ", ".join(twice[:3])
    elif rows and (lost := _lost_rows(store, rows)):
        latest.verdict, latest.note = "lost", lost
    for at, outcome in struck:
        outcome.seconds = max(0.0, min(iterate_new(store / stage, at), default=at) - at)
    shutil.rmtree(workspace)
    return outcomes


def _lost_rows(store: Path, rows: list[dict[str, Any]]) -> str:
    opened = open_store(str(store))
    (trained,) = (manifest for manifest in opened.manifests() if manifest.stage == "train")
    made = json.loads(opened.fetch(trained, "history.json").read_text())[: len(rows)]  # its path may have a digest in it
    return "" if made == rows else f"{len(rows)} rows of a checkpoint were trained again"
