"""Stage captions on Ray: the features of every caption, equal to those of the text encoder, each in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from enat.text import load_text_encoder
from material.hostile import photo
from material.tiny_clip import make_tiny_clip
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import EMPTY, CaptionFeatures
from pipelines.stages import captions as stage
from pipelines.workflow import driver
from pipelines.workflow import stage as workflow_stage

pytestmark = pytest.mark.usefixtures("ray_cluster")

# The first image, one in the middle and the last have none, so that numbers and rows of the index differ.
CAPTIONS = [[], ["a cat", "the cat", "a cat on a dog"], ["a dog"], [], ["the dog", "dogs and cats", "a cat", "at the dog"], []]
FLAT = [caption for captions in CAPTIONS for caption in captions]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Overrides: six small photographs, eight captions."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    numbered = list(enumerate(CAPTIONS))
    for number, _ in numbered:
        Image.fromarray(photo("coffee")).save(folder / "images" / f"{number}.png")
    annotations = [{"image_id": number, "caption": caption} for number, captions in numbered for caption in captions]
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number, _ in numbered],
        "annotations": [{"id": id, **annotation} for id, annotation in enumerate(annotations)],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return f"dataset={{kind: coco, path: {folder / 'images'}, captions: {folder / 'captions.json'}}}"


@pytest.fixture(scope="module")
def nodes(tiny_config: Path, clip: Path, coco: str) -> Callable[..., list[Any]]:
    from pipelines.run import graph
    from pipelines.run.loading import load_run

    def nodes(*overrides: str) -> list[Any]:
        values = (coco, "targets=[captions]", f"captions.encoder={clip}", *overrides)
        return graph.build(load_run(tiny_config, values))

    return nodes


@pytest.fixture(scope="module")
def make_captions(
    nodes: Callable[..., list[Any]], make_session: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[ArtifactStore, Manifest]]:
    def make(*overrides: str, store: ArtifactStore | None = None) -> tuple[ArtifactStore, Manifest]:
        store = store or open_store(str(tmp_path_factory.mktemp("store")))
        return store, driver.execute(nodes(*overrides), make_session(store))[-1].manifest

    return make


@pytest.fixture(scope="module")
def plan_captions(nodes: Callable[..., list[Any]]) -> Callable[..., workflow_stage.PlannedStage]:
    return lambda store, *overrides: driver.plan(nodes(*overrides), store)[-1]


@pytest.fixture(scope="module")
def one_worker(make_captions) -> tuple[ArtifactStore, Manifest]:
    return make_captions("captions.shard_size=3")


def _assert_same_bytes(one: tuple[ArtifactStore, Manifest], other: tuple[ArtifactStore, Manifest]) -> None:
    assert [record.name for record in one[1].files] == [record.name for record in other[1].files]
    for record in one[1].files:
        assert one[0].fetch(one[1], record.name).read_bytes() == other[0].fetch(other[1], record.name).read_bytes()


@pytest.mark.parametrize("captions_per_file", [3, pytest.param(1024, marks=pytest.mark.faults)])
def test_features_equal_those_of_the_encoder(make_captions, one_worker, clip: Path, captions_per_file: int) -> None:
    """Bit for bit, in files of any size."""
    store, manifest = one_worker if captions_per_file == 3 else make_captions(f"captions.shard_size={captions_per_file}")
    num_files = -(-len(FLAT) // captions_per_file)
    assert [record.name for record in manifest.files] == [*(f"captions-{n:05d}.safetensors" for n in range(num_files)), EMPTY]
    features = CaptionFeatures.open(store, manifest)
    expected = load_text_encoder(clip).encode([*FLAT, ""])
    hidden, pooled = features.take(np.array([*range(len(FLAT)), -1]))
    np.testing.assert_array_equal(hidden, expected.hidden.numpy())
    np.testing.assert_array_equal(pooled, expected.pooled.numpy())
    assert len({row.tobytes() for row in pooled}) == len({*FLAT, ""}), "the encoder distinguishes captions"
    assert manifest.metrics["captions"] == len(FLAT) == 8
    assert manifest.metrics["mean_tokens"] == expected.num_tokens[:-1].double().mean().item()


@pytest.mark.faults
def test_interrupted_run_resumes_and_files_do_not_depend_on_workers(make_captions, one_worker, local_store: ArtifactStore) -> None:
    stream, planned = stage.stream_records, list[int]()

    def interrupted(*arguments: Any) -> Any:
        yield next(stream(*arguments))
        raise KeyboardInterrupt

    def counted(rows: Any, job: Any) -> Any:
        planned.extend(row["part"] for row in rows)
        return stream(rows, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "stream_records", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_captions("captions.shard_size=3", store=local_store)
        (place,) = (Path(local_store.uri) / "captions").iterdir()
        recorded = local_store.read_parts("captions", place.name)
        before = {name: (place / name).stat().st_mtime_ns for name in recorded}
        assert not (place / "manifest.json").exists() and 1 <= len(recorded) <= 3
        patch.setattr(stage, "stream_records", counted)
        execution = "captions.execution={num_workers: 2, worker_batch_size: 2}"
        made = make_captions("captions.shard_size=3", execution, store=local_store)
    # The job may have been at its next file when it was interrupted.
    assert len(planned) <= 2 and not {f"captions-{part:05d}.safetensors" for part in planned} & recorded.keys()
    assert before == {name: (place / name).stat().st_mtime_ns for name in recorded}
    assert made[1].digest == one_worker[1].digest
    _assert_same_bytes(made, one_worker)


def test_key_depends_on_the_content_of_the_encoder(plan_captions, one_worker, tmp_path: Path) -> None:
    def key(encoder: Path) -> str:
        return plan_captions(one_worker[0], "captions.shard_size=3", f"captions.encoder={encoder}").key

    assert key(make_tiny_clip(tmp_path / "same")) == one_worker[1].key
    assert key(make_tiny_clip(tmp_path / "other", seed=1)) != one_worker[1].key


def test_a_dataset_without_captions_and_a_folder_without_an_encoder_are_refused(
    make_captions, image_folder: Path, tmp_path: Path
) -> None:
    for override, sentence in (
        (
            f"dataset={{kind: image_folder, name: photos, path: {image_folder}, captions: null}}",
            r"captions\.encoder is given, but dataset photos has no captions",
        ),
        (f"captions.encoder={tmp_path / 'nowhere'}", rf"captions\.encoder.*{tmp_path / 'nowhere'} is not a directory"),
        (f"captions.encoder={tmp_path}", r"holds no text encoder: it has no config\.json"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_captions(override)
