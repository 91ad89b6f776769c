"""ADM's .npz files: np.load reads written ones, files of np.savez are read, and other files are refused without harm."""

import pickle
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from enat.metrics.adm import AdmSamples, AdmWriter, read_reference
from enat.metrics.moments import FeatureMoments, frechet_distance


def drawn_images(count=9, height=5, width=7, seed=0):
    """uint8 (N, H, W, 3), as ADM has them."""
    return np.random.default_rng(seed).integers(0, 256, size=(count, height, width, 3), dtype=np.uint8)


def channels_first(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def write(path, images, labels=None, piece=4):
    with AdmWriter(path, num_images=len(images), height=images.shape[1], width=images.shape[2], labels=labels) as writer:
        for start in range(0, len(images), piece):
            writer.write(channels_first(images[start : start + piece]))


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def save(request):
    return request.param


@pytest.mark.parametrize("labels", [None, np.arange(9)])
def test_numpy_reads_written_samples(tmp_path, labels):
    images = drawn_images()
    for name, piece in (("samples.npz", 2), ("again.npz", 9)):
        write(tmp_path / name, images, labels, piece)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        assert arrays.files == (["arr_0"] if labels is None else ["arr_0", "arr_1"])
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], images)
        assert labels is None or np.array_equal(arrays["arr_1"], labels)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.npz", "again.npz"}
    assert (tmp_path / "samples.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()


@pytest.mark.parametrize("labels", [None, np.arange(9, dtype=np.int32)])
def test_any_piece_can_be_read_also_by_workers(tmp_path, save, labels):
    images, path = drawn_images(), tmp_path / "samples.npz"
    save(path, images, *([] if labels is None else [labels]))
    samples = AdmSamples(path)
    assert (samples.num_images, samples.height, samples.width) == (9, 5, 7)
    assert samples.labels is None if labels is None else samples.labels.tolist() == labels.tolist()
    for start, stop in ((0, 2), (2, 5), (7, 9), (1, 3), (3, 3), (0, 9)):  # forwards, over a gap, and back
        piece = samples.read(start, stop)
        assert piece.dtype == torch.uint8
        assert torch.equal(piece, channels_first(images[start:stop]))
    samples.verify()
    sent = pickle.dumps(samples)
    assert len(sent) < 2000 and torch.equal(pickle.loads(sent).read(2, 9), channels_first(images[2:]))
    samples.close()
    assert torch.equal(samples.read(4, 6), channels_first(images[4:6]))


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, is_compressed):
    """64 MiB of images in pieces of 1 MiB."""
    path = tmp_path / "samples.npz"
    tracemalloc.start()
    try:
        with AdmWriter(path, num_images=512, height=256, width=171) as writer:
            for _ in range(64):
                writer.write(torch.zeros(8, 3, 256, 171, dtype=torch.uint8))
        if is_compressed:
            path = tmp_path / "compressed.npz"
            declare(path, (512, 256, 171, 3), 512 * 256 * 171 * 3)
        samples = AdmSamples(path)
        for start in (0, 8, 504):
            samples.read(start, start + 8)
        samples.verify()
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fault", ["error", "too few", "too many", "another size", "floats"])
def test_failed_write_keeps_the_old_file(tmp_path, fault):
    path = tmp_path / "samples.npz"
    write(path, drawn_images(seed=1))
    before = path.read_bytes()
    piece = channels_first(drawn_images(4))
    wrong = {"too many": piece, "another size": piece[..., :6], "floats": piece.float(), "error": None, "too few": piece[:0]}
    with pytest.raises((ValueError, AttributeError)), AdmWriter(path, num_images=6, height=5, width=7) as writer:  # noqa: PT012
        writer.write(piece)
        writer.write(wrong[fault])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]
    for options, message in (
        ({"num_images": 0}, "0 images of 5 x 7 pixels cannot be written"),
        ({"labels": np.arange(3)}, r"labels are int64 \(3,\); integers \(9,\) are needed"),
        ({"labels": np.zeros(9)}, r"labels are float64 \(9,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            AdmWriter(path, **{"num_images": 9, "height": 5, "width": 7, **options})


@pytest.mark.faults
def test_killed_writer_leaves_no_file_of_that_name(tmp_path):
    script = """
        import sys, time, pathlib, torch
        from enat.metrics.adm import AdmWriter
        with AdmWriter(pathlib.Path(sys.argv[1]), num_images=400, height=64, width=64) as writer:
            writer.write(torch.zeros(200, 3, 64, 64, dtype=torch.uint8))
            print("half", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "samples.npz")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "samples.npz").exists()


def statistics_of(count, num_features, seed):
    features = np.random.default_rng(seed).normal(size=(count, num_features))
    return features, features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reference_statistics_are_read(tmp_path, save, dtype):
    pool, mu, sigma = statistics_of(60, 12, 0)
    spatial, mu_s, sigma_s = statistics_of(60, 9, 1)
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    save(tmp_path / "reference.npz", arr_0=drawn_images(), **{name: array.astype(dtype) for name, array in arrays.items()})
    reference = read_reference(tmp_path / "reference.npz")
    assert reference.has_images and AdmSamples(tmp_path / "reference.npz").num_images == 9
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    for features, statistics in ((pool, reference.pool), (spatial, reference.spatial)):
        assert statistics.mean.dtype == statistics.covariance.dtype == np.float64
        generated = np.random.default_rng(2).normal(size=(50, features.shape[1]))
        expected, moments = (FeatureMoments(features.shape[1]).add(each) for each in (features, generated))
        assert frechet_distance(moments, statistics) == pytest.approx(frechet_distance(moments, expected), rel=tolerance)


EYE, IMAGES = np.eye(4), drawn_images()


@pytest.mark.parametrize(
    ("read", "arrays", "message"),
    [
        (read_reference, {"mu": np.zeros(4)}, "holds no sigma, but mu"),
        (read_reference, {"mu": np.zeros(4), "sigma": np.eye(5)}, r"float64 \(5, 5\); float32 or float64 \(F,\) and \(F, F\) are"),
        (read_reference, {"mu": np.zeros((4, 4)), "sigma": EYE}, "are needed"),
        (read_reference, {"mu": np.zeros(4, int), "sigma": EYE}, "mu is int64"),
        (read_reference, {"mu": np.zeros(4), "sigma": EYE.astype(np.float16)}, "sigma float16"),
        (read_reference, {"mu": np.zeros(4), "sigma": EYE.astype(object)}, "sigma holds pickled objects"),
        (read_reference, {"mu": np.zeros(4), "sigma": np.tri(4)}, "mu and sigma cannot be used: .* not symmetric"),
        (read_reference, {"mu": np.full(4, np.nan), "sigma": EYE}, "not finite"),
        (read_reference, {"mu": np.zeros(4), "sigma": EYE, "mu_s": np.zeros(4)}, "holds no sigma_s"),
        (AdmSamples, {"mu": np.zeros(4), "sigma": EYE}, "holds no arr_0, but mu, sigma"),
        (AdmSamples, {"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \(9, 5, 7, 3\); uint8 \(N, H, W, 3\) is needed"),
        (AdmSamples, {"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"\(9, 3, 5, 7\)"),
        (AdmSamples, {"arr_0": IMAGES[0]}, r"\(5, 7, 3\)"),
        (AdmSamples, {"arr_0": IMAGES[:0]}, r"\(0, 5, 7, 3\)"),
        (AdmSamples, {"arr_0": np.asfortranarray(IMAGES)}, "in Fortran order"),
        (AdmSamples, {"arr_0": IMAGES.astype(object)}, "arr_0 holds pickled objects, which are not read"),
        (AdmSamples, {"arr_0": IMAGES, "arr_1": np.arange(8)}, r"arr_1 is int64 \(8,\); labels, integers \(9,\), are needed"),
        (AdmSamples, {"arr_0": IMAGES, "arr_1": np.zeros(9)}, "arr_1 is float64"),
        (AdmSamples, {"arr_0": IMAGES, "arr_1": np.array([{}] * 9)}, "arr_1 holds pickled objects"),
    ],
)
def test_unsuitable_arrays_are_refused(tmp_path, save, read, arrays, message):
    save(tmp_path / "arrays.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "arrays.npz")


def declare(path, shape, num_bytes, method=zipfile.ZIP_DEFLATED):
    """A member arr_0 whose header declares this shape, in front of zeros."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("arr_0.npy", "w", force_zip64=True) as stream:
        npy.write_array_header_2_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _ in range(num_bytes // 2**20):
            stream.write(bytes(2**20))
        stream.write(bytes(num_bytes % 2**20))


@pytest.mark.parametrize(
    ("shape", "num_bytes", "message"),
    [
        ((50_000, 512, 512, 3), 1000, "which 1,128 bytes cannot be"),
        ((2, 4, 4, 3), 97, "cannot be"),
        ((2**40, 2**40, 2**40, 3), 0, "cannot be"),
        ((-2, 4, -4, 3), 96, "cannot be"),
        ((1, 9500, 9500, 3), 9500 * 9500 * 3, "9500 x 9500 pixels are over the limit"),
        pytest.param(
            *((2**24 + 1, 1, 1, 3), 3 * (2**24 + 1), "16,777,217 images of 50,331,651 bytes are over the limits"),
            marks=pytest.mark.slow,
        ),
        # A header of 100 MB that is one long text.
        pytest.param(None, 10**8, r"cannot be read as an \.npz", marks=pytest.mark.slow),
    ],
)
def test_archive_that_declares_too_much_is_refused_before_it_is_read(tmp_path, shape, num_bytes, message):
    path = tmp_path / "bomb.npz"
    if shape is not None:
        declare(path, shape, num_bytes)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as stream:
            stream.write(npy.magic(2, 0) + num_bytes.to_bytes(4, "little"))
            for _ in range(100):
                stream.write(b" " * (num_bytes // 100))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            AdmSamples(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_limit_of_bytes_can_be_given(tmp_path):
    declare(tmp_path / "samples.npz", (1000, 32, 32, 3), 1000 * 32 * 32 * 3)
    assert AdmSamples(tmp_path / "samples.npz").num_images == 1000
    with pytest.raises(ValueError, match="3,072,000 bytes are over the limits of 3,000,000 bytes"):
        AdmSamples(tmp_path / "samples.npz", max_bytes=3_000_000)


def test_other_compressions_and_files_are_refused(tmp_path):
    declare(tmp_path / "lzma.npz", (1, 4, 4, 3), 48, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="only deflate"):
        AdmSamples(tmp_path / "lzma.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("text.npz", "missing.npz"):
        for read in (AdmSamples, read_reference):
            with pytest.raises(ValueError, match=rf"{name} cannot be read as an \.npz"):
                read(tmp_path / name)


def test_truncated_file_is_refused(tmp_path, save):
    save(tmp_path / "samples.npz", drawn_images())
    whole = (tmp_path / "samples.npz").read_bytes()
    for length in range(0, len(whole), 13):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            AdmSamples(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes(whole)
    samples = AdmSamples(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes(whole[:400])  # it shrinks while it is in use
    with pytest.raises(ValueError, match="cannot be read"):
        samples.read(0, 9)


def test_changed_pixels_are_found_by_verifying(tmp_path):
    path = tmp_path / "samples.npz"
    write(path, drawn_images())
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        AdmSamples(path).verify()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), is_compressed=st.booleans())
def test_damaged_byte_is_refused_or_harmless(tmp_path, place, value, is_compressed):
    path = tmp_path / "samples.npz"
    (np.savez_compressed if is_compressed else np.savez)(path, drawn_images(), np.arange(9))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] = value
    path.write_bytes(content)
    refusal = str(path)
    try:
        samples = AdmSamples(path)
        samples.read(0, samples.num_images)
        samples.verify()
    except ValueError as error:
        refusal = str(error)
    assert str(path) in refusal
