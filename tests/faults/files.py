"""Flips and cuts of every kind of file of a store, of unfinished stages and of the caches, and what their readers make of them.

A reader may refuse a changed file, or make the same of it as before. Anything else is silent.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from oracle import Laboratory, Outcome

from pipelines.artifacts.manifest import DamagedFileError, DamagedManifestError, read_sealed
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.artifacts.verification import verify
from pipelines.storage import cache as local_cache
from pipelines.storage.base import file_digest
from pipelines.storage.external import local_folder
from pipelines.storage.local import LocalFolder
from pipelines.storage.open import open_folder
from pipelines.storage.s3_client import S3Config
from services.s3_server import serve


def flips(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """One changed file."""
    readers = {**finished(lab), **unfinished(lab), **caches(lab)}
    name = rng.choice(sorted(readers))
    local_cache._digest_once.cache_clear()  # of the process: each flip is found, or not, by a new one
    with readers[name]() as (paths, read):
        path = rng.choice(sorted(paths))
        before = path.read_bytes()
        what = change(path, rng)
        try:
            return [Outcome(f"{name}: {what}", *read(path, before))]
        except Exception as error:
            return [Outcome(f"{name}: {what}", "silent", is_rough=True, note=repr(error))]


Read = Callable[[Path, bytes], tuple[str]]
Opened = contextlib.AbstractContextManager[tuple[list[Path], Read]]


def change(path: Path, rng: random.Random) -> str:
    """Flip a bit, cut the end off, or lose a block, as disks do. Returns what was done."""
    content = bytearray(path.read_bytes())
    act, at = rng.choice(("flip", "flip", "cut", "zeros")), rng.randrange(len(content))
    if act == "cut":
        del content[at:]
    elif act == "zeros" and any(content[at : at + 512]):
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    else:
        act = "flip"
        content[at] ^= 1 << rng.randrange(8)
    path.unlink()  # it may be a link to a file of the oracle
    path.write_bytes(content)
    return f"{act} at {at:,} of {path.name}"


# Finished artifacts --------------------------------------------------------------------------------------------------------


@cache
def finished(lab: Laboratory) -> dict[str, Callable[[], Opened]]:
    """A kind for each file name of each stage."""
    store, found = open_store(str(_copied(lab.oracle, lab.folder / "flips"))), {}
    for manifest in store.manifests():
        folder = Path(store.place(manifest.stage, manifest.key))
        for record in (*manifest.files, *manifest.records):
            kind = f"{manifest.stage}/{record.name.partition('-0')[0]}"
            found[kind] = _reader(folder / record.path, lambda path, before, m=manifest, r=record: _read_file(store, m, r))
        found[f"{manifest.stage}/manifest"] = _reader(
            folder / "manifest.json", lambda path, before, m=manifest: _read_manifest(store, m)
        )
        found[f"{manifest.stage}/.used"] = _reader(folder / ".used", lambda path, before, m=manifest: _read_use(store, m, before))
    return found


def _reader(path: Path, read: Read) -> Callable[[], Opened]:
    @contextlib.contextmanager
    def opened() -> Iterator[tuple[list[Path], Read]]:
        content = path.read_bytes()
        yield [path], read
        path.write_bytes(content)

    return opened


def _read_file(store: ArtifactStore, manifest: Any, record: Any) -> tuple[str]:
    (verdict,) = verify(store, [manifest])
    try:
        store.fetch(manifest, record.name)
    except DamagedFileError:
        return ("detected" if verdict.problems else "silent",)
    return ("silent",)


def _read_manifest(store: ArtifactStore, manifest: Any) -> tuple[str]:
    try:
        return ("harmless" if store.read_manifest(manifest.stage, manifest.key) == manifest else "silent",)
    except DamagedManifestError:
        return ("detected",)


def _read_use(store: ArtifactStore, manifest: Any, before: bytes) -> tuple[str]:
    now, expected = store.recorded_inputs(manifest.stage, manifest.key), read_sealed(before)
    assert expected is not None
    return ("detected" if now is None else "harmless" if [*map(list, now)] == expected["inputs"] else "silent",)


# Unfinished stages ---------------------------------------------------------------------------------------------------------


@cache
def unfinished(lab: Laboratory) -> dict[str, Callable[[], Opened]]:
    found = {}
    for stage, store in lab.unfinished.items():
        files = [path for path in (store / stage).rglob("*") if path.is_file() and path.name != ".used"]
        for kind, is_of in {"record": ".parts", "state": "state.json", "tensors": ".work", "part": "part-"}.items():
            names = [
                path.relative_to(store) for path in files if is_of in str(path.relative_to(store / stage)) and _kind(path) == kind
            ]
            if names:
                found[f"unfinished {stage}/{kind}"] = lambda stage=stage, store=store, names=names: _unfinished(
                    lab, stage, store, names
                )
    return found


def _kind(path: Path) -> str:
    if path.parent.name == ".parts":
        return "record"
    if ".work" in path.parts:
        return "state" if path.name == "state.json" else "tensors"
    return "part"


@contextlib.contextmanager
def _unfinished(lab: Laboratory, stage: str, store: Path, names: list[Path]) -> Iterator[tuple[list[Path], Read]]:
    import os

    folder = lab.folder / "flips-unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store / stage, folder / stage, copy_function=os.link)
    key = next((folder / stage).iterdir()).name
    opened = open_store(str(folder))
    recorded = opened.read_parts(stage, key)

    def read(path: Path, before: bytes) -> tuple[str]:
        told: list[str] = []
        with _warnings(told):
            if stage == "train":
                files = _newest(opened, key, told)
            else:
                parts = opened.resume_parts(stage, key)
                if any(parts[name] != recorded[name] for name in parts):
                    return ("silent",)
                files = [record["file"]["path"] for record in parts.values() if record.get("file")]
        originals = {
            path.relative_to(store / stage / key).as_posix(): file_digest(path)
            for path in (store / stage / key).rglob("*")
            if path.is_file()
        }
        if any(file_digest(folder / stage / key / each) != originals[each] for each in files):
            return ("silent",)
        return ("detected" if told else "harmless",)

    yield [folder / name for name in names], read


def _newest(store: ArtifactStore, key: str, told: list[str]) -> list[str]:
    """The files of the checkpoint from which training would resume."""
    from pipelines.tracking.run import RunHandle
    from pipelines.training.checkpoints import NoReadableCheckpointError, newest_checkpoint
    from pipelines.workflow.stage import WorkerContext

    try:
        found = newest_checkpoint(WorkerContext(stage="train", key=key, store=store, run=RunHandle("", None)), told.append)
    except NoReadableCheckpointError as error:
        told.append(str(error))
        return []
    return [record.path for record in found.files] if found else []


@contextlib.contextmanager
def _warnings(told: list[str]) -> Iterator[None]:
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pipelines")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)


# Caches --------------------------------------------------------------------------------------------------------------------


@cache
def caches(lab: Laboratory) -> dict[str, Callable[[], Opened]]:
    found = {"download": _download, "digests": _digests, "weights": _weights}
    return {f"cache/{name}": lambda opened=opened: opened(lab) for name, opened in found.items()}


@contextlib.contextmanager
def _download(lab: Laboratory) -> Iterator[tuple[list[Path], Read]]:
    source = next(lab.oracle.rglob("model.safetensors"))
    sha256, size, copies = file_digest(source), source.stat().st_size, list[Path]()

    def fetch() -> Path:
        return local_cache.fetch(sha256, size, lambda path: copies.append(Path(shutil.copyfile(source, path))), ".safetensors")

    path = fetch()
    num_before = len(copies)

    def read(path: Path, before: bytes) -> tuple[str]:
        if file_digest(fetch()) != sha256:
            return ("silent",)
        return ("detected" if len(copies) > num_before else "harmless",)

    yield [path], read


@contextlib.contextmanager
def _weights(lab: Laboratory) -> Iterator[tuple[list[Path], Read]]:
    """Weights fetched from a bucket, and the record of their digests."""
    place, s3 = _weights_in_a_bucket(lab)
    folder = local_folder(place, "captions.encoder", s3)
    expected = {path.relative_to(folder): file_digest(path) for path in folder.rglob("*") if path.is_file()}

    def read(path: Path, before: bytes) -> tuple[str]:
        local_folder(place, "captions.encoder", s3)
        if any(file_digest(folder / name) != digest for name, digest in expected.items()):
            path.write_bytes(before)
            return ("silent",)
        return ("detected" if path.read_bytes() == before else "harmless",)

    yield [path for path in folder.parent.rglob("*") if path.is_file()], read


@cache
def _weights_in_a_bucket(lab: Laboratory) -> tuple[str, S3Config]:
    endpoint = lab.stack.enter_context(serve())
    s3 = S3Config(endpoint_url=endpoint.url, path_style=True)
    endpoint.boto.create_bucket(Bucket="weights")
    endpoint.fill(open_folder("s3://weights/clip", s3), {path.name: path.read_bytes() for path in (lab.folder / "clip").iterdir()})
    return "s3://weights/clip", s3


@contextlib.contextmanager
def _digests(lab: Laboratory) -> Iterator[tuple[list[Path], Read]]:
    folder = LocalFolder(lab.folder / "images" / "coco")
    files = [*folder.list()]
    list(folder.fingerprints(files))
    expected = [hashlib.sha256((folder.root / file.name).read_bytes()).hexdigest() for file in files]
    database = local_cache.cache_root() / "digests.sqlite"

    def read(path: Path, before: bytes) -> tuple[str]:
        try:
            return ("harmless" if list(folder.fingerprints(files)) == expected else "silent",)
        finally:
            path.write_bytes(before)

    yield [database], read


def _copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
