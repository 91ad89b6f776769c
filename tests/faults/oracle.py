"""The uninterrupted run, and what another run must have in common with it.

A laboratory is a folder: images, a configuration with every kind of stage, and the store of an uninterrupted run of it. The points
at which that run committed something are known by name (see shim/). A command runs in a process of its own, which is forked from
one that has imported everything: it starts in a tenth of a second, and is killed like any other.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.cluster import connection
from services.s3_server import ENVIRONMENT

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TIMES = ("seconds", "per_second", "memory", "utilization", "wait_share", "num_workers", "num_restarts", "device")
_DATASET = "photographs"
STAGES = (
    *("dataset", "tokenizer", "token_map", "captions", "reference", "reconstruction", "audit", "train", "generate", "memorization"),
    *("evaluate", "report"),
)
HUNG_SECONDS = 240.0  # the longest stage takes 40 on two idle cores
_START_SECONDS = 4.0  # of a command for one stage: it connects, and its workers import torch
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "pipelines.cli.main",
    "pipelines.cli.run",
    "pipelines.run.runner",
    "pipelines.training.loop",
    "ray.train.torch",
    "ray.data",
]


@dataclass
class Outcome:
    """One fault and what became of it.

    verdict: "detected" (a sentence named it), "harmless" (the same result without a sentence), "silent" (another result), "lost"
    (what was complete was made again), "doubled", or "hung" (no end, or no success however often it was repeated). For hostile
    inputs "refused", "accepted", "executed", "outside" (something was written outside) or "unclear" (no clear sentence).
    seconds: until something new was committed.   is_rough: a traceback was shown.
    """

    what: str
    verdict: str = "harmless"
    seconds: float | None = None
    is_rough: bool = False
    note: str = ""
    log: str = ""


@dataclass
class Command:
    """A command at work, or ended. text: what it printed so far."""

    process: Any
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_over(self) -> bool:
        return self.process.exitcode is not None

    def wait(self, seconds: float = HUNG_SECONDS) -> int | None:
        """Its exit code; None if it hung, and was killed with all that it started."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            end_family(self.pid)
            self.process.join(10)
            return None
        return int(self.process.exitcode)


@dataclass(eq=False)
class Laboratory:
    """A folder of a campaign. Its model is conditioned on captions, so that there is a stage of every kind.

    num_runs: numbers the commands, whose output is kept in logs/.   tracking: URL of its MLflow, once it is needed.
    stack: what ends with the campaign.
    """

    folder: Path
    num_runs: int = 0
    tracking: str | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _cluster: Any = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.num_runs = len([*(self.folder / "logs").iterdir()])
        os.environ.update(environment(self))
        connection.prepare_environment()  # before the first import of Ray
        _FORKS.set_forkserver_preload(_IMPORTED)

    @property
    def config(self) -> Path:
        return self.folder / "lab.yaml"

    @property
    def fault(self) -> Path:
        """The file that asks the shim for a fault."""
        return self.folder / "fault.json"

    @property
    def oracle(self) -> Path:
        return self.folder / "oracle" / "store"

    def start(self, *arguments: object, cluster: str | None = None, **variables: str) -> Command:
        """Start `enat` with these arguments. cluster: address of a running Ray; None starts one for the command."""
        self.num_runs += 1
        log = self.folder / "logs" / f"{self.num_runs:05d}.log"
        given = [*map(str, arguments), *([f"cluster.address={cluster}"] if cluster else [])]
        process = _FORKS.Process(target=_enat, args=(given, str(log), {"ENAT_FAULT": str(self.fault), **variables}))
        process.start()
        return Command(process, log)

    def run_of(self, workspace: Path, *targets: str) -> list[str]:
        """Arguments of the run in a workspace up to some stages."""
        return ["run", str(self.config), f"workspace={workspace}", f"targets=[{','.join(targets)}]"]

    @property
    def cluster_pid(self) -> int | None:
        return None if self._cluster is None else int(self._cluster.pid)

    @property
    def cluster(self) -> str:
        """Address of a Ray of this laboratory, for commands whose faults do not touch Ray. It starts when it is needed."""
        if self._cluster is not None and self._cluster.exitcode is None:
            with contextlib.suppress(psutil.Error, FileNotFoundError):
                alive = {child.name() for child in psutil.Process(self._cluster.pid).children(recursive=True)}
                if {"raylet", "gcs_server"} <= alive:
                    return (self.folder / "address").read_text()
        self.close()
        (self.folder / "address").unlink(missing_ok=True)
        self._cluster = _FORKS.Process(target=_ray, args=(str(self.folder), str(self.fault), os.getpid()))
        self._cluster.start()
        wait_until((self.folder / "address").exists, 120)
        return (self.folder / "address").read_text()

    def close(self) -> None:
        if self._cluster is not None:
            end_family(self._cluster.pid)
            self._cluster.join(10)
            self._cluster = None

    # The uninterrupted run -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the oracle, unless a campaign before has. Its commit points, stage by stage, are in points.json."""
        points = self.folder / "points.json"
        if points.exists():
            return
        for path in (self.folder / name for name in ("images", "oracle", "unfinished")):
            shutil.rmtree(path, ignore_errors=True)
        from pipelines.artifacts.open import open_store

        write_config(self.folder)
        self.fault.write_text(json.dumps({"record": True}))
        seen = Path(f"{self.fault}.seen")
        seen.unlink(missing_ok=True)
        command = self.start(*self.run_of(self.folder / "oracle", *STAGES), "--jobs", 1, cluster=self.cluster)
        assert command.wait() == 0, command.text
        self.fault.unlink()
        found: dict[str, Any] = {stage: {"seconds": _START_SECONDS, "points": []} for stage in STAGES}
        for point, count in sorted(Counter(tuple(json.loads(line)) for line in seen.read_text().splitlines()).items()):
            if (stage := point[2].partition("/")[0]) in found:
                found[stage]["points"].append([*point, count])
        for manifest in open_store(str(self.oracle)).manifests():
            found[manifest.stage]["seconds"] += manifest.provenance["seconds"]
        for stage in STAGES:
            if records := [point[1:3] for point in found[stage]["points"] if "/.parts/" in point[2] and point[1] == "link"]:
                self._interrupt(stage, *sorted(records)[-2:][0])
        points.write_text(json.dumps(found, indent=1))

    def _interrupt(self, stage: str, call: str, target: str) -> None:
        """Leave a stage unfinished: the disk is full when the last but one of its parts is recorded."""
        workspace = self.folder / "unfinished" / stage
        self.copy_before(workspace, stage)
        self.fault.write_text(json.dumps({"call": call, "target": target, "when": "before", "skip": 0, "act": "ENOSPC"}))
        command = self.start(*self.run_of(workspace, stage), "--jobs", 1, cluster=self.cluster)
        assert command.wait() == 1, command.text
        self.fault.unlink()

    @property
    def unfinished(self) -> dict[str, Path]:
        """Stores in which a stage is unfinished, by its name."""
        return {path.name: path / "store" for path in sorted((self.folder / "unfinished").iterdir())}

    @property
    def points(self) -> dict[str, Any]:
        """Stage -> the seconds that a command for it takes, and its commit points as [process, call, target, how often]."""
        found: dict[str, Any] = json.loads((self.folder / "points.json").read_text())
        return found

    def copy_before(self, workspace: Path, stage: str) -> Path:
        """A store that has all that comes before a stage, and neither the stage nor what comes after it. Returns the store."""
        shutil.rmtree(workspace, ignore_errors=True)
        store = workspace / "store"
        for name in STAGES[: STAGES.index(stage)]:
            shutil.copytree(self.oracle / name, store / name, copy_function=os.link)
        store.mkdir(parents=True, exist_ok=True)
        for used in store.rglob(".used"):
            os.utime(used)  # recent, for a removal beside
        return store


def write_config(folder: Path) -> None:
    from material.layouts import make_layouts
    from material.tiny_clip import make_tiny_clip

    make_layouts(folder / "images")
    make_tiny_clip(folder / "clip", kind="full")
    values = {
        "name": "lab",
        "workspace": str(folder / "unused"),
        "dataset": {
            "kind": "coco",
            "name": _DATASET,
            "path": str(folder / "images" / "coco"),
            "captions": str(folder / "images" / "captions.json"),
        },
        "tokenizer": {"codebook_size": 32, "recipe": {"num_steps": 4, "batch_size": 8}},
        "token_map": {"shard_size": 4},
        "captions": {"encoder": str(folder / "clip"), "shard_size": 8},
        "reference": {  # its classifier is trained on labels
            "num_epochs": 1,
            "dataset": {"kind": "image_folder", "name": "labelled", "path": str(folder / "images" / "image_folder")},
        },
        "reconstruction": {},
        "memorization": {},
        "train": {
            "model": {"text": True, "encoder_layers": 2, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2},
            **{"num_steps": 12, "batch_size": 16, "num_groups": 4, "learning_rate": 1e-3, "warmup_steps": 4, "ema_decay": 0.9},
            "execution": {"checkpoint_every": 2, "log_every": 1, "max_failures": 0},
        },
        "generate": {"num_samples": 10, "replicates": 2, "shard_size": 4, "sampler": {"num_steps": 4}},
        "evaluate": {"clip_score": str(folder / "clip")},
        "tracking": {"enabled": False},
    }
    (folder / "lab.yaml").write_text(json.dumps(values))  # JSON is YAML


def environment(lab: Laboratory) -> dict[str, str]:
    """What every process of a campaign sees: the code, the shim, a cache of its own, and a Ray on the loopback interface."""
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "shim", HERE, HERE.parent, REPOSITORY))),
        "ENAT_CACHE": str(lab.folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_AUTH_TOKEN": "of-this-campaign-" + "0" * 20,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "COLUMNS": "400",
        **ENVIRONMENT,
    }


# Processes -----------------------------------------------------------------------------------------------------------------


def _enat(arguments: list[str], log: str, variables: dict[str, str]) -> None:
    """The command, as its script runs it."""
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    os.environ.update(variables)
    import sitecustomize  # of this folder

    from pipelines.cli.main import main

    sitecustomize.install()
    sys.argv = ["enat", *arguments]
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        atexit._run_exitfuncs()  # Process leaves them out
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


def _ray(folder: str, fault: str, campaign: int) -> None:
    os.setsid()
    os.environ["ENAT_FAULT"] = fault
    import ray

    # Not connection.connect: its cluster serves one command, and trainings of others would wait for Ray's state API in vain.
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    path = Path(folder) / "address"
    path.with_suffix(".new").write_text(ray.get_runtime_context().gcs_address)
    path.with_suffix(".new").rename(path)
    while psutil.pid_exists(campaign):
        time.sleep(1)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, by their ids."""
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def end_family(pid: int) -> None:
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def wait_until(holds: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(held)


# Comparison ----------------------------------------------------------------------------------------------------------------


def differences(store: Any, oracle: Path, stages: Sequence[str]) -> list[str]:
    """What a store has otherwise than the uninterrupted run: files by their digests, facts and scores, but no times.

    store: a folder, or an opened store.
    """
    from pipelines.artifacts.open import open_store
    from pipelines.artifacts.verification import verify

    mine, theirs = open_store(str(store)) if isinstance(store, Path) else store, open_store(str(oracle))
    found = []
    for stage in stages:
        expected = {key: theirs.read_manifest(stage, key) for key in theirs.folder.folders(f"{stage}/")}
        got = {key: mine.read_manifest(stage, key) for key in mine.folder.folders(f"{stage}/")}
        if tuple(stages) == ("dataset",):  # a run of this target alone does not read the dataset of the reference
            expected = {key: each for key, each in expected.items() if each is not None and each.config["name"] == _DATASET}
        if stage == "report":  # its page shows times, so that its bytes differ; its key holds what it shows
            expected, got = ({key: None if each is None else True for key, each in some.items()} for some in (expected, got))
        if {key for key, each in expected.items() if each} != {key for key, each in got.items() if each}:
            found.append(f"{stage} has the artifacts {sorted(got)}, not {sorted(expected)}")
            continue
        for key, manifest in expected.items():
            if manifest is not None and manifest is not True:
                found += [
                    f"{stage}: {name}" for name, value in facts(manifest, theirs).items() if facts(got[key], mine)[name] != value
                ]
    for verdict in verify(mine, mine.read_manifests()):
        found += [f"{verdict.stage}: {problem}" for problem in verdict.problems]
    return found


def facts(manifest: Any, store: Any) -> dict[str, Any]:
    """All that a manifest states but times."""
    history = [
        json.loads(store.fetch(manifest, record.name).read_text()) for record in manifest.records if record.name == "history.json"
    ]
    return {
        "digest": manifest.digest,
        "inputs": {name: source["digest"] for name, source in manifest.inputs.items()},
        "summary": without_times(manifest.summary),
        "metrics": without_times(manifest.metrics),
        "history": without_times(history),
    }


def without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: without_times(each) for name, each in value.items() if not any(word in name for word in TIMES)}
    if isinstance(value, list | tuple):
        return [without_times(each) for each in value]
    return value


def leftovers(store: Any) -> list[str]:
    """Files in the folders of complete artifacts that their manifests do not name: work that was done twice, or not cleaned up."""
    from pipelines.artifacts.open import open_store

    opened, found = open_store(str(store)) if isinstance(store, Path) else store, []
    for manifest in opened.manifests():
        folder = f"{manifest.stage}/{manifest.key}/"
        named = {"manifest.json", ".used", *(record.path for record in (*manifest.files, *manifest.records))}
        names = {file.name.removeprefix(folder) for file in opened.folder.list(folder)}
        found += [f"{manifest.stage}/{name}" for name in sorted(names - named) if "/.tmp-" not in f"/{name}"]
    return found


def committed(folder: Path) -> dict[str, tuple[int, int]]:
    """What must outlive a fault: the manifests below a folder, and the files of recorded parts; each with its inode and time."""
    kept = [*folder.rglob("manifest.json")]
    for record in folder.rglob(".parts/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept.append(record.parents[1] / json.loads(record.read_text())["file"]["path"])
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept if path.exists()}


def trained_rows(folder: Path) -> list[dict[str, Any]]:
    """The history in the newest whole checkpoint below a folder. Its times are those of one attempt, so they prove a resume."""
    states = sorted(folder.rglob(".work/step-*/state.json"), reverse=True)
    for state in states:
        name = state.parent.name
        if any(folder.rglob(f".parts/checkpoint-{name.removeprefix('step-')}-*.json")):
            rows: list[dict[str, Any]] = json.loads(state.read_text())["history"]
            return rows
    return []


def iterate_new(folder: Path, since: float) -> Iterator[float]:
    """Times of change after `since` of the files below a folder, without records of use."""
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.name not in (".used",) and path.is_file() and (changed := path.stat().st_mtime) > since:
                yield changed
