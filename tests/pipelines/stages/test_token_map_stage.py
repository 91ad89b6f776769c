"""Stage token_map on Ray: codes of real images in files that do not depend on workers; no image is lost without a reason."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from enat.tokenizer import VQGAN
from material.hostile import corpus, photo
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.token_map import TokenMap
from pipelines.stages import token_map as stage
from pipelines.workflow import driver
from services.workers import kill_a_worker, titled_processes

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def make_token_map(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[ArtifactStore, Manifest]]:
    def make(*overrides: str, store: ArtifactStore | None = None) -> tuple[ArtifactStore, Manifest]:
        store = store or open_store(str(tmp_path_factory.mktemp("store")))
        done = driver.execute(tiny_nodes(*overrides, until="token_map"), make_session(store))
        return store, done[-1].manifest

    return make


@pytest.fixture(scope="module")
def broken(broken_image_folder: Path) -> tuple[str, ...]:
    """Overrides: the folder with fourteen images of which two cannot be read, and permission for as many."""
    return (f"dataset.path={broken_image_folder}", "token_map.max_quarantine_share=0.2")


@pytest.fixture(scope="module")
def one_worker(make_token_map, broken: tuple[str, ...]) -> tuple[ArtifactStore, Manifest]:
    return make_token_map(*broken, "token_map.execution.num_workers=1")


@pytest.fixture
def decoding_at_once() -> Iterator[list[int]]:
    """Number of processes of this session that decode images, sampled while the test runs."""
    stop, seen = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            seen.append(sum(title.startswith("ray::MapBatches(_Decode)") for _, title in titled_processes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    stop.set()
    watcher.join()


def _rows(store: ArtifactStore, manifest: Manifest) -> list[dict[str, Any]]:
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


def _codes(vqgan: Any, images: list[Image.Image], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (B, L) of the crops, and of their mirror images."""
    crops = torch.from_numpy(np.stack([_adm_crop(image, resolution) for image in images]))
    floats = crops.permute(0, 3, 1, 2).float() / 255
    codes, flipped = (vqgan.encode(batch).flatten(1).numpy() for batch in (floats, floats.flip(-1)))
    return codes, flipped


def _assert_same_bytes(one: tuple[ArtifactStore, Manifest], other: tuple[ArtifactStore, Manifest]) -> None:
    assert one[1].digest == other[1].digest
    for record in one[1].files:
        assert one[0].fetch(one[1], record.name).read_bytes() == other[0].fetch(other[1], record.name).read_bytes()


def test_every_image_is_a_row_or_in_quarantine_with_a_reason(one_worker, broken_image_folder: Path) -> None:
    store, manifest = one_worker
    rows = _rows(store, manifest)
    keys = [row["key"] for row in rows]
    quarantined = pq.read_table(store.fetch(manifest, "quarantine.parquet")).to_pylist()
    files = sorted(path.relative_to(broken_image_folder).as_posix() for path in broken_image_folder.rglob("*") if path.is_file())
    assert sorted(keys + [row["key"] for row in quarantined]) == files and len(files) == 14
    reasons = {row["key"]: row["reason"] for row in quarantined}
    assert reasons.keys() == {"china/half.jpg", "flower/text.jpg"}
    assert reasons["china/half.jpg"].startswith("it cannot be decoded: ")
    assert reasons["flower/text.jpg"] == "it is neither JPEG nor PNG"
    assert manifest.summary["rows"] == 12 and manifest.summary["quarantined"] == 2
    assert keys == sorted(keys), "rows keep the order of the dataset"
    for row in rows:
        assert row["label"] == ("china", "flower").index(row["key"].split("/")[0])
        assert row["source_sha256"] == hashlib.sha256((broken_image_folder / row["key"]).read_bytes()).digest()
    assert manifest.summary["class_names"] == ["china", "flower"]


def test_codes_are_those_of_the_cropped_image_and_of_its_mirror_image(one_worker, broken_image_folder: Path, vqgan) -> None:
    rows = _rows(*one_worker)
    images = [Image.open(broken_image_folder / row["key"]).convert("RGB") for row in rows]
    codes, flipped = _codes(vqgan, images, 16)
    np.testing.assert_array_equal([row["codes"] for row in rows], codes)
    np.testing.assert_array_equal([row["codes_flipped"] for row in rows], flipped)
    assert codes.shape == (12, 16) and one_worker[1].summary["info"]["resolution"] == 16
    assert len(np.unique(codes)) > 8 and (codes != flipped).any(), "the tokenizer distinguishes the images"


def test_summary_names_the_tokenizer_and_metrics_measure_the_use_of_the_codebook(one_worker) -> None:
    store, manifest = one_worker
    tokenizer = store.read_input(manifest, "tokenizer")
    assert tokenizer is not None and tokenizer.summary["is_imported"]
    assert manifest.summary["info"]["tokenizer_digest"] == tokenizer.digest == manifest.inputs["tokenizer"]["digest"]
    assert manifest.summary["info"]["dataset"] == "photographs" and manifest.summary["info"]["grid_size"] == 4
    codes = np.array([[row["codes"], row["codes_flipped"]] for row in _rows(store, manifest)])
    probs = np.bincount(codes.ravel(), minlength=32) / codes.size
    entropy = -sum(p * np.log(p) for p in probs if p)
    assert manifest.metrics["code_usage"] == (probs > 0).mean()
    assert manifest.metrics["code_perplexity"] == pytest.approx(np.exp(entropy), rel=1e-12)


@pytest.mark.faults
def test_too_many_unreadable_images_are_an_error(make_token_map, broken_image_folder: Path, local_store: ArtifactStore) -> None:
    sentence = (
        r"2 of 14 images cannot be read, more than token_map\.max_quarantine_share 0\.1 allows; "
        r"one is (china/half\.jpg: it cannot be decoded|flower/text\.jpg: it is neither JPEG nor PNG)"
    )
    dataset = f"dataset.path={broken_image_folder}"
    with pytest.raises(ValueError, match=sentence):
        make_token_map(dataset, "token_map.max_quarantine_share=0.1", store=local_store)
    assert {manifest.stage for manifest in local_store.manifests()} == {"dataset", "tokenizer"}
    _, manifest = make_token_map(dataset, f"token_map.max_quarantine_share={2 / 14}")
    assert manifest.summary["quarantined"] == 2, "exactly as many as allowed"


def test_limit_of_unreadable_images_also_applies_to_an_existing_map(make_token_map, broken_image_folder: Path, one_worker) -> None:
    """It is not part of the key: raising it after a failure reuses what was computed."""
    store, manifest = one_worker
    dataset = f"dataset.path={broken_image_folder}"
    assert make_token_map(dataset, "token_map.max_quarantine_share=1", store=store)[1].key == manifest.key
    sentence = rf"2 of 14 images cannot be read, .* 0\.1 allows; one is see quarantine\.parquet of {manifest.key[:12]}: it "
    with pytest.raises(ValueError, match=sentence):
        make_token_map(dataset, "token_map.max_quarantine_share=0.1", store=store)


def test_a_map_cannot_be_continued_on_another_kind_of_device(
    make_token_map, broken: tuple[str, ...], one_worker, local_store: ArtifactStore
) -> None:
    """By default, the number of images per pass depends on the device."""
    record = {"images_per_pass": 256, "rows": 0, "quarantined": []}
    local_store.put_part("token_map", one_worker[1].key, "part-00000.parquet", record)
    with pytest.raises(ValueError, match=r"256 images per pass on another kind of device, and here it would be 64\."):
        make_token_map(*broken, store=local_store)


def test_requests_that_exceed_the_cluster_fail_at_once(make_token_map) -> None:
    """Ray would wait forever."""
    for override, sentence in (
        ("num_workers=3", r"token_map\.execution asks for 3 CPUs \(3 workers\), but the cluster has 2; lower num_workers"),
        ("gpus_per_worker=1", r"asks for 1 GPUs \(1 workers\), but the cluster has 0; lower num_workers or gpus_per_worker"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_token_map(f"token_map.execution.{override}")


# Many small passes, lost workers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the hostile corpus."""
    root = tmp_path_factory.mktemp("hostile") / "images"
    root.mkdir()
    for file in corpus():
        (root / file.name).write_bytes(file.data)
    return root


@pytest.fixture(scope="module")
def hostile(hostile_folder: Path) -> tuple[str, ...]:
    """Overrides: the corpus as an unlabelled dataset at 32 px, four images a pass, ten to a dozen parts."""
    dataset = f"dataset={{kind: images, name: hostile, path: {hostile_folder}}}"
    sizes = ("token_map.shard_size=16", "token_map.forward_batch_size=4", "token_map.max_quarantine_share=0.6")
    return ("targets=[token_map]", dataset, "tokenizer.resolution=32", *sizes)


@pytest.fixture(scope="module")
def hostile_records() -> list[dict[str, Any]]:
    """Records that the workers sent to the driver for the next fixture."""
    return []


@pytest.fixture(scope="module")
def hostile_map(make_token_map, hostile: tuple[str, ...], hostile_records: list[dict[str, Any]]) -> tuple[ArtifactStore, Manifest]:
    stream = stage.stream_records

    def recorded(*arguments: Any, **more: Any) -> Generator[Any]:
        for record in stream(*arguments, **more):
            hostile_records.append(record)
            yield record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "stream_records", recorded)
        return make_token_map(*hostile)


def _hostile_inputs() -> dict[str, Any]:
    """By its name, jpeg_2000.jp2 is not an image but a finding of the dataset."""
    return {file.name: file for file in corpus() if not file.name.endswith((".jp2", ".avif"))}


@pytest.mark.slow
def test_hostile_files_are_encoded_or_quarantined(hostile_map, vqgan) -> None:
    store, manifest = hostile_map
    rows = _rows(store, manifest)
    reasons = {row["key"]: row["reason"] for row in pq.read_table(store.fetch(manifest, "quarantine.parquet")).to_pylist()}
    inputs = _hostile_inputs()
    readable = sorted(name for name, file in inputs.items() if file.pixels is not None)
    assert [row["key"] for row in rows] == readable and len(rows) + len(reasons) == len(inputs) > 150
    assert reasons.keys() == inputs.keys() - set(readable)
    for name, reason in reasons.items():
        assert inputs[name].reason in reason, name
    codes, flipped = _codes(vqgan, [Image.fromarray(inputs[name].pixels) for name in readable], 32)
    np.testing.assert_array_equal([row["codes"] for row in rows], codes)
    np.testing.assert_array_equal([row["codes_flipped"] for row in rows], flipped)
    assert sum(manifest.summary["quarantine_reasons"].values()) <= len(reasons) == manifest.metrics["quarantined"]
    assert {row["label"] for row in rows} == {-1} and manifest.summary["class_names"] == [], "the dataset has no labels"
    token_map = TokenMap.open(store, manifest)
    labels = token_map.take(np.arange(len(token_map)), np.zeros(len(token_map), bool))[1]
    assert set(labels.tolist()) == {token_map.info.num_classes}, "training gets the null label"


EXECUTIONS = ["{num_workers: 2, worker_batch_size: 16}", "{num_workers: 1, cpus_per_worker: 2, worker_batch_size: 256}"]
EXECUTIONS += ["{num_workers: 1, worker_batch_size: 1, num_decoders: 1}"]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.faults
def test_files_do_not_depend_on_workers_and_batches(
    make_token_map, hostile: tuple[str, ...], hostile_map, decoding_at_once: list[int], execution: str
) -> None:
    """A worker with two CPUs computes two passes at once."""
    _assert_same_bytes(make_token_map(*hostile, f"token_map.execution={execution}"), hostile_map)
    assert max(decoding_at_once) <= 2, "decoding has few tasks even if the workers take all CPUs of the cluster"


@pytest.mark.parametrize("task", ["_Decode", "_Encode"])
@pytest.mark.faults
def test_files_do_not_depend_on_killed_workers(make_token_map, hostile: tuple[str, ...], hostile_map, task: str) -> None:
    """Kills a process of this session's cluster whose title from Ray names the task."""
    killed: list[str | None] = []
    stop = threading.Event()

    def kill_one() -> None:
        killed.append(kill_a_worker(f"MapBatches({task})", stop.is_set))

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        made = make_token_map(*hostile, "token_map.execution={worker_batch_size: 4}")
    finally:
        stop.set()
        killer.join()
    assert killed[0], "one was killed in time"
    _assert_same_bytes(made, hostile_map)


class _WrittenParts:
    """Counts the parts that the driver writes, and interrupts it after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.parts: list[int] = []
        self._write, self._stop_after, self._lock = stage._write_part, stop_after, threading.Lock()
        monkeypatch.setattr(stage, "_write_part", self)

    def __call__(self, part: int, *arguments: Any) -> None:
        with self._lock:
            if len(self.parts) == self._stop_after:
                raise KeyboardInterrupt
            self._write(part, *arguments)
            self.parts.append(part)


@pytest.mark.faults
def test_interrupted_run_resumes_with_the_missing_parts(
    make_token_map, tiny_nodes, hostile: tuple[str, ...], hostile_map, local_store: ArtifactStore
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        first = _WrittenParts(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            make_token_map(*hostile, store=local_store)
    assert len(first.parts) == 3 and not any(manifest.stage == "token_map" for manifest in local_store.manifests())

    def parts_done(*changed: str) -> int:
        return driver.plan(tiny_nodes(*hostile, *changed, until="token_map"), local_store)[-1].parts_done

    assert parts_done() == parts_done("token_map.execution.worker_batch_size=16") == 3
    for changed in ("shard_size=15", "forward_batch_size=3", "precision=bf16"):
        assert parts_done(f"token_map.{changed}") == 0, "another config does not reuse these parts"
    with pytest.MonkeyPatch.context() as patch:
        second = _WrittenParts(patch)
        made = make_token_map(*hostile, "token_map.execution={num_workers: 2, worker_batch_size: 16}", store=local_store)
    assert sorted(first.parts + second.parts) == list(range(len(made[1].files) - 1)), "each part is written once"
    _assert_same_bytes(made, hostile_map)


@pytest.mark.faults
def test_bf16_changes_few_codes_and_is_recorded_in_the_map(make_token_map, hostile: tuple[str, ...], hostile_map) -> None:
    store, manifest = make_token_map(*hostile, "token_map.precision=bf16")
    assert manifest.summary["info"]["dtype"] == "bfloat16" and hostile_map[1].summary["info"]["dtype"] == "float32"
    exact, rounded = TokenMap.open(*hostile_map), TokenMap.open(store, manifest)
    share = (exact.codes != rounded.codes).mean()
    sys.stdout.write(f"bfloat16 changes {share:.2%} of {exact.codes.size:,} codes (32 entries, untrained convolutions)\n")
    assert 0 < share < 0.1


@pytest.mark.slow
def test_codes_that_flip_are_measured_and_limited(make_token_map, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    _, manifest = make_token_map("token_map.precision=bf16", store=store)
    exact = TokenMap.open(*make_token_map(store=store))
    rounded = TokenMap.open(store, manifest)
    size = manifest.config["forward_batch_size"] or len(exact)  # one pass, the first, is compared
    assert 0 < manifest.metrics["code_flips"] == pytest.approx((exact.codes != rounded.codes)[:size].mean(), abs=0.02)
    assert "code_flips" not in make_token_map(store=store)[1].metrics
    limit = manifest.metrics["code_flips"] / 2
    with pytest.raises(
        ValueError, match=r"with precision bf16, .*% of the first images' codes differ .* set token_map.precision=fp32"
    ):
        make_token_map("token_map.precision=bf16", f"token_map.max_code_flips={limit}", store=store)
    with pytest.raises(ValueError, match=r"differ from those of fp32, more than token_map.max_code_flips"):
        make_token_map("token_map.precision=bf16", f"token_map.max_code_flips={limit}")  # while it is made
    assert make_token_map("token_map.precision=tf32")[1].metrics["code_flips"] == 0, "on CPUs it is fp32"


@pytest.mark.slow
def test_a_compiled_encoder_is_compared_with_one_that_is_not(
    make_token_map, tmp_path: Path, make_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs, without the check that refuses this, and with a backend of torch.compile that shifts what it computes."""
    with pytest.raises(ValueError, match="compile needs GPUs here; set gpus_per_worker"):
        stage.TokenMapExecution(compile=True)
    store, manifest = make_token_map(store=open_store(str(tmp_path)))
    execution = stage.TokenMapExecution()
    object.__setattr__(execution, "compile", True)

    def shifted(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
        return lambda *given: [latents.flip(1) for latents in graph(*given)]

    monkeypatch.setattr(VQGAN, "compile_networks", lambda vqgan: vqgan.encoder.compile(dynamic=False, backend=shifted))
    tokenizer = store.read_input(manifest, "tokenizer")
    info = TokenMap.open(store, manifest).info
    encoding = stage._Encoding(tokenizer, info, 2, execution, "fp32")
    encode = stage._Encode(make_context(store, "token_map").for_workers(), encoding)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, info.resolution, info.resolution), dtype=np.uint8)
    images = [(slot, f"image-{slot}", 0, b"0" * 32, (), 0) for slot in range(2)]
    block = stage._Decoded({"block": 0, "part": 0, "start": 0}, images, [], 0.0)
    record = encode({"pixels": pixels[None], "block": [block]})["record"][0]
    assert record["code_flips"] > 0.3, "the codes to compare with are not those of the compiled encoder"


@pytest.mark.slow
def test_records_sent_to_the_driver_contain_no_pixels(hostile_map, hostile_records: list[dict[str, Any]]) -> None:
    """Neither as an array nor as bytes: a record is much smaller than its images, 3,072 bytes each."""
    assert sum(record["images"] for record in hostile_records) == len(_hostile_inputs())
    for record in hostile_records:
        arrays = {name: value for name, value in vars(record["rows"]).items() if isinstance(value, np.ndarray)}
        assert arrays.keys() == {"codes", "codes_flipped"} and not any(isinstance(value, np.ndarray) for value in record.values())
        assert len(pickle.dumps(record)) < 1_500 + 500 * record["images"]
    assert max(record["images"] for record in hostile_records) == 16, "blocks of a whole part"


# Captions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_map_of_a_dataset_with_captions_has_them(make_token_map, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    written = {
        "000.jpg": ["a  cat", "the cat"],
        "001.jpg": [],
        "002.jpg": ["a dog\n"],
        "003.jpg": [],
        "004.jpg": ["one", "two", "six"],
    }
    for name, subject in zip(written, ("chelsea", "coffee", "flower", "astronaut", "chelsea"), strict=True):
        Image.fromarray(photo(subject)).save(root / name)
    (root / "002.jpg").write_bytes(b"")
    annotations = [
        {"id": 10 * image + n, "image_id": image, "caption": caption}
        for image, captions in enumerate(written.values())
        for n, caption in enumerate(captions)
    ]
    images = [{"id": image, "file_name": name} for image, name in enumerate(written)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    store, manifest = make_token_map(
        "targets=[token_map]",
        f"dataset={{kind: coco, name: small, path: {root}, captions: {tmp_path / 'captions.json'}}}",
        *("token_map.max_quarantine_share=0.2", "token_map.shard_size=2"),
    )
    rows = _rows(store, manifest)
    assert [(row["key"], row["captions"], row["first_caption"]) for row in rows] == [
        ("000.jpg", ["a cat", "the cat"], 0),
        ("001.jpg", [], 2),
        ("003.jpg", [], 3),  # number 2 belongs to 002.jpg, which is broken
        ("004.jpg", ["one", "two", "six"], 3),
    ]
    assert manifest.summary["info"]["num_captions"] == 6
    token_map = TokenMap.open(store, manifest)
    drawn = [token_map.batch_rows(0, step, 4) for step in range(40)]
    seen = {(int(row), int(caption)) for batch in drawn for row, caption in zip(batch.rows, batch.captions, strict=True)}
    assert seen == {(0, 0), (0, 1), (1, -1), (2, -1), (3, 3), (3, 4), (3, 5)}
