"""`enat export --hf`: a model of a store as a folder, or as a repository of the Hugging Face hub.

Weights are copied as they are in the store. Samples on the card are made from the written files, by the pipeline that readers
use, so an export that cannot be opened is not published.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enat.files import hub
from enat.files.hub import HubConfig
from enat.images import png_bytes
from enat.pipeline import ENATPipeline
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.samples import sample_seed
from pipelines.registry import model_card
from pipelines.sampling import models, pictures
from pipelines.sharing.hub_card import PICTURE, evaluations_of, hub_card

_MOST_COLUMNS = 10  # of the picture
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where a model goes: a folder, or a repository of the hub (owner/name)."""

    folder: Path | None = None
    repository: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """owner/name and hf://owner/name are repositories; all else is a folder. Raises ValueError for a folder that is taken."""
        if text.startswith("hf://"):
            name = text.removeprefix("hf://")
            if not hub.is_repository(name):
                raise ValueError(f"--hf {text} is not a repository of the hub; write hf://owner/name")
            return cls(repository=name)
        if "://" in text:
            raise ValueError(f"--hf {text} is neither a folder nor owner/name")
        if hub.is_repository(text):
            if Path(text).exists() or Path(text).parent.is_dir():
                raise ValueError(f"--hf {text} may be a folder or a repository; write ./{text} or hf://{text}")
            return cls(repository=text)
        folder = Path(text).expanduser()
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(f"--hf {folder} is not empty; give another folder")
        except OSError as error:
            raise ValueError(f"--hf {folder} cannot be read ({error.strerror})") from error
        return cls(folder=folder)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """licence: an identifier of the hub, such as mit.   num_images: on the card's picture, 0 for none.   seed, device: of these.

    is_public: of a repository that does not exist yet.
    """

    target: Target
    licence: str = "unknown"
    num_images: int = 16
    seed: int = 0
    device: str = "cpu"
    is_public: bool = False

    def __post_init__(self) -> None:
        if not _LICENCE.fullmatch(self.licence):
            raise ValueError(f"--license {self.licence!r} is not an identifier of the hub, such as mit, apache-2.0 or cc-by-4.0")


def export(store: ArtifactStore, model: Manifest, request: ExportRequest) -> dict[str, Any]:
    """Write or upload a model, and return what was made, as JSON can hold it.

    A folder appears in one step when it is complete; a repository gets one commit. Raises ValueError if the store lacks a part of
    the model, or if the hub refuses.
    """
    with _beside(request.target.folder) as folder:
        answer = _write(store, model, request, folder)
        if request.target.folder is not None:
            _publish(folder, request.target.folder)
            return {**answer, "folder": str(request.target.folder)}
        assert request.target.repository is not None
        return {**answer, **_upload(folder, request.target.repository, request.is_public, model_card.registered_name(model))}


@contextmanager
def _beside(target: Path | None) -> Iterator[Path]:
    """A temporary folder on the file system of the target."""
    parent = None
    if target is not None:
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".tmp-", ignore_cleanup_errors=True) as folder:
        made = Path(folder) / "model"
        made.mkdir(mode=0o755)
        yield made


def _write(store: ArtifactStore, model: Manifest, request: ExportRequest, folder: Path) -> dict[str, Any]:
    generator = models.from_manifest(store, model)
    inputs = {name: found for name in model.inputs if (found := store.read_input(model, name)) is not None}
    config = HubConfig(
        generator.model.config,
        generator.vqgan.config,
        generator.sampler,
        tuple(generator.class_names),
        generator.captions.get("encoder"),
    )
    (folder / hub.CONFIG).write_text(config.to_json(), encoding="utf-8")
    for source, name, target in (
        (model, "model.safetensors", hub.MODEL),
        (inputs["tokenizer"], "vqgan.safetensors", hub.TOKENIZER),
    ):
        shutil.copyfile(store.fetch(source, name), folder / target)
    has_picture = request.num_images > 0 and config.model.text_width is None
    if has_picture:
        (folder / PICTURE).write_bytes(_picture(folder, request))
    evaluations = evaluations_of(store, model)
    card = hub_card(model, inputs, evaluations, licence=request.licence, has_picture=has_picture)
    (folder / hub.CARD).write_text(card, encoding="utf-8")
    return {
        "model": f"{model.stage}/{model.key}",
        "license": request.licence,
        "evaluations": [each.artifact for each in evaluations],
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def _picture(folder: Path, request: ExportRequest) -> bytes:
    """Samples of the written model as PNG, one column per class, of classes that are evenly spread."""
    import numpy as np
    import torch

    pipe = ENATPipeline.from_pretrained(folder).to(request.device)
    num_classes = pipe.model.config.num_classes
    columns = max(1, min(num_classes, _MOST_COLUMNS, request.num_images))
    labels = [i % columns * max(1, num_classes) // columns for i in range(request.num_images)]
    made = pipe(labels=labels, seeds=[sample_seed(request.seed, i) for i in range(len(labels))])
    return png_bytes(
        pictures.grid_of(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in made.images]), columns)
    )


def _publish(folder: Path, target: Path) -> None:
    """Move a complete folder into its place in one step."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)
    try:
        folder.rename(target)  # onto an empty folder, too
    except OSError as error:
        raise ValueError(f"--hf {target} cannot be written ({error.strerror}); give another folder") from error


def _upload(folder: Path, repository: str, is_public: bool, title: str) -> dict[str, Any]:
    """One commit with all files. The token is that of huggingface_hub's environment, HF_TOKEN."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with hub.explained(f"hf://{repository}", "cannot be written"):
        api = HfApi()
        api.create_repo(repository, private=not is_public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Add {title}")
    return {"repository": repository, "commit": commit.oid, "url": str(commit.commit_url)}
