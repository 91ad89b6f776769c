"""Folders and files that may lie on the Hugging Face hub: hf://owner/name[@revision] and hf://owner/name/path/in/repo[@revision].

What was fetched stays in huggingface_hub's own cache, so an unchanged one is fetched once; with HF_HUB_OFFLINE=1 the cache is all
there is. A revision may be a branch, a tag or a commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SCHEME = "hf://"
# Pickles are not among them: what is not fetched cannot be opened by mistake.
WEIGHTS_AND_TEXT = ("*.safetensors", "*.json", "*.txt")
_LIKE_A_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REFERENCE = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True)
class HubReference:
    """repository: owner/name.   path: of a file in it, None for all of it.   revision: None for the repository's main branch."""

    repository: str
    path: str | None
    revision: str | None


def parse_reference(reference: str) -> HubReference:
    """Raises ValueError where reference has another form."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference} is no place on the hub; write hf://owner/name[/path][@revision]")
    return HubReference(match["repository"], match["path"], match["revision"])


def fetch_folder(reference: str, patterns: Sequence[str] = WEIGHTS_AND_TEXT) -> Path:
    """The local folder of a reference: a path as it is, a repository of the hub after its files that fit patterns are fetched.

    Raises ValueError where there is no such folder, or it cannot be had.
    """
    if not _is_remote(reference):
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            is_repository = _LIKE_A_REPOSITORY.fullmatch(reference)
            advice = f"a repository of the hub is written {SCHEME}{reference}" if is_repository else "correct the path"
            raise ValueError(f"{reference} is no folder; {advice}")
        return folder
    place = parse_reference(reference)
    if place.path is not None:
        raise ValueError(f"{reference} names a file; a whole repository is needed: hf://{place.repository}")
    from huggingface_hub import snapshot_download

    folder = _fetched(
        reference, lambda: snapshot_download(place.repository, revision=place.revision, allow_patterns=list(patterns))
    )
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"{reference} has no files that fit {', '.join(patterns)}")
    return folder


def fetch_file(reference: str) -> Path:
    """The local path of a file: a path as it is, a file of the hub after it is fetched. Raises ValueError as fetch_folder does."""
    if not _is_remote(reference):
        file = Path(reference).expanduser()
        if not file.is_file():
            raise ValueError(f"{reference} is no file; correct the path, or give s3://bucket/key or hf://owner/name/file")
        return file
    place = parse_reference(reference)
    if place.path is None:
        raise ValueError(f"{reference} names a whole repository; a file is needed: hf://{place.repository}/path/of/the/file")
    path = place.path
    from huggingface_hub import hf_hub_download

    return _fetched(reference, lambda: hf_hub_download(place.repository, path, revision=place.revision))


def _is_remote(reference: str) -> bool:
    if reference.startswith(SCHEME):
        return True
    if "://" in reference:
        raise ValueError(f"{reference} is neither a local path nor a place on the hub (hf://owner/name)")
    return False


def _fetched(reference: str, fetch: Callable[[], str]) -> Path:
    """fetch's answer; its errors as one sentence."""
    import httpx2
    from huggingface_hub import errors

    try:
        return Path(fetch())
    except errors.GatedRepoError as error:  # before its base class
        reason = "its owner grants access on request, and HF_TOKEN has none; ask for it on the hub"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "there is no such repository, or HF_TOKEN may not see it; correct the name, or set another token"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.RevisionNotFoundError as error:
        reason = "the repository has no such revision; name a branch, tag or commit"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached, and the local cache does not hold it; give a path"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except errors.EntryNotFoundError as error:
        reason = "the repository has no such file; look at its names on the hub"
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{reference} cannot be fetched: {reason}") from error
