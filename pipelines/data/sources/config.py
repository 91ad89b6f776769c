"""The configuration of a dataset, and opening its source."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from enat.config import check_choices
from pipelines.data.sources import names
from pipelines.data.sources.base import MAX_LABEL, RangeSource, Source
from pipelines.data.sources.names import check_split, folder_of_split, pattern_of
from pipelines.storage.base import StorageError
from pipelines.storage.open import open_folder, pinned
from pipelines.storage.s3_client import S3Config

KINDS = ("digits", "image_folder", "images", "tar", "parquet", "coco")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A dataset: its layout, its path and its name."""

    kind: str
    """Layout of the dataset. "digits": the 1,797 images of 8 x 8 px that scikit-learn brings, without a path. "image_folder":
    <class>/**/*.jpg, with classes numbered by sorted name. "images": images at any depth, without labels. "tar": *.tar of
    <key>.jpg|jpeg|png, <key>.cls and captions in <key>.txt or <key>.json (WebDataset, img2dataset). "parquet": *.parquet with
    columns image (bytes, or a struct with bytes and path), label and caption. "coco": images with a captions_*.json."""
    name: str | None = None
    """Name in reports, comparisons and MLflow, and in the names of models. Null takes the kind. It can be corrected: everything but
    the report is reused."""
    path: str | None = None
    """A folder, s3://bucket/prefix, hf://datasets/owner/name[@revision][/folder], or another address that is only read, such as
    gs://bucket/prefix. For tar and parquet also a file, or a pattern of files: data/train-*.parquet, {0000..1023}.tar."""
    split: str | None = None
    """The split to read where path holds several: train, validation or test. Files of tar and parquet belong to a split by their
    names, such as train-00000.parquet; images and folders of classes by the folder."""
    captions: str | None = None
    """The captions_*.json of kind "coco": a path or address, as for path."""
    num_classes: int | None = None
    """Number of classes of tar and Parquet files, if it is not the largest label plus one."""
    label_column: str = "label"
    """Column of Parquet files with the class number."""
    caption_column: str | None = None
    """Column of Parquet files with a caption or a list of captions. Null takes the first of caption, captions and text."""
    s3: S3Config | None = field(default=None, metadata={"set_by": "s3 or buckets"})
    """Access to the bucket."""

    def __post_init__(self) -> None:
        check_choices(self, kind=KINDS)
        if self.kind != "digits" and not self.path:
            raise ValueError(f"path is missing; for kind {self.kind} it must name the folder or bucket of the images")
        if (self.kind == "coco") != (self.captions is not None):
            raise ValueError("captions (a captions_*.json) requires kind coco and vice versa; give both or neither")
        if self.num_classes is not None and (self.kind not in ("tar", "parquet") or not 0 < self.num_classes <= MAX_LABEL + 1):
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be 1 to {MAX_LABEL + 1:,}, and applies to kinds tar and parquet only. "
                "Other kinds determine it from the dataset"
            )
        if self.split is not None:
            check_split(self.split)
            if self.kind in ("digits", "coco"):
                raise ValueError(f"split does not apply to kind {self.kind}; remove it")
        if self.kind == "digits" and self.path:
            raise ValueError(f"path is {self.path}, but kind digits has no path; set kind to the layout of the files")
        if self.kind != "parquet" and (self.label_column, self.caption_column) != ("label", None):
            raise ValueError("label_column and caption_column apply to kind parquet only; remove them")

    @property
    def title(self) -> str:
        return self.name or self.kind

    def pinned(self) -> Self:
        """With the commits of addresses on the Hugging Face hub, so that all workers read the same."""
        path, captions = (place if place is None else pinned(place) for place in (self.path, self.captions))
        return replace(self, path=path, captions=captions)

    def identity(self) -> dict[str, Any]:
        """path and split enter by the content that they choose."""
        columns = {"label_column": self.label_column} if self.label_column != "label" else {}
        columns |= {"caption_column": self.caption_column} if self.caption_column is not None else {}
        content = open_source(self).fingerprint()
        return {"kind": self.kind, "num_classes": self.num_classes, "content": content} | columns


def describe_splits(config: DatasetConfig) -> str:
    """The splits that the path of a dataset holds, and which of them is read; "" if its files and folders name no split.

    Raises ValueError if there are several and none is chosen.
    """
    from pipelines.data.sources import tar

    source = open_source(config)
    if config.kind in ("tar", "parquet"):
        assert isinstance(source, RangeSource) and config.path is not None
        suffixes = tar.SUFFIXES if config.kind == "tar" else (".parquet",)
        pattern = pattern_of(config.path, f".{config.kind}")[1]
        held = names.describe_splits(names.own_files(source.folder, suffixes))
        read = names.describe_splits(names.select(source.folder, suffixes, pattern, config.split))
    elif config.split is not None and config.path is not None:
        folder = open_folder(config.path, config.s3 or S3Config())
        held = ", ".join(name for name in folder.folders() if names.split_of_folder(name) is not None)
        read = folder_of_split(folder, config.split)
    else:
        return ""
    one = "" if held.startswith(names.NO_SPLIT) and "," not in held else held
    return one if read == held else f"{held}, of which {read} is read"


def open_source(config: DatasetConfig) -> Source:
    """Open the source of a dataset. Raises ValueError if the dataset does not exist."""
    from pipelines.data.sources import coco, digits, folders, parquet, tar

    if config.kind == "digits":
        return digits.DigitsSource()
    assert config.path is not None
    path, pattern, s3 = config.path, None, config.s3 or S3Config()
    if config.kind in ("tar", "parquet"):
        path, pattern = pattern_of(path, f".{config.kind}")  # Spark names folders like files. A / at the end marks a folder
    try:
        folder = open_folder(path, s3)
        if config.split is not None and config.kind in ("image_folder", "images"):
            folder = open_folder(f"{path.rstrip('/')}/{folder_of_split(folder, config.split)}", s3)
    except StorageError as error:
        raise ValueError(f"dataset.path: {error}") from error
    if config.kind == "image_folder":
        return folders.ClassFolderSource(folder)
    if config.kind == "images":
        return folders.ImageFolderSource(folder)
    if config.kind == "tar":
        return tar.TarSource(folder, pattern, config.split)
    if config.kind == "parquet":
        return parquet.ParquetSource(folder, pattern, config.split, config.label_column, config.caption_column)
    assert config.captions is not None
    return coco.CocoSource(folder, config.captions, s3)
