"""COCO: a folder of images, and a captions_*.json with the captions of each image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from pipelines.data.sources.base import Entry, Findings, RangeSource
from pipelines.storage.base import Folder, StorageError, digest_of
from pipelines.storage.open import open_folder
from pipelines.storage.s3_client import S3Config


class CocoSource(RangeSource):
    """Every image of a folder with its captions in the order of their ids. White space in captions becomes single spaces."""

    def __init__(self, folder: Folder, captions: str, s3: S3Config) -> None:
        super().__init__(folder)
        self._captions_place, self._s3 = captions, s3

    @cached_property
    def _content(self) -> bytes:
        parent, slash, name = self._captions_place.rpartition("/")
        try:
            return open_folder(parent + slash or ".", self._s3).read(name)
        except StorageError as error:
            raise ValueError(f"dataset.captions: {error}") from error

    @cached_property
    def _captions(self) -> dict[str, list[str]]:
        """Image file -> captions; an image without captions has []. Captions that are null are left out."""
        try:
            parsed = json.loads(self._content)
            names = {int(image["id"]): str(image["file_name"]) for image in parsed["images"]}
            captions: dict[str, list[str]] = {name: [] for name in names.values()}
            for annotation in sorted(parsed["annotations"], key=lambda annotation: int(annotation["id"])):
                if (caption := annotation["caption"]) is not None:
                    captions[names[int(annotation["image_id"])]].append(" ".join(str(caption).split()))
            for name, own in captions.items():
                "".join([name, *own]).encode()  # JSON can hold unpaired surrogates, which UTF-8 cannot encode
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"dataset.captions {self._captions_place} is not a valid COCO captions file "
                f"(images with id and file_name, annotations with id, image_id and caption): {type(error).__name__} {error}"
            ) from error
        return captions

    def fingerprint(self) -> str:
        return digest_of([super().fingerprint(), hashlib.sha256(self._content).hexdigest()])

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        captions = dict(self._captions)
        for entry in super().scan(unit, findings):
            own = captions.pop(entry.key, [])
            if not own:
                findings.add("images without captions", entry.key)
            yield replace(entry, captions=tuple(own))
        for name in sorted(captions):
            findings.add("captions of absent images", name)
