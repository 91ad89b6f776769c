"""A model as a folder that others can open, on a disk or as a repository of the Hugging Face hub.

    config.json          architectures of model and tokenizer, the usual sampler, names of classes
    model.safetensors    weights of the ENAT
    vqgan.safetensors    weights of its tokenizer
    README.md            the card, for people

Imports no torch. A token for private repositories comes from huggingface_hub's own environment (HF_TOKEN).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG, MODEL, TOKENIZER, CARD = "config.json", "model.safetensors", "vqgan.safetensors", "README.md"
FORMAT = 1  # of config.json
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return _REPOSITORY.fullmatch(name) is not None and not any(part in (".", "..") for part in name.split("/"))


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: `source` itself, or the files of owner/name on the hub, which huggingface_hub keeps.

    revision: a branch, tag or commit of the repository. Only config.json and the weights are fetched. Raises ValueError if there is
    no such folder or repository.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_repository(str(source)):
        raise ValueError(f"{source} is not a directory; give the folder of an exported model, or owner/name of the hub")
    from huggingface_hub import snapshot_download

    with explained(str(source), "is not a directory and cannot be fetched from the hub"):
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[CONFIG, MODEL, TOKENIZER]))


@contextmanager
def explained(reference: str, failure: str = "cannot be fetched") -> Iterator[None]:
    """Errors of the hub become one sentence, a ValueError."""
    import httpx2
    from huggingface_hub import errors

    reasons = {  # a class before its base
        errors.GatedRepoError: "its owner grants access on request, and HF_TOKEN has none; ask for it on the hub",
        errors.RepositoryNotFoundError: (
            "the repository does not exist, or HF_TOKEN may not see it; correct the name, or set another token"
        ),
        errors.RevisionNotFoundError: "the repository has no such revision; name a branch, tag or commit",
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and the local cache does not hold it; give a path",
        errors.EntryNotFoundError: "the repository has no such file; look at its names on the hub",
        errors.LocalTokenNotFoundError: "there is no token; set HF_TOKEN to one that may write",
    }
    try:
        yield
    except (errors.EntryNotFoundError, errors.HFValidationError, httpx2.HTTPError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), first_line)
        raise ValueError(f"{reference} {failure}: {reason}") from error
