"""Folders in buckets, against an endpoint over HTTP: complete and ordered listings, whole reads, conditional writes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage import s3, s3_client
from pipelines.storage.base import AccessError, MissingFileError, StorageError, StoredFile, in_parallel
from pipelines.storage.open import open_folder
from pipelines.storage.s3 import S3Folder
from pipelines.storage.s3_client import S3Config
from services.s3_server import S3Endpoint, only_moto

PART = 5 << 20  # the smallest that S3 takes
BIG = random.Random(0).randbytes(2 * PART + 1234)
ATTEMPTS = s3_client.ATTEMPTS


@pytest.fixture
def folder(make_bucket: Callable[..., S3Folder]) -> S3Folder:
    return make_bucket("some/where")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    (tmp_path / "big.bin").write_bytes(BIG)
    return tmp_path / "big.bin"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, neither here nor in botocore."""
    from botocore.retries.standard import ExponentialBackoff

    monkeypatch.setattr(s3, "_pause", lambda attempt: None)
    monkeypatch.setattr(s3_client, "pause_before", lambda attempt: 0.0)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: 0)


# Listing -------------------------------------------------------------------------------------------------------------------


def _many(folders: int, files: int, flat: int = 0, above: str = "") -> list[str]:
    below = [f"{above}n{number:08d}/{file:05d}.JPEG" for number in range(folders) for file in range(files)]
    return [*below, *(f"{above}flat-{number:05d}" for number in range(flat))]


LAYOUTS = {
    "classes": _many(50, 25),
    "classes, and files beside them": _many(25, 60, flat=1_100),
    "train and val": _many(25, 50, above="train/") + _many(25, 50, above="val/"),
    "3 pages far below": [f"a/b/images/{number:06d}.jpg" for number in range(2_200)],
    "one class of 3 pages among many": [*_many(20, 3), *_many(0, 0, flat=2_200, above="n00000005x/")],
    "deep": [f"a/b/c/d{number % 7}/{number % 11}/{number}.png" for number in range(500)],
}


@pytest.mark.slow
@only_moto
def test_a_listing_is_complete_and_in_the_order_of_bytes(
    make_bucket: Callable[..., S3Folder], s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PAGES_AHEAD", 1)
    for layout, names in LAYOUTS.items():
        folder = make_bucket("some/where")
        s3_endpoint.fill(folder, dict.fromkeys(names, b"x"))
        assert [file.name for file in folder.list()] == sorted(names, key=str.encode), layout


def test_a_listing_has_sizes_and_versions_that_change_with_the_content(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    s3_endpoint.fill(folder, {"a": b"one", "b": b"one"})
    first = [*folder.list()]
    assert [file.size for file in first] == [3, 3] and [*folder.fingerprints(first)] == [first[0].version] * 2
    s3_endpoint.fill(folder, {"a": b"two"})
    second = [*folder.list()]
    assert second[1] == first[1] and second[0] == StoredFile("a", 3, second[0].version) != first[0]


def test_empty_folders_that_a_console_made_are_not_files(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    s3_endpoint.fill(folder, {"": b"", "empty/": b"", "a/": b"", "a/1": b"x"})
    assert [file.name for file in folder.list()] == ["a/1"] and folder.folders() == ["a", "empty"]


def test_a_listing_requests_only_a_few_folders_ahead(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    s3_endpoint.fill(folder, dict.fromkeys(_many(300, 2), b"x"))
    before = len(s3_endpoint.requests)
    listing = folder.list()
    next(listing)
    assert len(s3_endpoint.requests) - before < 50
    listing.close()


def test_in_parallel_keeps_the_order_and_stops_at_the_first_error() -> None:
    assert [*in_parallel(lambda number: number**2, range(100), threads=7)] == [number**2 for number in range(100)]
    done: list[int] = []

    def act(number: int) -> int:
        done.append(number)
        return 1 // (3 - number)

    with pytest.raises(ZeroDivisionError):
        list(in_parallel(act, range(1000), threads=4))
    assert len(done) < 20


# Reading -------------------------------------------------------------------------------------------------------------------


def test_an_opened_file_reads_and_seeks_as_a_local_one(folder: S3Folder, big: Path) -> None:
    folder.put_if_absent("big", big)
    steps = random.Random(1)
    with folder.open("big") as remote, big.open("rb") as local:
        for _ in range(12):
            offset, whence = steps.choice(
                [(steps.randrange(len(BIG) + 9), 0), (steps.randrange(100), 1), (-steps.randrange(9999), 2)]
            )
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            for length in (1, steps.randrange(100_000), steps.choice([0, PART, -1])):
                assert remote.read(length) == local.read(length) and remote.tell() == local.tell()
    with folder.open("big") as remote, big.open("rb") as local:
        assert remote.readlines() == local.readlines()
    with pytest.raises(MissingFileError):
        folder.open("none")


def test_a_download_has_all_bytes(folder: S3Folder, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_RANGE", 1_000_003)
    folder.put_if_absent("big", big)
    folder.put_if_absent("empty", b"")
    for name, content in (("big", BIG), ("empty", b"")):
        (tmp_path / "copy").write_bytes(b"in the way")
        folder.download(name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content


def test_a_file_that_changes_while_it_is_read_is_an_error(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    s3_endpoint.fill(folder, {"file": b"a" * PART})
    with folder.open("file") as file:
        file.read(1)
        s3_endpoint.fill(folder, {"file": b"b" * PART})
        with pytest.raises(StorageError, match="changed while it was being read"):
            file.read()


@pytest.mark.usefixtures("at_once")
def test_an_incomplete_response_is_requested_again(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    folder.put_if_absent("file", b"x" * 1000)
    for cut in (0, 1, 999):
        for length in (None, 1000):
            with s3_endpoint.fault("GET", "file", cut=cut, times=3):
                assert folder.read("file", 0, length) == b"x" * 1000
        with s3_endpoint.fault("GET", "file", cut=cut, times=99), pytest.raises(StorageError, match="cut off or damaged"):
            folder.read("file")


@pytest.mark.usefixtures("at_once")
def test_a_shorter_range_is_requested_again(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    """Not cut off: the endpoint says itself that it sends a shorter range than it could."""
    folder.put_if_absent("file", b"x" * 1000)
    shortened: list[str] = []

    def shorten(environ: dict[str, Any]) -> bool:
        if len(shortened) < limit and "HTTP_RANGE" in environ:
            shortened.append(environ["HTTP_RANGE"])
            environ["HTTP_RANGE"] = "bytes=100-499"
        return False

    with s3_endpoint.fault("GET", "file") as fault:
        fault.matches, limit = shorten, 3
        assert folder.read("file", 100, 800) == b"x" * 800 and shortened == ["bytes=100-899"] * 3
        limit = 99
        with pytest.raises(StorageError, match="answered only in part"):
            folder.read("file", 100, 800)


@pytest.mark.usefixtures("at_once")
def test_failed_and_lost_reads_are_requested_again(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    folder.put_if_absent("file", b"x")
    with s3_endpoint.fault("GET", "file", lose=True, times=3):
        assert folder.read("file") == b"x"
    with s3_endpoint.fault("GET", "", status="503 Slow Down", code="SlowDown", times=3):
        assert [file.name for file in folder.list()] == ["file"]


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_damaged_answers_never_become_content(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    """At the right length, with one bit flipped: whole objects with and without a checksum, in parts, and ranges."""
    contents = {"etag": BIG[:1000], "checksum": BIG[:2000], "parts": BIG}
    s3_endpoint.fill(folder, {"etag": contents["etag"]})
    client, target = s3_endpoint.boto, {"Bucket": folder.uri.split("/")[2]}
    client.put_object(**target, Key="some/where/checksum", Body=contents["checksum"], ChecksumAlgorithm="SHA256")
    target["Key"] = "some/where/parts"
    upload = client.create_multipart_upload(**target)["UploadId"]
    pieces = [BIG[start : start + PART] for start in range(0, len(BIG), PART)]
    done = [client.upload_part(**target, UploadId=upload, PartNumber=n, Body=piece) for n, piece in enumerate(pieces, 1)]
    parts = [{"PartNumber": number, "ETag": part["ETag"]} for number, part in enumerate(done, 1)]
    client.complete_multipart_upload(**target, UploadId=upload, MultipartUpload={"Parts": parts})
    for times in (1, 2, 3):
        for name, content in contents.items():
            for start, length in ((0, None), (0, len(content)), (10, 500), (0, 500)):
                with s3_endpoint.fault("GET", name, flip=True, times=times) as fault:
                    assert folder.read(name, start, length) == content[start:][:length] and fault.times == 0
            with s3_endpoint.fault("GET", name, flip=True, times=times), folder.open(name) as file:
                assert file.read() == content
    with (
        s3_endpoint.fault("GET", "etag", flip=True, times=99),
        pytest.raises(AccessError, match=r"other bytes each time|cut off or damaged"),
    ):
        folder.read("etag")


def test_whole_objects_with_a_checksum_are_read_once_and_parts_twice_unless_over_https(folder: S3Folder, s3_endpoint) -> None:
    s3_endpoint.fill(folder, {"file": BIG[:1000]})
    for start, requests in ((0, 1), (1, 2)):
        before = len(s3_endpoint.requests)
        folder.read("file", start, 1000 - start)
        assert len(s3_endpoint.requests) - before == requests
    assert folder.is_compared and not S3Folder("s3://bucket", S3Config(endpoint_url="https://host")).is_compared


# Writing -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["at once", "in parts"])
def put(request: pytest.FixtureRequest, folder: S3Folder, tmp_path: Path) -> Callable[[str, bytes], bool]:
    """Write the big content, its first byte replaced, in one request or in several."""

    def put(name: str, first: bytes) -> bool:
        source = tmp_path / f"source-{threading.get_ident()}"
        source.write_bytes(first + BIG[1:])
        return folder.put_if_absent(name, source, part_size=PART if request.param == "in parts" else len(BIG))

    return put


def _uploads(folder: S3Folder, endpoint: S3Endpoint) -> list[Any]:
    return endpoint.boto.list_multipart_uploads(Bucket=folder.uri.split("/")[2]).get("Uploads", [])


def test_a_name_keeps_its_first_bytes(folder: S3Folder, put, s3_endpoint: S3Endpoint) -> None:
    assert put("file", b"a") and put("file", b"a") and not put("file", b"b")
    assert folder.read("file") == b"a" + BIG[1:] and _uploads(folder, s3_endpoint) == []
    for content in (b"", b"b", BIG):
        assert not folder.put_if_absent("file", content)


def test_a_large_file_is_sent_in_parts_and_an_existing_one_is_not_sent(folder: S3Folder, big: Path, s3_endpoint) -> None:
    before = len(s3_endpoint.requests)
    assert folder.put_if_absent("file", big, part_size=PART)
    puts = [target for method, target, _ in s3_endpoint.requests[before:] if method == "PUT"]
    assert len(puts) == 3 and all("partNumber=" in target for target in puts)
    before = len(s3_endpoint.requests)
    assert folder.put_if_absent("file", big, part_size=PART)
    assert {method for method, _, _ in s3_endpoint.requests[before:]} == {"HEAD", "GET"}


@pytest.mark.usefixtures("at_once")
def test_a_write_whose_response_is_lost_is_recognized_by_its_bytes(folder: S3Folder, put, s3_endpoint: S3Endpoint) -> None:
    for method in ("PUT", "POST"):  # each part and the whole; the beginning and the completion of an upload in parts
        for times in (1, 2):
            name = f"{method}-{times}"
            with s3_endpoint.fault(method, name, lose=True, times=times):
                assert put(name, b"a")
            assert folder.read(name) == b"a" + BIG[1:] and not put(name, b"b")


@pytest.mark.usefixtures("at_once")
def test_a_write_without_a_response_succeeds_if_its_bytes_are_stored(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    with s3_endpoint.fault("PUT", "done", lose=True, times=99):
        assert folder.put_if_absent("done", b"x")
    fault = s3_endpoint.fault("PUT", "none", status="500 Oops", code="InternalError", times=99)
    with fault, pytest.raises(StorageError, match=r"none cannot be accessed: .*refuses to write it \(InternalError\)"):
        folder.put_if_absent("none", b"x")
    assert folder.read_if_exists("none") is None


@pytest.mark.usefixtures("at_once")
def test_a_write_that_collides_with_a_failed_one_is_repeated(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    with s3_endpoint.fault("PUT", "file", status="409 Conflict", code="ConditionalRequestConflict", times=2):
        assert folder.put_if_absent("file", b"x")
    with s3_endpoint.fault("PUT", "file", status="409 Conflict", code="ConditionalRequestConflict"):
        assert not folder.put_if_absent("file", b"y")


def test_of_many_writers_at_once_one_wins(folder: S3Folder, put) -> None:
    with ThreadPoolExecutor(4) as pool:
        kept = [*pool.map(lambda number: put("file", bytes([number])), range(4))]
    assert kept.count(True) == 1 and folder.read("file", 0, 1) == bytes([kept.index(True)])


def test_an_upload_in_parts_that_another_writer_overtakes_changes_nothing(folder: S3Folder, big: Path, s3_endpoint) -> None:
    def another_is_faster(environ: dict[str, Any]) -> bool:
        if environ["REQUEST_METHOD"] == "POST" and "uploadId=" in environ["QUERY_STRING"]:
            s3_endpoint.fill(folder, {"file": b"faster"})
        return False

    with s3_endpoint.fault("POST", "file") as fault:
        fault.matches = another_is_faster
        assert not folder.put_if_absent("file", big, part_size=PART)
    assert folder.read("file") == b"faster" and _uploads(folder, s3_endpoint) == []


@pytest.mark.usefixtures("at_once")
def test_an_upload_in_parts_that_fails_leaves_no_parts(folder: S3Folder, big: Path, s3_endpoint: S3Endpoint) -> None:
    fault = s3_endpoint.fault("PUT", "partNumber=2", status="403 Forbidden", code="AccessDenied", times=99)
    with fault, pytest.raises(StorageError, match="no permission to write it"):
        folder.put_if_absent("file", big, part_size=PART)
    with pytest.raises(StorageError, match="changed while it was written"):
        folder.put_if_absent("file", big, "ab" * 32, part_size=PART)
    assert _uploads(folder, s3_endpoint) == [] and folder.read_if_exists("file") is None


@pytest.mark.usefixtures("at_once")
def test_writes_that_arrive_damaged_are_repeated(folder: S3Folder, put, s3_endpoint: S3Endpoint) -> None:
    with s3_endpoint.fault("PUT", "file", status="400 Bad Request", code="BadDigest", times=ATTEMPTS - 1):
        assert put("file", b"a")
    fault = s3_endpoint.fault("PUT", "other", status="400 Bad Request", code="BadDigest", times=99)
    with fault, pytest.raises(AccessError, match=r"is damaged \(BadDigest\), each time"):
        put("other", b"a")


@pytest.mark.usefixtures("at_once")
def test_a_refusal_whose_body_is_cut_off_is_read_by_its_status(folder: S3Folder, put, s3_endpoint: S3Endpoint) -> None:
    assert put("file", b"a")
    for content, is_own in ((b"a", True), (b"b", False)):
        for method in ("PUT", "POST"):
            with s3_endpoint.fault(method, "file", status="412 Precondition Failed", code="PreconditionFailed", cut=20, times=99):
                assert put("file", content) == is_own


@pytest.fixture(params=["when_supported", "when_required"])
def unknown_checksums(request: pytest.FixtureRequest, folder: S3Folder, s3_endpoint: S3Endpoint, monkeypatch) -> Iterator[str]:
    """A service that knows no header of checksums, with one object. The parameter is AWS_REQUEST_CHECKSUM_CALCULATION."""
    s3_endpoint.fill(folder, {"old": b"x"})
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", request.param)
    s3_client._open_client.cache_clear()  # a client is made with the environment of its first use
    with s3_endpoint.fault("", "", status="501 Not Implemented", code="NotImplemented", times=999) as fault:
        fault.matches = lambda environ: any("X_AMZ_CHECKSUM" in name or name == "HTTP_X_AMZ_TRAILER" for name in environ)
        yield request.param
    s3_client._open_client.cache_clear()


@pytest.mark.slow
def test_a_service_without_checksums_is_used_when_they_are_not_required(
    folder: S3Folder, put, s3_endpoint: S3Endpoint, unknown_checksums: str
) -> None:
    if unknown_checksums == "when_supported":
        for act in (lambda: folder.put_if_absent("file", b"a"), lambda: folder.read("old")):
            with pytest.raises(AccessError, match=r"does not know checksums .*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
                act()
    else:
        assert put("file", b"a") and put("file", b"a") and not put("file", b"b")
        assert folder.read("file") == b"a" + BIG[1:] and folder.read("old") == b"x"
        folder.put("old", b"y")
        folder.delete(["file"])
    assert [file.name for file in folder.list()] == ["old"]
    puts = [headers for method, target, headers in s3_endpoint.requests if method in ("PUT", "POST") and "delete" in target]
    assert all("CONTENT_MD5" in headers for headers in puts), "some services require it"


def test_a_service_without_conditional_writes_is_named(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    with s3_endpoint.fault("PUT", "", status="501 Not Implemented", code="NotImplemented", times=99) as fault:
        fault.matches = lambda environ: "HTTP_IF_NONE_MATCH" in environ
        with pytest.raises(AccessError, match="cannot write a name only if it is free"):
            folder.put_if_absent("file", b"x")
    assert [*folder.list()] == []


def test_every_request_that_writes_has_a_checksum(folder: S3Folder, put, s3_endpoint: S3Endpoint) -> None:
    before = len(s3_endpoint.requests)
    put("file", b"a")
    puts = [headers for method, _, headers in s3_endpoint.requests[before:] if method == "PUT"]
    assert puts and all(len(headers["X_AMZ_CHECKSUM_SHA256"]) == 44 for headers in puts)


# Reaching a bucket ---------------------------------------------------------------------------------------------------------


def _actions(folder: S3Folder) -> list[Callable[[], Any]]:
    return [lambda: list(folder.list()), lambda: folder.read("f"), lambda: folder.put_if_absent("f", b"x")]


@pytest.mark.usefixtures("at_once")
def test_a_missing_bucket_or_endpoint_is_named(s3_endpoint: S3Endpoint) -> None:
    for config, sentence in (
        (s3_endpoint.config, rf"{s3_endpoint.url} has no such bucket; create it"),
        (S3Config(endpoint_url="http://127.0.0.1:9"), r"http://127\.0\.0\.1:9 does not answer .*check the endpoint's URL"),
    ):
        for act in _actions(S3Folder("s3://no-such-bucket/a", config)):
            with pytest.raises(StorageError, match=rf"s3://no-such-bucket/a.* {sentence}"):
                act()


def test_refusals_name_the_remedy_and_no_secret(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    bucket = folder.uri.split("/")[2]
    for status, code, sentence in (
        ("403 Forbidden", "AccessDenied", rf"no permission to .* it \(s3:\w+ on bucket {bucket}, with the credentials in use\)"),
        ("403 Forbidden", "SignatureDoesNotMatch", r"refuses the credentials \(SignatureDoesNotMatch\); renew or correct them"),
        ("400 Bad Request", "ExpiredToken", "refuses the credentials"),
        ("403 Forbidden", "RequestTimeTooSkewed", "clock is wrong"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "is not in the region us-east-1; set the region"),
        ("418 I'm a teapot", "Teapot", r"refuses to .* it \(Teapot\)"),
    ):
        for act in _actions(folder):
            with s3_endpoint.fault("", "", times=99) as fault:
                fault.matches, fault.status, fault.code = lambda environ: True, status, code
                with pytest.raises(AccessError, match=f"{folder.uri}.*{sentence}") as raised:
                    act()
            assert "test-secret" not in str(raised.value) and "test-key" not in str(raised.value)


@pytest.mark.slow
def test_missing_credentials_and_profiles_are_named(s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The regions are those of configurations that no other test has a client of."""
    for variables, region, sentence in (
        ({"AWS_PROFILE": "nobody"}, "eu-west-3", "AWS_PROFILE names a profile"),
        ({}, "eu-north-1", r"no credentials were found; set AWS_ACCESS_KEY_ID .* or read anonymously"),
    ):
        with monkeypatch.context() as patch:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(StorageError, match=sentence):
                list(S3Folder("s3://bucket/a", S3Config(endpoint_url=s3_endpoint.url, region=region)).list())


def test_the_region_is_that_of_the_config_or_aws_region_or_botocore(
    s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, region, used in (
        ({"AWS_REGION": "eu-central-1"}, None, "eu-central-1"),
        ({"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-1"}, None, "eu-central-1"),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-1"}, None, "eu-west-1"),
        ({"AWS_REGION": "eu-central-1"}, "eu-west-2", "eu-west-2"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv("AWS_DEFAULT_REGION")
            for name, value in given.items():
                patch.setenv(name, value)
            s3_client._open_client.cache_clear()  # a client is made with the environment of its first use
            client = s3_client.client_of(S3Config(endpoint_url=s3_endpoint.url, region=region))
            s3_client._open_client.cache_clear()
            assert client.meta.region_name == used


@pytest.mark.slow
def test_create_bucket_makes_a_bucket_in_the_region_of_the_store(s3_endpoint: S3Endpoint) -> None:
    """infra/s3/create_bucket.py. S3 refuses the name of us-east-1 as a location."""
    script = Path(__file__).parents[3] / "infra" / "s3" / "create_bucket.py"
    environment = {name: value for name, value in os.environ.items() if name not in ("AWS_REGION", "AWS_DEFAULT_REGION")}
    for name, variables, region in (
        ("region-1", {"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-1"}, "eu-central-1"),
        ("region-2", {"AWS_DEFAULT_REGION": "eu-west-1"}, "eu-west-1"),
        ("region-3", {"AWS_REGION": "us-east-1"}, None),
    ):
        own = environment | {"AWS_ENDPOINT_URL": s3_endpoint.url} | variables
        done = subprocess.run([sys.executable, script, name], env=own, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} was created\n", "")
        assert s3_endpoint.boto.get_bucket_location(Bucket=name)["LocationConstraint"] == region


@only_moto
def test_anonymous_requests_are_not_signed(folder: S3Folder, s3_endpoint: S3Endpoint) -> None:
    """Though there are credentials. moto lets unsigned requests read what everybody may read."""
    bucket = folder.uri.split("/")[2]
    s3_endpoint.boto.put_object(Bucket=bucket, Key="some/where/public", Body=b"for all", ACL="public-read")
    s3_endpoint.boto.put_object(Bucket=bucket, Key="some/where/private", Body=b"for few", ACL="private")
    anonymous = S3Folder(folder.uri, S3Config(endpoint_url=s3_endpoint.url, anonymous=True))
    before = len(s3_endpoint.requests)
    assert anonymous.read("public") == b"for all"
    with pytest.raises(StorageError, match="no permission to read it"):
        anonymous.read("private")
    assert all("AUTHORIZATION" not in headers for _, _, headers in s3_endpoint.requests[before:])
    folder.read("public")
    assert "AUTHORIZATION" in s3_endpoint.requests[-1][2]


def test_a_process_has_one_client_per_configuration_and_a_forked_process_its_own(folder: S3Folder, monkeypatch) -> None:
    config = folder.config
    with ThreadPoolExecutor(8) as pool:
        clients = {id(client) for client in pool.map(lambda _: s3_client.client_of(S3Config(**vars(config))), range(32))}
    assert len(clients) == 1
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert id(s3_client.client_of(config)) not in clients


def test_a_bucket_is_opened_by_its_uri(folder: S3Folder) -> None:
    folder.put_if_absent("file", b"x")
    for uri in (folder.uri, f"{folder.uri}/"):
        opened = open_folder(uri, folder.config)
        assert opened.uri == folder.uri and [file.name for file in opened.list()] == ["file"]
    above = open_folder(folder.uri.removesuffix("/some/where"), folder.config)
    assert above.folders() == ["some"] and above.read("some/where/file") == b"x"


def test_other_uris_and_endpoints_are_refused_without_repeating_passwords() -> None:
    for uri in ("s3://", "s3:///a", "s3:/bucket", "bucket", "s3://key:secret@bucket/a"):
        with pytest.raises(StorageError, match="s3://") as raised:
            S3Folder(uri)
        assert "secret@" not in str(raised.value)
    for url in ("http://user:secret@host", "host:9000", "ftp://host"):
        with pytest.raises(StorageError, match="endpoint_url") as raised:
            S3Config(endpoint_url=url)
        assert "secret@" not in str(raised.value)
