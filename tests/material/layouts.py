"""The same photographs in every layout of a dataset, with the expected rows of each layout, known without reading it.

`make_layouts` writes them below one folder: image_folder/, images/, tar/, parquet/ and coco/ with captions.json. The classes are
photographs that scikit-image brings along, the images crops of them, JPEG and PNG in turn.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import INDEX, Dataset, write_index
from pipelines.data.sources.base import Entry, Findings
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.storage.base import file_digest

CLASSES = ("astronaut", "chelsea", "coffee", "rocket")  # in the order of their numbers
KINDS = ("image_folder", "images", "tar", "parquet", "coco")
_SUFFIXES = (".jpg", ".png", ".JPEG", ".jpeg")
_PER_FILE = 6  # images of one tar shard or Parquet file
_PER_ROW_GROUP = 2


@dataclass(frozen=True)
class Picture:
    """One photograph of every layout. captions: in the order of their ids, with single spaces."""

    name: str
    data: bytes
    label: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """The expected content of a picture in one layout."""

    key: str
    data: bytes
    label: int = -1
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layouts:
    root: Path
    pictures: tuple[Picture, ...]

    def config(self, kind: str, place: str | None = None, **given: Any) -> DatasetConfig:
        """`place`: the root of a copy."""
        place = place or str(self.root)
        captions = f"{place}/captions.json" if kind == "coco" else None
        return DatasetConfig(kind=kind, path=f"{place}/{kind}", captions=captions, **given)

    def rows(self, kind: str) -> list[Row]:
        """The expected rows, in order."""
        if kind == "image_folder":
            named = {class_folder_name(number, picture): picture for number, picture in enumerate(self.pictures)}
            return [Row(name, named[name].data, named[name].label) for name in sorted(named, key=str.encode)]
        if kind == "images":
            return [Row(picture.name, picture.data) for picture in self.pictures]
        if kind == "tar":
            return [Row(picture.name.partition(".")[0], picture.data, picture.label) for picture in self.pictures]
        if kind == "parquet":
            return [Row(picture.name, picture.data, picture.label) for picture in self.pictures]
        return [Row(picture.name, picture.data, captions=picture.captions) for picture in self.pictures]

    def contents(self) -> dict[str, bytes]:
        """All files by name, to fill a bucket."""
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


def make_layouts(root: Path, num_images: int = 20) -> Layouts:
    pictures = tuple(_picture(number) for number in range(num_images))
    for number, picture in enumerate(pictures):
        write(root / "image_folder" / class_folder_name(number, picture), picture.data)
        write(root / "images" / picture.name, picture.data)
        write(root / "coco" / picture.name, picture.data)
    write(root / "captions.json", json.dumps(coco_captions(pictures)).encode())
    for part, start in enumerate(range(0, num_images, _PER_FILE)):
        some = pictures[start : start + _PER_FILE]
        members: dict[str, bytes] = {}
        for picture in some:
            members[picture.name] = picture.data
            members[picture.name.partition(".")[0] + ".cls"] = b"%d\n" % picture.label
        write(root / "tar" / f"train-{part:04d}.tar", tar_bytes(members.items()))
        write_parquet(root / "parquet" / f"train-{part:05d}.parquet", some)
    return Layouts(root, pictures)


def class_folder_name(number: int, picture: Picture) -> str:
    """At three depths."""
    return f"{CLASSES[picture.label]}/{('', 'deeper/', 'deeper/still/')[number // len(CLASSES) % 3]}{picture.name}"


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar_bytes(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    """`members`: files by name and content, or TarInfo for members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def write_parquet(path: Path, pictures: Sequence[Picture], class_names: Sequence[str] | None = CLASSES) -> Path:
    """Write images as Hugging Face's datasets library does. `class_names`: None omits its metadata."""
    table = pa.table(
        {
            "image": pa.array([{"bytes": p.data, "path": p.name} for p in pictures], IMAGE_TYPE),
            "label": pa.array([p.label for p in pictures], pa.int64()),
        }
    )
    features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
    if class_names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return write_table(path, table)


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_table(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=_PER_ROW_GROUP)
    return path


def coco_captions(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Ids of images and captions are in the reverse order of names; captions have line breaks and spaces like the real ones."""
    images = [{"id": 9000 - number, "file_name": picture.name, "height": 1} for number, picture in enumerate(pictures)]
    annotations: list[Mapping[str, Any]] = []
    for number, picture in enumerate(pictures):
        for order, caption in enumerate(picture.captions):
            spaced = f" {caption.replace(' ', '  ' if order else chr(10))} "
            annotations.append({"id": 10 * number + order, "image_id": 9000 - number, "caption": spaced})
    return {"info": {}, "images": images, "annotations": annotations[::-1]}


def _picture(number: int) -> Picture:
    label = number % len(CLASSES)
    photograph = _photograph(CLASSES[label])
    left, top = 37 * number % (photograph.width - 170), 29 * number % (photograph.height - 170)
    crop = photograph.crop((left, top, left + 80 + 11 * (number % 8), top + 140 - 7 * (number % 8)))
    suffix, buffer = _SUFFIXES[number % 7 % 4], io.BytesIO()
    crop.save(buffer, "PNG" if suffix == ".png" else "JPEG")
    captions = tuple(f"view {order} of {CLASSES[label]}, number {number}" for order in range(1 + number % 3))
    return Picture(f"picture-{number:04d}{suffix}", buffer.getvalue(), label, captions)


@cache
def _photograph(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())


# Reading -------------------------------------------------------------------------------------------------------------------


def scan(given: DatasetConfig, findings: Findings | None = None) -> list[Entry]:
    source = open_source(given)
    found = Findings() if findings is None else findings
    return [entry for unit in source.units() for entry in source.scan(unit, found)]


def found_in(given: DatasetConfig) -> dict[str, list[str]]:
    findings = Findings()
    scan(given, findings)
    return findings.names


def read(given: DatasetConfig) -> list[Row]:
    """All rows of a dataset, read without an index."""
    entries = scan(given)
    contents = open_source(given).read(entries)
    return [Row(e.key, content, e.label, e.captions) for e, content in zip(entries, contents, strict=True)]


def open_dataset(given: DatasetConfig, store: ArtifactStore) -> Dataset:
    """A dataset with an index that is made here, without the stage and without Ray."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / INDEX
        index = write_index(path, scan(given))
        key = file_digest(path)
        file = store.put_file("dataset", key, INDEX, path)
    known = open_source(given).known_classes()
    summary = {
        "name": given.title,
        "num_images": index.num_images,
        "num_captions": index.num_captions,
        "class_names": list(map(str, range(max(index.images_per_label) + 1)) if known is None else known),
    }
    manifest = Manifest(stage="dataset", key=key, stage_version=1, config={}, inputs={}, files=(file,), summary=summary)
    return Dataset(given, store, store.commit(manifest))


def sentence_of(act: Callable[[], object]) -> str:
    """The message of the ValueError that an act raises, or an empty string."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""
