"""A run whose dataset is at hf:// or gs://: the command line, its driver and Ray's workers read it, each by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from material.layouts import Layouts
from pipelines.artifacts.open import open_store
from pipelines.data.dataset import DatasetSummary
from services.dataset_hub import TOKEN, Repository, dataset_hub

PLUGIN = Path(__file__).parents[2] / "services" / "gs_plugin"
pytestmark = pytest.mark.slow


@pytest.fixture
def ask(enat: Callable[..., Any], tiny_config: Path, tmp_path: Path) -> Callable[..., str]:
    """What a command for the token map of a dataset prints."""

    def ask(command: str, kind: str, path: str, *options: str) -> str:
        done = enat(
            command,
            tiny_config,
            "targets=[token_map]",
            f"workspace={tmp_path / 'runs'}",
            f"dataset={{kind: {kind}, name: photographs, path: '{path}'}}",
            "token_map.execution.num_workers=2",
            *options,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    return ask


@pytest.fixture
def token_map(ask: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a token map. Returns the manifests of dataset and token map that were used."""

    def run(kind: str, path: str) -> dict[str, Any]:
        lines = [line.split() for line in ask("run", kind, path).splitlines() if line.startswith("✓")]
        store = open_store(str(tmp_path / "runs" / "store"))
        return {line[1]: next(m for m in store.manifests() if m.stage == line[1] and m.key.startswith(line[2])) for line in lines}

    return run


def test_a_private_dataset_of_the_hub_is_read_at_one_commit(
    layouts: Layouts, token_map: Any, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    files = {name: content for name, content in layouts.contents().items() if name.startswith("image_folder/")}
    with dataset_hub() as hub:
        repository = hub.repositories["owner/set"] = Repository(token=TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        commit, place = repository.commit(files), "hf://datasets/owner/set@main/image_folder"
        made = token_map("image_folder", place)
        assert DatasetSummary.read(made["dataset"]).num_images == made["token_map"].metrics["rows"] == 20
        assert made["dataset"].config["path"] == f"hf://datasets/owner/set@{commit}/image_folder"
        read = {path for path, _, _ in hub.asked if "/resolve/" in path}
        assert read == {f"/datasets/owner/set/resolve/{commit}/{name}" for name in files}
        assert {token for path, _, token in hub.asked if "owner/set" in path} == {f"Bearer {TOKEN}"}
        kept = [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
        assert kept == []

        repository.commit(files | {"README.md": b"about"})
        planned = {row["stage"]: row for row in json.loads(ask("plan", "image_folder", place, "--json"))["stages"]}
        assert {stage: row["key"] for stage, row in planned.items()} == {stage: each.key for stage, each in made.items()}
        assert all(row["reused"] for row in planned.values()), "a moved branch with the same images"


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["image_folder", pytest.param("tar", marks=pytest.mark.faults)])
def test_a_dataset_is_read_by_an_installed_package(
    layouts: Layouts, token_map: Any, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = tmp_path / "gs" / "bucket"
    for name, content in layouts.contents().items():
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(content)
    monkeypatch.setenv("ENAT_TEST_GS", str(tmp_path / "gs"))
    monkeypatch.setenv("ENAT_TEST_GS_READS", str(tmp_path / "reads"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PLUGIN), os.environ.get("PYTHONPATH")])))
    there = token_map(kind, f"gs://bucket/{kind}")
    readers = {line.split()[0] for line in (tmp_path / "reads").read_text().splitlines()}
    assert readers, "read by ranges"
    here = token_map(kind, f"{layouts.root}/{kind}")
    assert [file.sha256 for file in there["dataset"].files] == [file.sha256 for file in here["dataset"].files]
    names = sorted(file.name for file in here["token_map"].files)
    assert names == sorted(file.name for file in there["token_map"].files) and len(names) > 1
    store = open_store(str(tmp_path / "runs" / "store"))
    codes = [
        [_codes(store.fetch(made, name)) for name in names if name.startswith("part")]
        for made in (there["token_map"], here["token_map"])
    ]
    assert codes[0] == codes[1]


def _codes(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
