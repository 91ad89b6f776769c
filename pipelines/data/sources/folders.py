"""Folders of image files, one per class, as ImageNet is unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from pipelines.data.sources.base import Entry, Findings, RangeSource, content_digest
from pipelines.data.sources.names import FOREIGN, are_several, is_foreign, is_image, split_of_folder
from pipelines.storage.base import Folder, digest_of

_LOOSE = ""  # the unit of files beside the class folders: not part of the dataset, but reported


class ClassFolderSource(RangeSource):
    """One folder per class with images at any depth. Classes are numbered in the sorted order of their names."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        if not self.class_names:
            raise ValueError(
                f"dataset.path {folder.uri} has no class folders. For a folder of images without labels use kind images"
            )
        splits = [name for name in self.class_names if split_of_folder(name) is not None]
        if are_several(splits) or any(_holds_only_folders(folder, name) for name in splits):
            raise ValueError(
                f"dataset.path {folder.uri} holds splits, not classes ({', '.join(splits)}); choose one with dataset.split"
            )

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.folder.folders() if not is_foreign(name))

    def known_classes(self) -> Sequence[str]:
        return self.class_names

    def fingerprint(self) -> str:
        classes = set(self.class_names)
        # Includes the names of classes: a class folder without images shifts the numbers of later classes.
        images = (file for file in self.folder.list() if is_image(file.name) and file.name.partition("/")[0] in classes)
        return digest_of([self.class_names, content_digest(self.folder, images)])

    def units(self) -> Sequence[str]:
        return (_LOOSE, *self.class_names)

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        if unit == _LOOSE:
            for name in self.folder.entries():
                if name.rstrip("/") not in self.class_names:
                    findings.add(FOREIGN if is_foreign(name) else "other files", name)
            return
        for entry in super().scan(f"{unit}/", findings):
            yield replace(entry, label=self.class_names.index(unit))


class ImageFolderSource(RangeSource):
    """Images at any depth, without labels."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        if are_several(names := folder.folders()):
            splits = ", ".join(name for name in names if split_of_folder(name) is not None)
            raise ValueError(f"dataset.path {folder.uri} holds several splits ({splits}); choose one with dataset.split")


def _holds_only_folders(folder: Folder, name: str) -> bool:
    """As a split does; a class holds images. "train" may be either."""
    entries = [entry for entry in folder.entries(f"{name}/") if not is_foreign(entry)]
    return bool(entries) and all(entry.endswith("/") for entry in entries)
