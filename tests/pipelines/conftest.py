"""Fixtures of the tests of the pipeline: photographs in folders, a small tokenizer, a tiny run, and the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from material.compare_lab import lab, lab_uri  # noqa: F401 (fixtures)
from material.digits_run import ENAT, REPOSITORY, fresh_environment
from material.layouts import Layouts, make_layouts
from material.tiny_training import material  # noqa: F401 (a fixture)
from pipelines.storage.s3 import S3Folder
from services.s3_server import S3Endpoint, make_bucket, s3_endpoint  # noqa: F401 (fixtures)

# Images --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """scikit-learn's two photographs, 640 x 427."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}


@pytest.fixture(scope="session")
def make_image_folder(photographs: dict[str, Image.Image]) -> Callable[..., Path]:
    """Make a folder of crops: one class per photograph, JPEG and PNG alternating, different shapes and folder depths."""

    def make(root: Path, per_class: int = 6) -> Path:
        for name, photograph in photographs.items():
            for number in range(per_class):
                left, top = 37 * number % 400, 53 * number % 250
                crop = photograph.crop((left, top, left + 90 + 11 * number, top + 140 - 7 * number))
                folder = root / name / ("deeper" if number % 3 == 2 else "")
                folder.mkdir(parents=True, exist_ok=True)
                suffix = ("jpg", "png", "JPEG")[number % 3]
                crop.save(folder / f"{number:03d}.{suffix}")
        return root

    return make


@pytest.fixture(scope="session")
def image_folder(make_image_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve readable images in two classes."""
    return make_image_folder(tmp_path_factory.mktemp("images") / "photographs")


@pytest.fixture(scope="session")
def broken_image_folder(make_image_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same twelve images and two unreadable files: half of a JPEG, and text named as one."""
    root = make_image_folder(tmp_path_factory.mktemp("images") / "with-broken")
    whole = (root / "china" / "000.jpg").read_bytes()
    (root / "china" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "flower" / "text.jpg").write_text("this is not an image")
    return root


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """Twenty photographs in every layout."""
    return make_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def own_layouts(layouts: Layouts, tmp_path: Path) -> Layouts:
    """A copy that a test may change."""
    return replace(layouts, root=Path(shutil.copytree(layouts.root, tmp_path / "own")))


@pytest.fixture(scope="session")
def layouts_bucket(layouts: Layouts, make_bucket: Callable[..., S3Folder], s3_endpoint: S3Endpoint) -> S3Folder:  # noqa: F811
    """The layouts in a bucket."""
    folder = make_bucket("data/sets")
    s3_endpoint.fill(folder, layouts.contents())
    return folder


# A tiny run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vqgan(photographs: dict[str, Image.Image]):
    """A small tokenizer with untrained convolutions and a codebook from latents of the photographs."""
    import torch

    from enat.tokenizer import VQGAN, VQGANConfig
    from enat.training.tokenizer import initialize_codebook

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = VQGAN(VQGANConfig.preset("vqgan-small", codebook_size=32)).eval()
    pixels = np.stack([np.asarray(photograph.resize((64, 48))) for photograph in photographs.values()])
    tiles = torch.from_numpy(pixels).permute(0, 3, 1, 2).unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    initialize_codebook(made, tiles.reshape(-1, 3, 16, 16).float() / 255, torch.Generator().manual_seed(0))
    return made.requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer_weights(vqgan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That tokenizer as a published file of weights, for runs that import a tokenizer."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "vqgan.safetensors"
    save_file(
        {name.replace("codebook.", "quantize.embedding."): value.contiguous() for name, value in vqgan.state_dict().items()}, path
    )
    return path


@pytest.fixture(scope="session")
def tiny_config(image_folder: Path, tokenizer_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a tiny run: twelve photographs, an imported tokenizer, a model of 32 channels."""
    values = {
        "name": "tiny",
        "workspace": str(tmp_path_factory.mktemp("unused-workspace") / "runs"),
        "dataset": {"kind": "image_folder", "name": "photographs", "path": str(image_folder)},
        "tokenizer": {"codebook_size": 32, "weights": str(tokenizer_weights)},
        "token_map": {"shard_size": 4},
        "reference": {"num_epochs": 1},
        "train": {
            "model": {"encoder_layers": 2, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2},
            "num_steps": 12,
            "batch_size": 16,
            "num_groups": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 4,
            "ema_decay": 0.9,
            "execution": {"checkpoint_every": 4, "log_every": 1, "max_failures": 0},
        },
        "generate": {"num_samples": 20, "shard_size": 8, "sampler": {"num_steps": 4}},
        "tracking": {"enabled": False},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def tiny_nodes(tiny_config: Path) -> Callable[..., list[Any]]:
    """The nodes of the tiny run with overrides. until="train" gives that node and its direct and indirect inputs."""
    from pipelines.run import graph
    from pipelines.run.loading import load_run

    def nodes(*overrides: str, until: str = "report") -> list[Any]:
        every = {node.id: node for node in graph.build(load_run(tiny_config, overrides))}
        needed, waiting = set(), [until]
        while waiting:
            needed.add(id := waiting.pop())
            waiting += every[id].inputs.values()
        return [node for node in every.values() if node.id in needed]

    return nodes


@pytest.fixture(scope="session")
def make_session() -> Callable[..., Any]:
    """Make a session on a store without tracking and terminal, for tests that run stages in this process."""
    from rich.console import Console

    from pipelines.run import graph
    from pipelines.tracking.run import RunHandle, TrackingConfig
    from pipelines.workflow.node_run import Session

    def make(store: Any, **replaced: Any) -> Session:
        fields = {
            "store": store,
            "run": RunHandle("", None),
            "tracking": TrackingConfig(enabled=False),
            "console": Console(file=io.StringIO()),
            "connect": lambda: None,  # the fixture ray_cluster has connected
            "stages": graph.stages(),
        }
        return Session(**{**fields, **replaced})

    return make


@pytest.fixture(scope="session")
def make_context(make_session: Callable[..., Any]) -> Callable[..., Any]:
    """Make the context of a stage, for tests that call its function directly."""
    from pipelines.workflow.stage import StageContext

    def make(store: Any, stage: str, key: str = "0" * 64, **replaced: Any) -> StageContext:
        session = make_session(store)
        fields = {"store": store, "run": session.run, "console": session.console, "connect": session.connect}
        return StageContext(stage=stage, key=key, **{**fields, **replaced})

    return make


# The command line ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def enat() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `enat` command to its end."""

    def run(*arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
        command = [str(ENAT), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=fresh_environment(), capture_output=True, text=True, timeout=240, check=False)

    return run


@contextlib.contextmanager
def _enat_until(condition: Callable[[], bool], arguments: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """Start the `enat` command in a process group of its own and yield when a condition holds. Afterwards the group is killed."""
    import psutil

    with subprocess.Popen(
        [str(ENAT), *map(str, arguments)],
        cwd=REPOSITORY,
        env=fresh_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        try:
            while not condition():
                assert process.poll() is None, f"it ended too early:\n{process.communicate()[0]}"
                assert time.monotonic() < deadline, "the condition never held"
                time.sleep(0.002)
            yield process
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Ray's daemons have their own groups and end without their driver. Those that do not end are killed here.
            for child in psutil.wait_procs(children, timeout=15)[1]:
                child.kill()


@pytest.fixture(scope="session")
def kill_enat_when() -> Callable[..., None]:
    """Start the `enat` command and kill its process group with SIGKILL as soon as a condition holds."""

    def run(condition: Callable[[], bool], *arguments: object) -> None:
        with _enat_until(condition, arguments) as process:
            pass
        assert process.returncode == -signal.SIGKILL

    return run


@pytest.fixture(scope="session")
def end_enat_when() -> Callable[..., tuple[int, str]]:
    """Start the `enat` command, send it SIGTERM as soon as a condition holds, and return its exit code and output."""

    def run(condition: Callable[[], bool], *arguments: object) -> tuple[int, str]:
        with _enat_until(condition, arguments) as process:
            process.send_signal(signal.SIGTERM)
            return process.wait(120), process.communicate()[0]

    return run
