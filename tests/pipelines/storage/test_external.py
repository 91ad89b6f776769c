"""Files that others made: from a path, a bucket or the hub to a local path, or one sentence why not."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.storage import external
from pipelines.storage.external import content_digest, folder_digest, local_file, local_folder
from pipelines.storage.s3 import S3Folder

KEY = "tokenizer.weights"
WEIGHTS = b"weights, as far as this module is concerned"
FOLDER = {"config.json": b"{}", "model.safetensors": b"weights", "text/merges.txt": b"a b"}
REST = {"model.bin": b"a pickle", "README.md": b"about"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def _gets(endpoint) -> int:
    """Requests for the content of objects: not for lists, not for heads."""
    return sum(method == "GET" and "list-type" not in target for method, target, _ in endpoint.requests)


# A path --------------------------------------------------------------------------------------------------------------------


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(WEIGHTS)
    assert local_file(str(tmp_path / "a.pth"), KEY) == tmp_path / "a.pth" and local_folder(str(tmp_path), KEY) == tmp_path
    assert content_digest(str(tmp_path / "a.pth"), KEY) == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_missing_path_is_named_with_the_key_of_the_config(tmp_path: Path) -> None:
    for find in (local_file, content_digest):
        with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {tmp_path}/no\.pth is not a file; correct the path"):
            find(f"{tmp_path}/no.pth", KEY)
    with pytest.raises(ValueError, match=rf"^captions\.encoder: {tmp_path}/no is not a directory; correct the path$"):
        local_folder(f"{tmp_path}/no", "captions.encoder")


# A bucket ------------------------------------------------------------------------------------------------------------------


def test_an_object_is_fetched_once_as_long_as_it_does_not_change(make_bucket: Callable[..., S3Folder], s3_endpoint, cache) -> None:
    bucket = make_bucket("weights")
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS, "a.pth.old": b"another one"})
    path = local_file(f"{bucket.uri}/a.pth", KEY, bucket.config)
    assert path.read_bytes() == WEIGHTS and path.name == "a.pth" and path.is_relative_to(cache)
    before = _gets(s3_endpoint)
    assert local_file(f"{bucket.uri}/a.pth", KEY, bucket.config) == path and _gets(s3_endpoint) == before
    s3_endpoint.fill(bucket, {"a.pth": b"newer"})
    assert local_file(f"{bucket.uri}/a.pth", KEY, bucket.config).read_bytes() == b"newer"
    assert content_digest(f"{bucket.uri}/a.pth", KEY, bucket.config) == hashlib.sha256(b"newer").hexdigest()
    assert path.read_bytes() == WEIGHTS, "a reader of the older one is not disturbed"


def test_of_a_folder_in_a_bucket_only_weights_without_pickle_and_text_are_fetched(
    make_bucket: Callable[..., S3Folder], s3_endpoint
) -> None:
    bucket = make_bucket("clip")
    s3_endpoint.fill(bucket, FOLDER | REST)
    folder = local_folder(bucket.uri, KEY, bucket.config)
    fetched = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert fetched == FOLDER
    before = _gets(s3_endpoint)
    assert local_folder(bucket.uri, KEY, bucket.config) == folder and _gets(s3_endpoint) == before


def test_a_download_that_breaks_off_leaves_nothing_that_looks_whole(
    make_bucket: Callable[..., S3Folder], s3_endpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket("clip")
    s3_endpoint.fill(bucket, FOLDER)
    chunks = S3Folder.chunks

    def interrupted(self: S3Folder, name: str) -> Iterator[bytes]:
        if name == "model.safetensors":
            raise KeyboardInterrupt
        return chunks(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(S3Folder, "chunks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            local_folder(bucket.uri, KEY, bucket.config)
    assert list((cache / "downloads").iterdir()) == []
    assert (local_folder(bucket.uri, KEY, bucket.config) / "model.safetensors").read_bytes() == b"weights"


def test_two_requests_for_one_file_at_once_share_one_download(
    make_bucket: Callable[..., S3Folder], s3_endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket()
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS})
    chunks, has_begun, downloads = S3Folder.chunks, threading.Event(), []

    def slow(self: S3Folder, name: str) -> Iterator[bytes]:
        downloads.append(name)
        has_begun.set()
        time.sleep(0.3)  # time for the other one to ask
        return chunks(self, name)

    monkeypatch.setattr(S3Folder, "chunks", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(local_file, f"{bucket.uri}/a.pth", KEY, bucket.config)
        assert has_begun.wait(timeout=30)
        second = pool.submit(local_file, f"{bucket.uri}/a.pth", KEY, bucket.config)
        assert first.result(timeout=30) == second.result(timeout=30)
    assert first.result().read_bytes() == WEIGHTS and downloads == ["a.pth"]


def test_a_file_that_is_not_in_the_bucket_is_named_in_one_sentence(make_bucket: Callable[..., S3Folder], s3_endpoint) -> None:
    bucket = make_bucket("weights")
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS})
    with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {bucket.uri}/b\.pth does not exist; correct the URI$"):
        local_file(f"{bucket.uri}/b.pth", KEY, bucket.config)
    with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {bucket.uri}/a does not exist; correct the URI$"):
        local_file(f"{bucket.uri}/a", KEY, bucket.config)
    with pytest.raises(
        ValueError, match=rf"^captions\.encoder: {bucket.uri} has no files that end in \.safetensors, \.json, \.txt$"
    ):
        local_folder(bucket.uri, "captions.encoder", bucket.config)
    with pytest.raises(ValueError, match=r"^tokenizer\.weights: .*s3://no-such-bucket"):
        local_file("s3://no-such-bucket/a.pth", KEY, bucket.config)


# The hub, and digests ------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_fetched_from_the_hub_is_named_in_one_sentence() -> None:
    sentence = r"^tokenizer\.weights: hf://owner/name/a\.pth cannot be fetched: the hub cannot be reached, and the local cache does"
    with pytest.raises(ValueError, match=sentence):
        local_file("hf://owner/name/a.pth", KEY)
    with pytest.raises(ValueError, match=r"^tokenizer\.weights: hf://owner/name names a whole repository; a file is needed"):
        local_file("hf://owner/name", KEY)
    with pytest.raises(ValueError, match=r"^captions\.encoder: hf://owner/name cannot be fetched"):
        local_folder("hf://owner/name", "captions.encoder")


def test_an_imported_file_is_named_by_its_digest_and_need_not_exist() -> None:
    assert content_digest(f"sha256:{'ab' * 32}", KEY) == "ab" * 32
    with pytest.raises(ValueError, match=r"^tokenizer\.weights is sha256:abab\w+, .* enat import"):
        local_file(f"sha256:{'ab' * 32}", KEY)


def test_other_references_are_refused() -> None:
    for reference in ("sha256:ab", f"sha256:{'AB' * 32}", "ftp://host/file", "http://host/a.pth"):
        with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {reference} is"):
            local_file(reference, KEY)


def test_a_folder_is_named_by_the_files_that_count(tmp_path: Path) -> None:
    def write(root: Path, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return external.folder_digest(root)

    digest = write(tmp_path / "a", FOLDER)
    assert digest == write(tmp_path / "b", dict(reversed((FOLDER | REST).items()))) == folder_digest(tmp_path / "a")
    assert digest != write(tmp_path / "c", {**FOLDER, "config.json": b"{ }"})
    assert digest != write(tmp_path / "d", {**FOLDER, "more.txt": b""})
    moved = {name.replace("text/", ""): content for name, content in FOLDER.items()}
    assert digest != write(tmp_path / "e", moved)
