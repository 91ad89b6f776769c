"""A model as a folder that others can open, on a disk or as a repository of the Hugging Face hub.

    config.json          architectures of model and tokenizer, the usual sampler, names of classes
    model.safetensors    weights of the ENAT
    vqgan.safetensors    weights of its tokenizer
    README.md            the card, for people

Imports no torch. A token for private repositories comes from huggingface_hub's own environment (HF_TOKEN).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from enat.config import ENATConfig, VQGANConfig
from enat.sampler_config import SamplerConfig

CONFIG, MODEL, TOKENIZER, CARD = "config.json", "model.safetensors", "vqgan.safetensors", "README.md"
FORMAT = 1  # of config.json
_MAX_CONFIG_BYTES = 16 << 20
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubConfig:
    """The content of config.json.

    sampler: the usual one.   class_names: by label, empty if unknown.   text_encoder: the name of the CLIP text model of a
    text-conditional model, None if unknown.
    """

    model: ENATConfig
    tokenizer: VQGANConfig
    sampler: SamplerConfig
    class_names: tuple[str, ...] = ()
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.codebook_size != self.model.codebook_size or self.tokenizer.grid_size != self.model.grid_size:
            raise ValueError("the model and the tokenizer have different codes or grids")
        if self.class_names and len(self.class_names) != self.model.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.model.num_classes} classes")

    def to_json(self) -> str:
        parts = {name: asdict(getattr(self, name)) for name in ("model", "tokenizer", "sampler")}
        values = {"format": FORMAT, **parts, "class_names": self.class_names, "text_encoder": self.text_encoder}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> HubConfig:
        """Raises ValueError for a file that to_json did not write, or whose values do not fit each other."""
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise ValueError(f"it has more than {_MAX_CONFIG_BYTES >> 20} MiB")
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict) or "model" not in values or "tokenizer" not in values:
                raise ValueError("it describes no ENAT with its tokenizer")
            if values.get("format") != FORMAT:
                raise ValueError(f"its format is {values.get('format')!r}, and this version reads {FORMAT}")
            names = values.get("class_names") or []
            if not all(isinstance(name, str) for name in [*names, values.get("text_encoder") or ""]):
                raise ValueError("class_names and text_encoder must be text")
            return cls(
                ENATConfig(**values["model"]),
                VQGANConfig(**values["tokenizer"]),
                SamplerConfig(**values.get("sampler") or {}),
                tuple(names),
                values.get("text_encoder"),
            )
        except FileNotFoundError as error:
            raise ValueError(f"{path.parent} holds no exported model: it has no {path.name}; see enat export --help") from error
        except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} cannot be used: {reason}") from error


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
