"""Hostile inputs: pickles that run code, names that lead out of a folder, values that nothing expects, files that are not whole.

Each reader must refuse them in one clear sentence, or read what is harmless in them. A kind of input is a function
`(random generator, an empty folder) -> (what it is, a call that reads it)`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from oracle import Laboratory, Outcome

from enat.checkpoint import load_enat
from enat.files.weights import read_state_dict
from enat.images import decode_image
from material.hostile import corpus
from pipelines.artifacts.inventory import find_all
from pipelines.artifacts.manifest import sealed
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.artifacts.transfer import write_files
from pipelines.artifacts.verification import verify
from pipelines.data.image_sets import ImageSetConfig, check_images, find_resolution
from pipelines.data.image_sets import scan as scan_images
from pipelines.data.sources.base import Findings
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.evaluation.adm_reference import NpzReference
from pipelines.run import graph
from pipelines.run.loading import load_run
from pipelines.storage.base import digest_of

Act = Callable[[], object]
_SECONDS = 30
_LONGEST = 1500  # characters of a clear sentence
_OUT = (
    *("../" * depth + "outside/x" for depth in range(2, 7)),
    "/tmp/../{outside}/x",
    "{outside}/x",
    "..",
    "a/../../../outside/x",
    "..\\..\\outside\\x",
    "x\0y",
    ".",
)
_VALUES: tuple[Any, ...] = (*_OUT, "$(touch {canary})", "`touch {canary}`", "${{oc.env:HOME}}", "${{oc.env:AWS_SECRET_ACCESS_KEY}}")
_VALUES += (
    "\x1b[2J\x1b]0;x\a",
    "<script>x</script>",
    "é" * 300,
    "",
    " ",
    None,
    True,
    -1,
    0,
    2**63,
    2**200,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
)
_VALUES += (
    {"a": {"b": 1}},
    [None] * 50,
    "1e5",
    "nan",
    "s3://",
    "s3://u:p@b/k",
    "hf://../x",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
)


def inputs(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """One input in an empty folder beside another, which must stay as it is."""
    root = lab.folder / "hostile"
    shutil.rmtree(root, ignore_errors=True)
    inside, outside = root / "inside" / "deep", root / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    (outside / "x").write_text("of somebody else")
    before, name = _listing(root, inside), rng.choice(sorted(_KINDS))
    what, act = _KINDS[name](_Filled(rng, root), inside)
    outcome = Outcome(f"{name}: {what}"[:300], "accepted")
    try:
        with _alarm():
            act()
    except ValueError as error:
        text = str(error)
        is_clear = 10 < len(text) < _LONGEST and "\n" not in text.strip() and "Traceback" not in text
        outcome.verdict, outcome.note = ("refused" if is_clear else "unclear"), "" if is_clear else repr(text)
    except TimeoutError:
        outcome.verdict = "hung"
    except BaseException as error:
        outcome.verdict, outcome.note = "unclear", f"{type(error).__name__}: {error}"
    if (root / "executed").exists():
        outcome.verdict = "executed"
    elif _listing(root, inside) != before:
        outcome.verdict, outcome.note = "outside", str(_listing(root, inside))
    return [outcome]


def _listing(root: Path, inside: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file() and inside not in p.parents and p.name != "executed"}


@contextmanager
def _alarm() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Filled:
    """Draws hostile values, which name this folder."""

    def __init__(self, rng: random.Random, root: Path) -> None:
        self.rng, self.root = rng, root

    def value(self, values: tuple[Any, ...] = _VALUES) -> Any:
        found = self.rng.choice(values)
        return found.format(outside=self.root / "outside", canary=self.root / "executed") if isinstance(found, str) else found

    def put(self, tree: Any) -> tuple[str, Any]:
        """The tree with a hostile value in a random place; or a key that nothing knows."""
        tree = json.loads(json.dumps(tree))
        places = [*_places(tree)]
        holder, key = self.rng.choice(places)
        value = self.value()
        if isinstance(holder, dict) and self.rng.random() < 0.1:
            key = str(self.value(_OUT))
        holder[key] = value
        return f"{key} is {str(value)[:60]!r}", tree

    def damage(self, content: bytes) -> tuple[str, bytes]:
        """Bytes with an end cut off, bits flipped, or a piece twice."""
        found, act = bytearray(content), self.rng.choice(("cut", "bits", "twice"))
        at = self.rng.randrange(len(found))
        if act == "cut":
            del found[at:]
        elif act == "twice":
            found[at:at] = found[at : at + 100]
        else:
            for _ in range(self.rng.choice((1, 8, 64))):
                found[self.rng.randrange(min(len(found), self.rng.choice((64, len(found)))))] ^= 1 << self.rng.randrange(8)
        return f"{act} at {at}", bytes(found)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


class _Payload:
    """What a pickle may hold: a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def _payload(given: _Filled) -> tuple[str, Any]:
    canary = str(given.root / "executed")
    calls = (
        (os.system, (f"touch {canary}",)),
        (eval, (f"open({canary!r}, 'w')",)),
        (exec, (f"open({canary!r}, 'w')",)),
        (open, (canary, "w")),
        (os.mkdir, (canary,)),
        (Path(canary).touch, ()),
        (shutil.copyfile, (str(given.root / "outside" / "x"), canary)),
        (__import__("subprocess").call, (["touch", canary],)),
    )
    call = given.rng.choice(calls)
    return getattr(call[0], "__name__", "call"), _Payload(*call)


# Kinds ---------------------------------------------------------------------------------------------------------------------


def _config(given: _Filled, folder: Path) -> tuple[str, Act]:
    values = {
        **{"name": "x", "seed": 1, "workspace": str(folder / "runs"), "store": str(folder / "store"), "targets": ["token_map"]},
        "s3": {"endpoint_url": "http://127.0.0.1:1", "region": "r"},
        "buckets": {"b": {"anonymous": True}},
        "dataset": {"kind": "digits", "name": "d", "path": None},
        "tokenizer": {"codebook_size": 32, "weights": None, "channel_multipliers": [1, 2], "recipe": {"num_steps": 3}},
        "token_map": {"shard_size": 4, "execution": {"num_workers": 1}},
        "reference": {"num_epochs": 1},
        "reconstruction": {"num_images": 4},
        "audit": {"num_rows": 4, "near": 0.5},
        "memorization": {"num_samples": 4},
        "train": {"model": {"embed_dim": 32, "num_heads": 2}, "num_steps": 2, "execution": {"checkpoint_every": 1}},
        "generate": {"num_samples": 8, "labels": [1], "sampler": {"num_steps": 2}},
        "variants": {"v": {"train": {"num_steps": 0}}},
        "tracking": {"uri": "http://127.0.0.1:1", "model_alias": "newest"},
        "base": "other.yaml",
    }
    (folder / "other.yaml").write_text("{}")
    what, tree = given.put(values)
    path = folder / "c.yaml"
    path.write_text(json.dumps(tree))
    return what, lambda: graph.build(load_run(path))


def _yaml(given: _Filled, folder: Path) -> tuple[str, Act]:
    canary = given.root / "executed"
    text = given.rng.choice(
        (
            f"name: !!python/object/apply:os.system ['touch {canary}']",
            f"name: !!python/object/new:os.system ['touch {canary}']",
            "name: !!python/name:os.system",
            "a: &a [x,x,x,x,x,x,x,x]\n"
            + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}' if i else '*a'] * 8)}]\n" for i in range(8)),
            "name: [" * 5000,
            "{" * 3000,
            "name: x\nname: y",
            "? [a, b]\n: c",
            "\x00\x01",
            "\tname: x",
            "- a\n- b",
            "name: x\nbase: c.yaml",
            "name: x\nbase: ../../outside/x",
            "name: ${oc.decode:AAAA}\n",
            "name: ${name}",
            "&x name: *x",
            "%YAML 9.9\n---\nname: x",
            "name: !!binary aGFsbG8=",
            "name: 2001-01-01",
            "1: 2",
        )
    )
    path = folder / "c.yaml"
    path.write_text(text)
    return text[:60], lambda: graph.build(load_run(path))


def _override(given: _Filled, folder: Path) -> tuple[str, Act]:
    key = given.rng.choice(
        (
            "name",
            "dataset.path",
            "train.model",
            "store",
            "tokenizer.weights",
            "variants.v",
            "seed",
            "train..x",
            "",
            "__class__",
            "train.execution",
        )
    )
    text = f"{key}={given.value()}"
    return text[:60], lambda: graph.build(load_run(None, ["name=x", f"workspace={folder}", text]))


def _stored(given: _Filled, folder: Path) -> tuple[ArtifactStore, dict[str, Any]]:
    """A store with one artifact, and the fields of its manifest."""
    from material.places import make

    store = open_store(str(folder / "store"))
    manifest = make(store, "train/x", files={"model.safetensors": b"weights", "history.json": b"[]"})
    return store, json.loads((Path(store.place("train", manifest.key)) / "manifest.json").read_text())


def _manifest(given: _Filled, folder: Path) -> tuple[str, Act]:
    """As somebody would write it who knows the format: with the right checksums."""
    store, fields = _stored(given, folder)
    what, tree = given.put(fields)
    if given.rng.random() < 0.8 and isinstance(tree.get("files"), list):
        with suppress(KeyError, TypeError, ValueError):  # what was put there cannot be sealed: the old checksum stays
            files = [[file["name"], file["size"], file["sha256"]] for file in sorted(tree["files"], key=lambda file: file["name"])]
            tree["digest"] = digest_of({"stage": tree["stage"], "key": tree["key"], "files": files})
            tree["checksum"] = digest_of({name: value for name, value in tree.items() if name != "checksum"})
    (Path(store.place("train", fields["key"])) / "manifest.json").write_text(json.dumps(tree))

    def act() -> None:
        manifest = store.read_manifest("train", fields["key"])
        assert manifest is not None
        for _ in verify(store, [manifest]):
            pass
        write_files(store, manifest, folder / "pulled")
        store.discard_work(manifest)

    return what, act


def _record(given: _Filled, folder: Path) -> tuple[str, Act]:
    """Of a part, of a use or of a checkpoint: sealed."""
    store, fields = _stored(given, folder)
    key, kind = fields["key"], given.rng.choice(("part", "use", "checkpoint"))
    file = {"name": "part-0.parquet", "path": "part-0.parquet", "size": 3, "sha256": "0" * 64}
    records: dict[str, dict[str, Any]] = {
        "part": {"file": file, "rows": 3, "part": 0},
        "use": {"inputs": [["train", key]]},
        "checkpoint": {"tensors": file, "state": file},
    }
    what, tree = given.put(records[kind])
    names = {"part": ".parts/part-0.json", "use": ".used", "checkpoint": ".parts/checkpoint-00000002-abc-00000-of-00001.json"}
    path = Path(store.place("train", key)) / names[kind]
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_bytes(sealed(tree))
    except ValueError:
        path.write_text(json.dumps(tree))

    def act() -> None:
        if kind == "use":
            store.recorded_inputs("train", key)
        elif kind == "part":
            store.resume_parts("train", key)
        else:
            from files import _newest

            _newest(store, key, [])

    return f"{kind} {what}", act


def _image(given: _Filled, folder: Path) -> tuple[str, Act]:
    file = given.rng.choice(corpus())
    what, data = given.damage(file.data) if file.data and given.rng.random() < 0.6 else ("as it is", file.data)
    return f"{file.name} {what}", lambda: decode_image(data)


def _weights(given: _Filled, folder: Path) -> tuple[str, Act]:
    what, payload = _payload(given)
    path, content = (
        folder / given.rng.choice(("x.ckpt", "x.pth", "x.safetensors", "x.bin")),
        given.rng.choice((payload, {"state_dict": payload}, [payload], {"a": 1, "model": {"w": payload}})),
    )
    buffer = io.BytesIO()
    if given.rng.random() < 0.5:
        pickle.dump(content, buffer, protocol=given.rng.choice((0, 2, 4)))
    else:
        import torch

        torch.save(content, buffer, _use_new_zipfile_serialization=given.rng.random() < 0.5)
    path.write_bytes(buffer.getvalue())
    return f"{path.name} with {what}", lambda: read_state_dict(path)


def _tensors(given: _Filled, folder: Path, lab: Laboratory | None = None) -> tuple[str, Act]:
    """A file of weights with another header, or damaged."""
    import torch

    from enat import ENAT, ENATConfig
    from enat.checkpoint import save_weights

    path = folder / "x.safetensors"
    torch.manual_seed(0)
    save_weights(
        path,
        ENAT(
            ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=16, num_heads=2, grid_size=2, codebook_size=8, num_classes=2)
        ),
    )
    data = path.read_bytes()
    if given.rng.random() < 0.5:
        what, data = given.damage(data[: given.rng.choice((400, len(data)))])
    else:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"]["enat"] = json.loads(header["__metadata__"]["enat"])
        what, header = given.put(header)
        meta = header.get("__metadata__")
        if isinstance(meta, dict) and not isinstance(meta.get("enat"), str):
            meta["enat"] = json.dumps(meta.get("enat"))
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    path.write_bytes(data)
    return what, lambda: load_enat(path)


def _npz(given: _Filled, folder: Path) -> tuple[str, Act]:
    what, payload = _payload(given)
    arrays = {"mu": np.zeros(8), "sigma": np.eye(8), "arr_0": np.zeros((3, 8, 8, 3), np.uint8)}
    name, act = given.rng.choice(sorted(arrays)), given.rng.choice(("pickle", "damage", "shape", "name", "type"))
    path = folder / "x.npz"
    if act == "pickle":
        arrays[name] = np.array([payload], dtype=object)
    elif act == "shape":
        arrays[name] = np.zeros(given.rng.choice(((0,), (1, 1, 1, 1, 1), (3, 8, 8), (2**20, 0, 8, 3))))
    elif act == "type":
        arrays[name] = arrays[name].astype(given.rng.choice(("U8", "complex64", "bool", "float16")))
    np.savez(path, **arrays)
    if act == "damage":
        what, data = given.damage(path.read_bytes())
        path.write_bytes(data)
    elif act == "name":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(str(given.value(_OUT)).replace("\0", "") + ".npy", b"x")
    which = given.rng.random() < 0.5
    return f"{act} {name} {what}", lambda: NpzReference.open(str(path), None) if which else _images_of(path)


def _images_of(path: Path) -> None:
    config = ImageSetConfig(path=str(path), name="x")
    config.identity()
    check_images(config, scan_images(config, Findings()), find_resolution(config))


def _tar(given: _Filled, folder: Path) -> tuple[str, Act]:
    buffer, good = io.BytesIO(), corpus()[0].data
    name = str(given.value(_OUT)).replace("\0", "")
    kind = given.rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))
    with tarfile.open(fileobj=buffer, mode="w", format=given.rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for member in ("a.jpg", f"{name}.jpg", "a.cls"):
            info = tarfile.TarInfo(member)
            info.size = len(good)
            if member not in ("a.jpg", "a.cls"):
                info.type, info.linkname = kind, name
                info.size = len(good) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(good))
    path = folder / "x.tar"
    what, data = given.damage(buffer.getvalue()) if given.rng.random() < 0.4 else ("whole", buffer.getvalue())
    path.write_bytes(data)
    which = given.rng.random() < 0.5
    return f"{name} of type {kind!r}, {what}", lambda: _images_of(path) if which else _dataset(kind="tar", path=str(path))


def _parquet(given: _Filled, folder: Path) -> tuple[str, Act]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, rng = corpus()[0].data, given.rng
    images: Any = rng.choice(
        (
            [{"bytes": good, "path": str(given.value(_OUT))}],
            [{"bytes": None, "path": "/etc/passwd"}],
            [good],
            [1],
            ["x"],
            [[good]],
            [None],
        )
    )
    labels = rng.choice(([0], [-1], [2**40], ["a"], [None], [1.5]))
    features = {
        "image": {"_type": "Image"},
        "label": {"names": rng.choice((["a"], None, 3, [given.value()])), "_type": "ClassLabel"},
    }
    table = pa.table({rng.choice(("image", "img", "")): images, "label": labels})
    table = table.replace_schema_metadata(
        {"huggingface": rng.choice((json.dumps({"info": {"features": features}}), "{", "[]", "null"))}
    )
    path = folder / "x.parquet"
    pq.write_table(table, path)
    what = "whole"
    if rng.random() < 0.4:
        what, data = given.damage(path.read_bytes())
        path.write_bytes(data)
    return f"{str(images)[-60:]}, {labels}, {what}", lambda: _dataset(kind="parquet", path=str(path))


def _coco(given: _Filled, folder: Path) -> tuple[str, Act]:
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(corpus()[0].data)
    tree = {
        "info": {},
        "images": [{"id": 1, "file_name": "a.jpg", "height": 1}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}],
    }
    what, tree = given.put(tree)
    text = json.dumps(tree)
    if given.rng.random() < 0.2:
        text = given.rng.choice(("[" * 100_000, text[: len(text) // 2], "", "null", "\0"))
    (folder / "c.json").write_text(text)
    return what, lambda: _dataset(kind="coco", path=str(folder / "images"), captions=str(folder / "c.json"))


def _dataset(**given: Any) -> None:
    """List it and read its images, as the stages do."""
    source, findings = open_source(DatasetConfig(**given)), Findings()
    source.known_classes()
    for unit in source.units():
        entries = source.scan(unit, findings)
        for content in source.read(entries):
            try:
                decode_image(content)
            except ValueError:
                continue  # quarantined


def _name(given: _Filled, folder: Path) -> tuple[str, Act]:
    store, _ = _stored(given, folder)
    name = str(given.value())
    return name[:60], lambda: find_all(store, [name])


def _place(given: _Filled, folder: Path) -> tuple[str, Act]:
    name = str(given.value())
    return name[:60], lambda: [*open_store(name).names()] if not name.startswith(("s3", "hf")) else open_store(name)


_KINDS: dict[str, Callable[[_Filled, Path], tuple[str, Act]]] = {
    "config": _config,
    "yaml": _yaml,
    "override": _override,
    "manifest": _manifest,
    "record": _record,
    "image": _image,
    "weights": _weights,
    "safetensors": _tensors,
    "npz": _npz,
    "tar": _tar,
    "parquet": _parquet,
    "coco": _coco,
    "name": _name,
    "place": _place,
}
