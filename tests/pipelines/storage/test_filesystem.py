"""Folders that fsspec reads: a hub on this machine for hf://, and a package that knows gs://."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from material.digits_run import DIGITS
from material.layouts import KINDS, Layouts, found_in, read
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.jobs import places
from pipelines.run.loading import load_run
from pipelines.storage import filesystem
from pipelines.storage.base import AccessError, MissingFileError, StorageError
from pipelines.storage.external import content_digest, local_file, local_folder
from pipelines.storage.open import forget_commits, open_folder, pinned
from services.dataset_hub import TOKEN, DatasetHub, Repository, dataset_hub

PLUGIN = Path(__file__).parents[2] / "services" / "gs_plugin"
FILES = {"a.txt": b"first", "b/c.bin": bytes(range(256)) * 40, "b/é.txt": b"", "b.txt": b"x" * 10, "b/deeper/d.jpg": b"jpeg"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DatasetHub]:
    """The library read its variables when it was imported."""
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    with dataset_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        server.repositories["owner/set"] = Repository()
        server.repositories["owner/set"].commit(FILES)
        HfFileSystem.clear_instance_cache()
        forget_commits()
        yield server
        HfFileSystem.clear_instance_cache()
        forget_commits()


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of buckets of gs://, with one that is called bucket."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(PLUGIN)])
    import enat_test_gs

    monkeypatch.setitem(import_module("fsspec.registry")._registry, "gs", enat_test_gs.Bucket)
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ENAT_TEST_GS", str(tmp_path / "gs"))
    monkeypatch.setenv("ENAT_TEST_GS_READS", str(tmp_path / "reads"))
    fill(tmp_path / "gs" / "bucket", FILES)
    return tmp_path / "gs"


def fill(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture(params=["hf", "gs"])
def place(request: pytest.FixtureRequest) -> str:
    """An address with FILES."""
    request.getfixturevalue({"hf": "hub", "gs": "buckets"}[request.param])
    return {"hf": "hf://datasets/owner/set", "gs": "gs://bucket"}[request.param]


# Every kind ----------------------------------------------------------------------------------------------------------------


def test_files_are_listed_in_the_order_of_their_bytes_with_sizes_and_versions(place: str) -> None:
    folder = open_folder(place)
    listed = list(folder.list())
    assert [(file.name, file.size) for file in listed] == [(n, len(FILES[n])) for n in sorted(FILES, key=str.encode)]
    assert list(folder.fingerprints(listed)) == [file.version for file in listed] and len({f.version for f in listed}) == 5
    assert [file.name for file in folder.list("b/")] == ["b/c.bin", "b/deeper/d.jpg", "b/é.txt"]
    assert folder.entries() == ["a.txt", "b.txt", "b/"] and folder.entries("b/") == ["c.bin", "deeper/", "é.txt"]
    assert folder.folders() == ["b"] and list(folder.list("none/")) == [] and folder.entries("none/") == []
    assert [file.name for file in open_folder(f"{place}/b").list()] == ["c.bin", "deeper/d.jpg", "é.txt"]


def test_files_are_read_whole_in_ranges_and_as_files(place: str, tmp_path: Path) -> None:
    folder, content = open_folder(place), FILES["b/c.bin"]
    assert {name: folder.read(name) for name in FILES} == FILES
    assert folder.read("b/c.bin", 300, 7) == content[300:307] and folder.read("b/c.bin", 300) == content[300:]
    with folder.open("b/c.bin") as file:
        assert (file.seek(9000), file.read(50), file.seek(10), file.read(3)) == (9000, content[9000:9050], 10, content[10:13])
    assert b"".join(folder.chunks("b/c.bin")) == content
    assert folder.fetch("b/c.bin", len(content), hashlib.sha256(content).hexdigest()).read_bytes() == content
    assert folder.read_if_exists("none") is None
    with pytest.raises(MissingFileError, match="/none does not exist; correct the address"):
        folder.read("none")
    with pytest.raises(StorageError, match=r"a\.txt ends after 5 bytes; 9 were expected"):
        folder.read("a.txt", 0, 9)


def test_a_folder_is_sent_to_workers_without_connections(place: str) -> None:
    folder = open_folder(place)
    assert folder.read("a.txt") == b"first"
    sent = pickle.dumps(folder)
    assert len(sent) < 300 and pickle.loads(sent).read("a.txt") == b"first"


def test_nothing_is_written(place: str) -> None:
    folder = open_folder(place)
    for act in (lambda: folder.put("x", b""), lambda: folder.put_if_absent("x", b""), lambda: folder.delete(["a.txt"])):
        with pytest.raises(StorageError, match="is only read; write to a folder or s3://bucket/prefix"):
            act()


def test_damage_on_the_way_is_noticed(place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_PAUSE", 0)
    folder = open_folder(place)
    if place.startswith("hf"):
        request.getfixturevalue("hub").damage = lambda name, body: body[:-1] + b"?"
    else:
        monkeypatch.setenv("ENAT_TEST_GS_DAMAGE", "1")
    for name in ("a.txt", "b/c.bin"):
        with pytest.raises(AccessError, match=f"{name} was answered with other bytes instead of {len(FILES[name])}, 3 times"):
            folder.read(name)
        with pytest.raises(AccessError, match=f"{name} was damaged on its way"):
            list(folder.chunks(name))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_photographs(place: str, layouts: Layouts, kind: str, request: pytest.FixtureRequest) -> None:
    if place.startswith("hf"):
        request.getfixturevalue("hub").repositories["owner/set"].commit(layouts.contents())
    else:
        fill(request.getfixturevalue("buckets") / "bucket", layouts.contents())
    config = layouts.config(kind, place)
    assert read(config) == layouts.rows(kind)
    compared = "files whose images cannot be compared with a checksum"
    assert found_in(config).keys() == ({compared} if kind in ("tar", "parquet") else set())
    assert open_source(config).fingerprint() == open_source(config).fingerprint()


def test_a_file_or_a_pattern_of_files_is_a_dataset(place: str, layouts: Layouts, request: pytest.FixtureRequest) -> None:
    if place.startswith("hf"):
        request.getfixturevalue("hub").repositories["owner/set"].commit(layouts.contents())
    else:
        fill(request.getfixturevalue("buckets") / "bucket", layouts.contents())
    for pattern, rows in (
        ("train-0000[01].tar", 0),
        ("train-000[01].tar", 12),
        ("train-{0000..0001}.tar", 12),
        ("train-0003.tar", 2),
    ):
        config = DatasetConfig(kind="tar", path=f"{place}/tar/{pattern}")
        if rows:
            assert len(read(config)) == rows
        else:
            with pytest.raises(ValueError, match=r"has no train-0000\[01\].tar"):
                open_source(config).fingerprint()


def test_weights_and_captions_are_fetched_once(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = local_file(f"{place}/b/c.bin", "tokenizer.weights")
    assert path.read_bytes() == FILES["b/c.bin"] and local_file(f"{place}/b/c.bin", "tokenizer.weights") == path
    assert content_digest(f"{place}/b/c.bin", "k") == hashlib.sha256(FILES["b/c.bin"]).hexdigest()
    assert (local_folder(place, "captions.encoder") / "b.txt").read_bytes() == FILES["b.txt"]
    with pytest.raises(ValueError, match=r"^tokenizer\.weights: .*/b/none\.bin does not exist; correct the URI"):
        local_file(f"{place}/b/none.bin", "tokenizer.weights")


@pytest.mark.slow
def test_a_job_is_refused_if_nothing_is_at_its_address(place: str) -> None:
    def check(address: str) -> list[str]:
        overrides = ["dataset.kind=images", f"dataset.path={address}"]
        return places.check(load_run(DIGITS, overrides, is_dataset_here=False), is_this_machine=False)

    for there in ("", "/b", "/b/", "/b.txt", "/b/*.bin", "/{a,b}.txt"):
        assert check(place + there) == [], there
    for missing in ("/none", "/b/none-*.tar"):
        with pytest.raises(ValueError, match=r"^dataset\.path is .*, where no files are. Fix the path, or upload the files first"):
            check(place + missing)
    (warning,) = check("oss://bucket/train")
    assert warning.startswith("dataset.path could not be checked from this machine (oss://bucket/train cannot be read on this")


# gs:// ---------------------------------------------------------------------------------------------------------------------


def test_only_the_bytes_that_are_asked_for_are_read(buckets: Path, tmp_path: Path) -> None:
    open_folder("gs://bucket").read("b/c.bin", 300, 7)
    assert (tmp_path / "reads").read_text().split() == [str(os.getpid()), "bucket/b/c.bin", "300", "307"]


def test_a_changed_object_is_another_dataset(buckets: Path) -> None:
    config = DatasetConfig(kind="images", path="gs://bucket")
    before = open_source(config).fingerprint()
    (buckets / "bucket" / "b" / "deeper" / "d.jpg").write_bytes(b"JPEG")
    assert open_source(config).fingerprint() != before


def test_a_kind_of_address_that_no_package_reads_is_refused() -> None:
    for kind, package in (("gs", "gcsfs"), ("az", "adlfs"), ("oss", "ossfs"), ("lakefs", "lakefs-spec")):
        with pytest.raises(
            ValueError, match=f"^dataset.path: {kind}://b/c cannot be read on this machine: install the package {package}"
        ):
            open_source(DatasetConfig(kind="images", path=f"{kind}://b/c"))
    with pytest.raises(StorageError, match="no installed package reads nosuch:// addresses"):
        open_folder("nosuch://b/c")
    for refused in ("https://host/x", "file:///etc", "memory://x", "reference://x", "zip://a::gs://b", "simplecache::gs://b/c"):
        with pytest.raises(StorageError, match="is not a place that is read; give a folder, s3://bucket/prefix, hf://"):
            open_folder(refused)


def test_an_address_holds_no_password() -> None:
    for address in ("sftp://user:secret@host/x", "gs://me:secret@bucket/x", "ftp://a:se/cret@host/x"):
        with pytest.raises(StorageError, match="address holds no password; set the credentials in the environment") as caught:
            open_folder(address)
        assert "cret" not in str(caught.value)


def test_errors_of_a_package_are_one_sentence_without_signed_addresses(buckets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import enat_test_gs

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("403: https://storage/x?X-Goog-Signature=abc&b=1 refused\nand more")

    monkeypatch.setattr(enat_test_gs.Bucket, "ls", fail)
    with pytest.raises(AccessError, match=r"^gs://bucket cannot be read \(403: https://storage/x\?b=1 refused\); check the cred"):
        list(open_folder("gs://bucket").list())


# hf:// ---------------------------------------------------------------------------------------------------------------------


def test_a_branch_is_looked_up_once_and_its_commit_is_read_from_then_on(hub: DatasetHub) -> None:
    repository = hub.repositories["owner/set"]
    first = repository.branches["main"]
    assert pinned("hf://datasets/owner/set/b") == f"hf://datasets/owner/set@{first}/b"
    config = DatasetConfig(kind="images", path="hf://datasets/owner/set@main")
    before, fixed = open_source(config).fingerprint(), config.pinned()
    second = repository.commit({**FILES, "b/deeper/d.jpg": b"another"})
    assert open_source(config).fingerprint() == before, "all of one run reads one commit"
    forget_commits()
    assert open_source(config).fingerprint() != before and pinned(config.path) == f"hf://datasets/owner/set@{second}"
    assert fixed.path == f"hf://datasets/owner/set@{first}" and open_source(fixed).fingerprint() == before
    repository.commit(dict(FILES))  # another commit with the first files
    forget_commits()
    assert open_source(config).fingerprint() == before, "the key follows the content"


def test_branches_tags_and_special_references_are_read(hub: DatasetHub) -> None:
    repository = hub.repositories["owner/set"]
    repository.commit({"x.txt": b"1"}, "v1.0")
    repository.commit({"default/train/0000.parquet": b"2"}, "refs/convert/parquet")
    assert open_folder("hf://datasets/owner/set@v1.0").entries() == ["x.txt"]
    assert open_folder("hf://datasets/owner/set@refs/convert/parquet/default/train").entries() == ["0000.parquet"]


def test_files_of_the_hub_have_the_key_of_local_ones_if_their_digests_are_known(hub: DatasetHub, layouts: Layouts) -> None:
    hub.repositories["owner/set"].commit(layouts.contents())
    there, here = (open_source(layouts.config("parquet", place)) for place in ("hf://datasets/owner/set", None))
    assert there.fingerprint() == here.fingerprint()


def test_a_private_dataset_needs_the_token_of_the_environment(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/set"].token = TOKEN
    with pytest.raises(StorageError, match="the repository does not exist, or HF_TOKEN may not see it"):
        open_folder("hf://datasets/owner/set")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = open_folder("hf://datasets/owner/set")
    assert folder.read("a.txt") == b"first" and TOKEN.encode() not in pickle.dumps(folder)
    assert {asked for _, _, asked in hub.asked[-3:]} == {f"Bearer {TOKEN}"}


def test_only_the_bytes_that_are_asked_for_are_requested(hub: DatasetHub) -> None:
    open_folder("hf://datasets/owner/set").read("b/c.bin", 300, 7)
    assert hub.ranges() == ["bytes=300-306"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("hf://datasets/owner/none", "the repository does not exist, or HF_TOKEN may not see it"),
        ("hf://datasets/owner/set@none", "the repository has no such revision; name a branch, tag or commit"),
        ("hf://datasets/owner", "is not of the form hf://datasets/owner/name"),
        ("hf://datasets/", "is not of the form hf://datasets/owner/name"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: DatasetHub, address: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^dataset.path: {address.rstrip('/')} (cannot be read: )?{reason}"):
        open_source(DatasetConfig(kind="images", path=address))
