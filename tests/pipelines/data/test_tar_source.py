"""Tar shards: members are found by their headers, and damaged, truncated and hostile shards are refused."""

from __future__ import annotations

import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from material.layouts import Row, found_in, read, scan, sentence_of, tar_bytes, write
from pipelines.data.sources.config import DatasetConfig, open_source


def _tar(tmp_path: Path, *shards: Sequence[tuple[str, bytes] | tarfile.TarInfo] | bytes) -> DatasetConfig:
    for number, shard in enumerate(shards):
        write(tmp_path / "shards" / f"{number}.tar", shard if isinstance(shard, bytes) else tar_bytes(shard))
    return DatasetConfig(kind="tar", path=str(tmp_path / "shards"))


def test_one_shard_can_be_named_alone(layouts, layouts_bucket, monkeypatch):
    rows = layouts.rows("tar")[6:12]
    assert read(DatasetConfig(kind="tar", path=str(layouts.root / "tar" / "train-0001.tar"))) == rows
    assert read(DatasetConfig(kind="tar", path=f"{layouts_bucket.uri}/tar/train-0001.tar", s3=layouts_bucket.config)) == rows
    monkeypatch.chdir(layouts.root / "tar")
    assert read(DatasetConfig(kind="tar", path="train-0001.tar")) == rows
    with pytest.raises(ValueError, match=rf"dataset\.path {layouts.root}/tar has no gone\.tar"):
        scan(DatasetConfig(kind="tar", path=str(layouts.root / "tar" / "gone.tar")))


def test_images_without_labels_and_labels_without_images_are_named(tmp_path):
    config = _tar(tmp_path, [("a.jpg", b"1"), ("b.cls", b"7"), ("c.png", b"22"), ("c.cls", b" 3\r\n"), ("c.json", b"{}")])
    assert read(config) == [Row("a", b"1"), Row("c", b"22", 3)]
    assert found_in(config) == {
        "other files": ["0.tar: c.json"],
        "labels without an image": ["0.tar: b"],
        "images without a label": ["a"],
    }


def test_labels_that_are_not_class_numbers_are_refused(tmp_path):
    for text in (b"cat", b"", b"-1", b"3.5", b"1000000", b"9" * 40, b"\xff", b"1 2", "٣".encode()):
        with pytest.raises(ValueError, match=rf"x/a\.cls of 0\.tar in {tmp_path}/shards holds '.*', not a class number"):
            scan(_tar(tmp_path, [("x/a.jpg", b"1"), ("x/a.cls", text)]))


def test_key_ends_at_the_first_dot_of_the_name_as_in_webdataset(tmp_path):
    config = _tar(tmp_path, [("./v1.5/a.seg.png", b"1"), ("v1.5/a.cls", b"2"), ("b.JPEG", b"3"), ("b.CLS", b"4"), ("c.webp", b"5")])
    assert read(config) == [Row("v1.5/a", b"1", 2), Row("b", b"3", 4), Row("c", b"5")]


def test_order_is_that_of_the_samples_however_their_files_are_interleaved(tmp_path):
    images, labels = [("b.jpg", b"1"), ("a.jpg", b"2"), ("c.jpg", b"3")], [("b.cls", b"0"), ("a.cls", b"1"), ("c.cls", b"2")]
    expected = [Row("b", b"1", 0), Row("a", b"2", 1), Row("c", b"3", 2)]
    pairs = list(zip(images, labels, strict=True))
    interleaved = [images + labels, labels + images, [m for p in pairs for m in p], [m for p in pairs for m in p[::-1]]]
    for number, members in enumerate(interleaved):
        assert read(_tar(tmp_path / str(number), members)) == expected


def test_key_that_is_repeated_in_a_shard_is_refused(tmp_path):
    for repeated, kind in (("a.jpg", "images"), ("a.png", "images"), ("a.cls", "labels")):
        with pytest.raises(ValueError, match=rf"0\.tar in .* has several {kind} with key a; keys must be unique"):
            scan(_tar(tmp_path, [("a.jpg", b"1"), ("a.cls", b"2"), (repeated, b"3")]))


def test_folders_in_a_shard_are_passed_over_and_links_named(tmp_path):
    def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    links = [member("x/b.jpg", tarfile.SYMTYPE, "a.jpg"), member("x/c.jpg", tarfile.LNKTYPE, "x/a.jpg")]
    config = _tar(tmp_path, [member("x", tarfile.DIRTYPE), ("x/a.jpg", b"1"), *links, member("p.jpg", tarfile.FIFOTYPE)])
    assert [entry.key for entry in scan(config)] == ["x/a"]
    assert found_in(config)["other files"] == ["0.tar: x/b.jpg", "0.tar: x/c.jpg", "0.tar: p.jpg"]


def test_files_that_macos_adds_are_not_images(tmp_path):
    config = _tar(tmp_path, [("x/._a.jpg", b"1"), ("x/a.jpg", b"2"), ("x/._b.jpg", b"3"), ("x/._a.cls", b"4")])
    assert read(config) == [Row("x/a", b"2")]
    assert len(found_in(config)["hidden or foreign files"]) == 3


def test_long_names_are_whole(tmp_path):
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "/".join(["folder" * 10] * 2) + "/" + "n" * 90 if format == tarfile.USTAR_FORMAT else "é" * 300
        content = tar_bytes([(f"{name}.jpg", b"1" * 700), (f"{name}.cls", b"5"), ("b.jpg", b"2")], format)
        assert read(_tar(tmp_path, content)) == [Row(name, b"1" * 700, 5), Row("b", b"2")]


def test_name_in_a_shard_that_is_not_utf_8_is_refused(tmp_path):
    content = tar_bytes([("caf\udce9.jpg", b"1")], tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match=r"the name 'caf\\udce9\.jpg' in 0\.tar in .* is not UTF-8; rename it"):
        scan(_tar(tmp_path, content))


def test_compressed_shard_is_refused(own_layouts):
    for name in ("a.tar.gz", "a.tgz", "a.tar.zst"):
        path = write(own_layouts.root / "tar" / name, b"\x1f\x8b")
        for act in (scan, lambda config: open_source(config).fingerprint()):
            with pytest.raises(ValueError, match=rf"{name} in .* is compressed"):
                act(own_layouts.config("tar"))
        path.unlink()


SMALL_TAR = tar_bytes(
    [
        member
        for number in range(4)
        for member in ((f"{number}.jpg", b"J" * (300 + 400 * number)), (f"{number}.cls", b"%d" % number))
    ]
)
END = len(SMALL_TAR.rstrip(b"\0")) // 512 * 512 + 512  # of the last member


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(SMALL_TAR) - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_never_loses_or_moves_an_image(tmp_path, position, bit):
    """Refused, or it was in an image or a label. To tarfile a damaged header is the end."""
    whole = _places(_tar(tmp_path, SMALL_TAR))
    damaged = bytearray(SMALL_TAR)
    damaged[position] ^= 1 << bit
    config = _tar(tmp_path, bytes(damaged))
    if refusal := sentence_of(lambda: scan(config)):
        assert "0.tar in" in refusal and "\n" not in refusal
    else:
        assert _places(config) == whole


def _places(config: DatasetConfig) -> list[tuple[str, int, int]]:
    return [(entry.key, entry.position, entry.size) for entry in scan(config)]


def test_shard_that_is_truncated_or_not_a_tar_file_is_refused(tmp_path):
    cut = [SMALL_TAR[:length] for length in (0, 1, 511, 512, 700, 1024, END - 512, END - 1, END, END + 511)]
    for content in (*cut, b"not a tar file" * 100, SMALL_TAR + SMALL_TAR, SMALL_TAR[:END] + b"x" * 1024):
        with pytest.raises(ValueError, match=r"0\.tar in .* (is not a complete tar file \(.*\)|holds '', not a class number)"):
            scan(_tar(tmp_path, content))


def _header(kind: bytes, size: int, name: str = "a.jpg") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def _pax(records: bytes) -> bytes:
    return _header(tarfile.XHDTYPE, len(records)) + records.ljust(512, b"\0") + _header(tarfile.REGTYPE, 1) + b"1".ljust(512, b"\0")


HOSTILE = {
    "a pax header of gigabytes": _header(tarfile.XHDTYPE, 4 << 30),
    "a long name of gigabytes": _header(tarfile.GNUTYPE_LONGNAME, 4 << 30),
    "a long name of less than nothing": _header(tarfile.GNUTYPE_LONGNAME, -512),
    "an image of less than nothing": _header(tarfile.REGTYPE, 1) + b"1".ljust(512, b"\0") + _header(tarfile.REGTYPE, -1536),
    "an image of less than nothing in pax": _pax(b"16 size=-1000000\n"),
    "an image of more than there can be": _header(tarfile.REGTYPE, 1 << 80),
    "an image of more than there can be in pax": _pax(b"34 size=" + b"9" * 25 + b"\n"),
    "headers of headers": _header(tarfile.XHDTYPE, 0) * 5000,
    "a map of holes": _pax(b"22 GNU.sparse.map=a,b\n"),
    "a character set that is none": _pax(b"18 hdrcharset=\xff\xfe\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_without_memory_or_delay(tmp_path, name):
    config = _tar(tmp_path, HOSTILE[name])
    with (tmp_path / "shards" / "0.tar").open("r+b") as file:
        file.truncate(5 << 30)  # zeros that take no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"0\.tar in .* is not a complete tar file \(.*\)"):
            scan(config)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
