"""Stage token_map on Ray: real images to codes, the same bytes whatever the workers, and no image lost without a reason."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import workflow
from pipelines.artifacts import LocalStore, Manifest

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def make_token_map(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[LocalStore, Manifest]]:
    def make(*overrides: str, store: LocalStore | None = None) -> tuple[LocalStore, Manifest]:
        store = store or LocalStore(tmp_path_factory.mktemp("store"))
        done = workflow.execute(tiny_nodes(*overrides, until="token_map"), make_session(store))
        return store, done[-1].manifest

    return make


@pytest.fixture(scope="module")
def broken(broken_image_folder: Path) -> tuple[str, ...]:
    """Overrides: the folder with fourteen images of which two cannot be read, and permission for as many."""
    return (f"dataset.path={broken_image_folder}", "token_map.max_quarantine_share=0.2")


@pytest.fixture(scope="module")
def one_worker(make_token_map, broken: tuple[str, ...]) -> tuple[LocalStore, Manifest]:
    return make_token_map(*broken, "token_map.execution.num_workers=1")


@pytest.fixture
def decoding_at_once() -> Iterator[list[int]]:
    """How many of this session's processes decode images, seen every moment while the test runs."""
    stop, seen = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            titles = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    titles.append(" ".join(process.cmdline()))
            seen.append(sum(title.startswith("ray::MapBatches(_Decode)") for title in titles))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    stop.set()
    watcher.join()


def _rows(store: LocalStore, manifest: Manifest) -> list[dict[str, Any]]:
    names = [record.name for record in manifest.files if record.name.startswith("part-")]
    return [row for name in names for row in pq.read_table(store.fetch(manifest, name)).to_pylist()]


def _adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The crop as guided-diffusion wrote it, with its own arithmetic: uint8 (size, size, 3)."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_every_image_is_a_row_or_stands_in_quarantine_with_a_reason(one_worker, broken_image_folder: Path) -> None:
    store, manifest = one_worker
    keys = [row["key"] for row in _rows(store, manifest)]
    quarantined = pq.read_table(store.fetch(manifest, "quarantine.parquet")).to_pylist()
    files = sorted(path.relative_to(broken_image_folder).as_posix() for path in broken_image_folder.rglob("*") if path.is_file())
    assert sorted(keys + [row["key"] for row in quarantined]) == files and len(files) == 14
    reasons = {row["key"]: row["reason"] for row in quarantined}
    assert reasons.keys() == {"china/half.jpg", "flower/text.jpg"}
    assert (
        reasons["china/half.jpg"].startswith("it cannot be decoded: ")
        and reasons["flower/text.jpg"] == "it is neither JPEG nor PNG"
    )
    assert manifest.summary["rows"] == 12 and manifest.summary["quarantined"] == 2
    assert keys == sorted(keys), "rows keep the order of the dataset"


def test_codes_are_those_of_the_cropped_image_and_of_its_mirror_image(one_worker, broken_image_folder: Path, vqgan) -> None:
    store, manifest = one_worker
    rows = _rows(store, manifest)
    crops = np.stack([_adm_crop(Image.open(broken_image_folder / row["key"]).convert("RGB"), 16) for row in rows])
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    codes, flipped = (vqgan.encode(batch).flatten(1).numpy() for batch in (images, images.flip(-1)))
    np.testing.assert_array_equal([row["codes"] for row in rows], codes)
    np.testing.assert_array_equal([row["codes_flipped"] for row in rows], flipped)
    assert len(np.unique(codes)) > 8 and (codes != flipped).any(), "the tokenizer under test tells images apart"


def test_rows_carry_the_label_and_the_digest_of_the_image_s_file(one_worker, broken_image_folder: Path) -> None:
    store, manifest = one_worker
    for row in _rows(store, manifest):
        assert row["label"] == ("china", "flower").index(row["key"].split("/")[0])
        assert row["source_sha256"] == hashlib.sha256((broken_image_folder / row["key"]).read_bytes()).digest()
    assert manifest.summary["class_names"] == ["china", "flower"]


def test_the_map_states_its_tokenizer(one_worker) -> None:
    store, manifest = one_worker
    tokenizer = store.read_manifest("tokenizer", manifest.inputs["tokenizer"]["key"])
    assert tokenizer is not None and tokenizer.summary["is_imported"]
    assert manifest.summary["info"]["tokenizer_digest"] == tokenizer.digest == manifest.inputs["tokenizer"]["digest"]
    assert manifest.summary["info"]["dataset"] == "photographs" and manifest.summary["info"]["grid_size"] == 4


def test_the_measured_use_of_the_codebook_is_that_of_the_stored_codes(one_worker) -> None:
    store, manifest = one_worker
    codes = np.array([[row["codes"], row["codes_flipped"]] for row in _rows(store, manifest)])
    probs = np.bincount(codes.ravel(), minlength=32) / codes.size
    entropy = -sum(p * np.log(p) for p in probs if p)
    assert manifest.metrics["code_usage"] == (probs > 0).mean()
    assert manifest.metrics["code_perplexity"] == pytest.approx(np.exp(entropy), rel=1e-12)


@pytest.mark.parametrize("execution", ["{num_workers: 2}", "{num_workers: 1, batch_size: 1}"])
def test_every_file_has_the_same_bytes_whatever_the_workers_and_the_batch(
    make_token_map, broken: tuple[str, ...], one_worker, decoding_at_once: list[int], execution: str
) -> None:
    store, manifest = make_token_map(*broken, f"token_map.execution={execution}")
    assert len(manifest.files) == 5 and manifest.digest == one_worker[1].digest
    for record in manifest.files:
        assert store.fetch(manifest, record.name).read_bytes() == one_worker[0].fetch(one_worker[1], record.name).read_bytes()
    assert max(decoding_at_once) <= 2, "tasks that decode are no crowd, also where the workers take all CPUs of the cluster"


def test_too_many_unreadable_images_fail_with_a_sentence_and_leave_no_map(
    make_token_map, broken_image_folder: Path, local_store: LocalStore
) -> None:
    sentence = (
        r"2 of 14 images cannot be read, more than token_map\.max_quarantine_share 0\.1 allows; "
        r"the first is china/half\.jpg: it cannot be decoded"
    )
    with pytest.raises(ValueError, match=sentence):
        make_token_map(f"dataset.path={broken_image_folder}", "token_map.max_quarantine_share=0.1", store=local_store)
    assert [manifest.stage for manifest in local_store.manifests()] == ["tokenizer"]


def test_asking_for_more_than_the_cluster_has_fails_at_once(make_token_map) -> None:
    """Ray itself would wait for ever."""
    with pytest.raises(
        ValueError, match=r"token_map\.execution asks for 3 CPUs \(3 workers\), but the cluster has 2; lower num_workers"
    ):
        make_token_map("token_map.execution.num_workers=3")
    with pytest.raises(
        ValueError, match=r"asks for 1 GPUs \(1 workers\), but the cluster has 0; lower num_workers or gpus_per_worker"
    ):
        make_token_map("token_map.execution.gpus_per_worker=1")
