"""Which files of a folder belong to a dataset: not those that systems and programs leave behind, and those of one split only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from pipelines.storage.base import Folder, StoredFile

# Names of images. Only JPEG and PNG can be decoded; images of other formats belong to the dataset and end in quarantine.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FOREIGN = "hidden or foreign files"  # what findings call them
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLITS = tuple(dict.fromkeys(_SPLITS.values()))
NO_SPLIT = "no split"  # what messages call files that name none
_FOREIGN = re.compile(
    r"(^|/)(\.|(__MACOSX|lost\+found|@eaDir|@Recycle|@Recently-Snapshot|#recycle|#snapshot|\$RECYCLE\.BIN|RECYCLER"
    r"|System Volume Information|Thumbs\.db|desktop\.ini)(/|$))",
    re.IGNORECASE,
)
_FOLDER_OF_SPLIT = re.compile(r"([a-z]+)[-_ ]?\d*")
_WILDCARDS = re.compile(r"[*?\[]")
_NAMES_AT_MOST = 100_000  # that braces may stand for
_NAMED = 3


def is_image(name: str) -> bool:
    """Whether a name is that of an image of the dataset."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_foreign(name)


def is_foreign(name: str) -> bool:
    """Whether a file or folder, or a folder above it, is hidden or left by an operating system, a file server or an archiver.

    Such as .ipynb_checkpoints, macOS's ._a.jpg, and the thumbnails in @eaDir of a Synology server.
    """
    return _FOREIGN.search(name) is not None


def split_of(name: str) -> str | None:
    """The split that the words of a file's path name, such as "train" for data/train-00000-of-00005.parquet."""
    words = re.findall(r"[a-z]+", name.lower())
    return "+".join(dict.fromkeys(_SPLITS[word] for word in words if word in _SPLITS)) or None


def split_of_folder(name: str) -> str | None:
    """The split that a folder is named after, such as "validation" for val2017. train_station is the name of a class."""
    match = _FOLDER_OF_SPLIT.fullmatch(name.lower())
    return _SPLITS.get(match[1]) if match else None


def are_several(folders: Iterable[str]) -> bool:
    """Whether folders are named after more than one split."""
    return len({split_of_folder(name) for name in folders} - {None}) > 1


def check_split(split: str) -> str:
    """The name of a split without its variants: "validation" for "val". Raises ValueError for another word."""
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}, or give a pattern in path")
    return _SPLITS[split]


def folder_of_split(folder: Folder, split: str) -> str:
    """The sub-folder of a split. Raises ValueError if there is not exactly one."""
    found = [name for name in folder.folders() if split_of_folder(name) == check_split(split)]
    if len(found) != 1:
        names = ", ".join(found or folder.folders()[:_NAMED]) or "no folders"
        raise ValueError(
            f"dataset.split is {split}, but {folder.uri} has {len(found)} folders of this split ({names}); correct dataset.path"
        )
    return found[0]


def pattern_of(path: str, suffix: str) -> tuple[str, str | None]:
    """The folder of a path, and the pattern of the files in it, or None for all: data/train-*.parquet, {0000..1023}.tar, a.tar."""
    if Path(path).is_dir():
        return path, None
    if match := re.fullmatch(r"(.*?)([^/]*[*?\[{].*)", path):
        return match[1] or ".", match[2]
    parent, slash, name = path.rpartition("/")
    return (parent + slash or ".", name) if path.endswith(suffix) else (path, None)


def select(folder: Folder, suffixes: Sequence[str], pattern: str | None, split: str | None) -> list[StoredFile]:
    """The files of a folder that match a pattern and belong to a split, in order.

    Raises ValueError if there are none, if a file that the pattern names does not exist, or if files of several splits are found
    and neither a split nor a pattern chooses among them.
    """
    found = own_files(folder, suffixes)
    if pattern is not None:
        found = _matching(folder, found, pattern)
    if split is not None:
        chosen = [file for file in found if split_of(file.name) == check_split(split)]
        if found and not chosen:
            raise ValueError(f"dataset.split is {split}, but dataset.path {folder.uri} has {describe_splits(found)}")
        found = chosen
    elif pattern is None and len({split_of(file.name) for file in found} - {None}) > 1:
        raise ValueError(
            f"dataset.path {folder.uri} holds several splits: {describe_splits(found)}. Choose one with dataset.split, or its "
            f"files with a pattern such as dataset.path={folder.uri}/train-*{suffixes[0]}"
        )
    if not found:
        raise ValueError(f"dataset.path {folder.uri} has no {suffixes[0]} files")
    return found


def own_files(folder: Folder, suffixes: Sequence[str]) -> list[StoredFile]:
    """The files of a dataset in a folder, of all splits."""
    return [file for file in folder.list() if file.name.endswith(tuple(suffixes)) and not is_foreign(file.name)]


def describe_splits(files: Iterable[StoredFile]) -> str:
    """Such as "train (5 files), validation (1 file)"."""
    counts = Counter(split_of(file.name) or NO_SPLIT for file in files)
    return ", ".join(f"{split} ({count:,} file{'s' if count > 1 else ''})" for split, count in counts.items())


def _matching(folder: Folder, files: Sequence[StoredFile], pattern: str) -> list[StoredFile]:
    if any(file.name == pattern for file in files):  # a name with a brace in it
        return [file for file in files if file.name == pattern]
    import bracex

    try:
        patterns = bracex.expand(pattern, limit=_NAMES_AT_MOST)
    except bracex.ExpansionLimitException as error:
        raise ValueError(f"dataset.path: {pattern} names more than {_NAMES_AT_MOST:,} files; use * instead") from error
    names = {name for name in patterns if not _WILDCARDS.search(name)}
    wildcards = [each.split("/") for each in patterns if each not in names]

    def is_meant(name: str) -> bool:
        parts = name.split("/")
        return name in names or any(len(parts) == len(each) and all(map(fnmatchcase, parts, each)) for each in wildcards)

    found = [file for file in files if is_meant(file.name)]
    missing = sorted(names - {file.name for file in found}) or ([] if found else [pattern])
    if missing:
        more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        raise ValueError(f"dataset.path {folder.uri} has no {', '.join(missing[:_NAMED])}{more}")
    return found
