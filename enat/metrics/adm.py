"""The .npz files of ADM's evaluation (Dhariwal and Nichol 2021, guided-diffusion): sample batches and reference batches.

A sample batch holds `arr_0`, uint8 (N, H, W, 3), and perhaps `arr_1`, the labels. A reference batch holds the mean and covariance
of Inception's features, `mu` and `sigma`, those of its spatial features for sFID, `mu_s` and `sigma_s`, and perhaps some of the
images. Nothing is unpickled, and the images are never in memory all at once.

Shape legend: N images, R of them in a piece, H x W pixels, F features.
"""

from __future__ import annotations

import io
import math
import os
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.lib import format as npy
from torch import Tensor

from enat.images import MAX_PIXELS
from enat.metrics.moments import FeatureStatistics

MAX_BYTES = 2**36  # of pixels: 64 GiB, well above 50,000 images of 512 x 512
MAX_FEATURES = 8192  # a covariance of 512 MiB
MAX_IMAGES = 2**24
_REASON_LENGTH = 200  # letters of an error of zipfile or numpy
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # of every member: equal images give equal files
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of name and extra field
_MAX_HEADER_BYTES = 2**14  # of a .npy; numpy itself takes up to 10,000


@dataclass(frozen=True)
class AdmReference:
    """Statistics of a reference batch, None if it has none. pool: F = 2048, for FID.   spatial: F = 2023, for sFID.

    has_images: whether AdmSamples can read images from it, as precision and recall need them.
    """

    pool: FeatureStatistics | None
    spatial: FeatureStatistics | None
    has_images: bool


@dataclass(frozen=True)
class _Member:
    """An array of an .npz, as declared by its .npy header of header_bytes. num_bytes: size of its values."""

    info: zipfile.ZipInfo
    header_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_reference(path: Path) -> AdmReference:
    """The statistics of an .npz: float mu (F,), sigma (F, F), and mu_s, sigma_s.

    Raises ValueError for any other file, a damaged one, and more than MAX_FEATURES features.
    """
    with _open(path) as archive:
        pool, spatial = _read_statistics(archive, path, "mu", "sigma"), _read_statistics(archive, path, "mu_s", "sigma_s")
        return AdmReference(pool, spatial, has_images="arr_0.npy" in archive.namelist())


def _read_statistics(archive: zipfile.ZipFile, path: Path, mean_name: str, covariance_name: str) -> FeatureStatistics | None:
    if not {f"{mean_name}.npy", f"{covariance_name}.npy"} & set(archive.namelist()):
        return None
    mean, covariance = _find_member(archive, path, mean_name), _find_member(archive, path, covariance_name)
    are_floats = all(member.dtype.kind == "f" and member.dtype.itemsize in (4, 8) for member in (mean, covariance))
    if not are_floats or len(mean.shape) != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"{path}: {mean_name} is {mean.dtype} {mean.shape} and {covariance_name} {covariance.dtype} {covariance.shape}; "
            "float32 or float64 (F,) and (F, F) are needed"
        )
    if mean.shape[0] > MAX_FEATURES:
        raise ValueError(f"{path}: {mean_name} has {mean.shape[0]} features, over the limit of {MAX_FEATURES}")
    mean_values, covariance_values = _read_member(archive, path, mean), _read_member(archive, path, covariance)
    try:
        return FeatureStatistics(mean_values, covariance_values)
    except ValueError as error:
        raise ValueError(f"{path}: {mean_name} and {covariance_name} cannot be used: {error}") from error


class AdmSamples:
    """The images of a sample batch, or of a reference batch that has some, read piece by piece. Can be sent to workers.

    Any piece of an uncompressed array can be read directly; a compressed array is a stream, best read in order.
    num_images N, height H, width W; labels: int64 (N,) or None.
    Raises ValueError for any other file, a damaged one, and one with more than max_bytes of pixels.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        with _open(path) as archive:
            self._member = _find_member(archive, path, "arr_0")
            self.num_images, self.height, self.width = _check_images(self._member, path, max_bytes)
            self.labels = _read_labels(archive, path, self.num_images)
            is_stored = self._member.info.compress_type == zipfile.ZIP_STORED
            self._offset = _offset_of_pixels(path, self._member) if is_stored else None
        self._stream: IO[bytes] | None = None  # opened when a compressed array is first read
        self._position = 0  # the next image of the stream

    def read(self, start: int, stop: int) -> UInt8[Tensor, "R 3 H W"]:
        """Images start..stop. Raises ValueError for images that do not exist or cannot be decompressed."""
        if not 0 <= start <= stop <= self.num_images:
            raise ValueError(f"{self.path} has {self.num_images} images; images {start} to {stop} were requested")
        try:
            with _reading(self.path):
                content = self._read_stream(start, stop) if self._offset is None else self._read_stored(self._offset, start, stop)
                if len(content) != (stop - start) * self._image_bytes:
                    raise EOFError("arr_0 ends early")
        except ValueError:
            self.close()  # the position of a stream is unknown after an error
            raise
        pixels = np.frombuffer(content, np.uint8).reshape(stop - start, self.height, self.width, 3)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    @property
    def _image_bytes(self) -> int:
        return self.height * self.width * 3

    def _read_stored(self, offset: int, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset + start * self._image_bytes)
            return file.read((stop - start) * self._image_bytes)

    def _read_stream(self, start: int, stop: int) -> bytes:
        if self._stream is None or start < self._position:
            self.close()
            with zipfile.ZipFile(self.path) as archive:  # the stream keeps its own handle of the file
                self._stream = archive.open(self._member.info)
            _skip(self._stream, self._member.header_bytes)
            self._position = 0
        _skip(self._stream, (start - self._position) * self._image_bytes)
        self._position = stop
        return self._stream.read((stop - start) * self._image_bytes)

    def verify(self) -> None:
        """Read all of the images once. Raises ValueError if they do not match the archive's checksum."""
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self._member.info) as stream:
            while stream.read(2**20):
                pass

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}


def _check_images(member: _Member, path: Path, max_bytes: int) -> tuple[int, int, int]:
    """N, H, W"""
    shape, dtype = member.shape, member.dtype
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or member.is_fortran:
        order = " in Fortran order" if member.is_fortran else ""
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}{order}; uint8 (N, H, W, 3) is needed")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise ValueError(f"{path}: images of {shape[1]} x {shape[2]} pixels are over the limit of {MAX_PIXELS} pixels")
    if member.num_bytes > max_bytes or shape[0] > MAX_IMAGES:
        limits = f"{max_bytes:,} bytes and {MAX_IMAGES:,} images"
        raise ValueError(f"{path}: {shape[0]:,} images of {member.num_bytes:,} bytes are over the limits of {limits}")
    return shape[0], shape[1], shape[2]


def _read_labels(archive: zipfile.ZipFile, path: Path, num_images: int) -> np.ndarray | None:
    if "arr_1.npy" not in archive.namelist():
        return None
    member = _find_member(archive, path, "arr_1")
    if member.dtype.kind not in "iu" or member.shape != (num_images,):
        raise ValueError(f"{path}: arr_1 is {member.dtype} {member.shape}; labels, integers ({num_images},), are needed")
    return _read_member(archive, path, member).astype(np.int64)


def _offset_of_pixels(path: Path, member: _Member) -> int:
    """Offset of the first pixel of an uncompressed array in the file. Raises ValueError if the array exceeds the file."""
    with _reading(path), path.open("rb") as file:
        file.seek(member.info.header_offset)
        _, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = member.info.header_offset + _LOCAL_HEADER.size + sum(lengths)
        if start + member.info.file_size > file.seek(0, os.SEEK_END):
            raise EOFError("arr_0 ends early")
    return start + member.header_bytes


class AdmWriter:
    """Write a sample batch piece by piece, uncompressed; AdmSamples and np.load read it.

        with AdmWriter(path, num_images=50_000, height=256, width=256) as writer:
            writer.write(images)  # uint8 (R, 3, H, W), again and again

    The file appears under its name in one step, once it is complete. After an error it does not appear, and an older file remains.
    `labels`: int (N,), stored as arr_1. Raises ValueError for pieces that do not fit and for fewer images than announced.
    """

    def __init__(self, path: Path, *, num_images: int, height: int, width: int, labels: np.ndarray | None = None) -> None:
        if min(num_images, height, width) < 1:
            raise ValueError(f"{path}: {num_images} images of {height} x {width} pixels cannot be written")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (num_images,)):
            raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}; integers ({num_images},) are needed")
        self.path, self.labels = path, labels
        self.shape = (num_images, height, width, 3)
        self._written = 0

    def __enter__(self) -> Self:
        self._part = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")
        self._file = self._part.open("xb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._stream = self._archive.open(zipfile.ZipInfo("arr_0.npy", _FIRST_DATE), "w", force_zip64=True)
        npy.write_array_header_1_0(self._stream, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
        return self

    def write(self, images: UInt8[Tensor, "R 3 H W"]) -> None:
        """Append images."""
        num_images, height, width, _ = self.shape
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; uint8 (R, 3, {height}, {width}) is needed")
        if self._written + len(images) > num_images:
            raise ValueError(f"{self.path} is for {num_images} images; {len(images)} more do not fit after {self._written}")
        self._stream.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
        self._written += len(images)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._file:
                with self._archive:
                    self._stream.close()
                    if kind is None and self.labels is not None:
                        with self._archive.open(zipfile.ZipInfo("arr_1.npy", _FIRST_DATE), "w") as stream:
                            npy.write_array(stream, np.ascontiguousarray(self.labels, dtype=np.int64), allow_pickle=False)
                self._file.flush()
                os.fsync(self._file.fileno())
            if kind is None:
                if self._written != self.shape[0]:
                    raise ValueError(f"{self.path} is for {self.shape[0]} images, but {self._written} were written")
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the errors of zipfile, zlib and numpy for damaged, encrypted and missing files into ValueError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:_REASON_LENGTH]  # zipfile quotes whole headers
        raise ValueError(f"{path} cannot be read as an .npz: {reason}") from error


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    with _reading(path):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


def _find_member(archive: zipfile.ZipFile, path: Path, name: str) -> _Member:
    """Raises ValueError if the member is missing, or is not an array of numbers of exactly the declared size."""
    names = [member.removesuffix(".npy") for member in archive.namelist()]
    if name not in names:
        raise ValueError(f"{path} holds no {name}, but {', '.join(sorted(names)[:8]) or 'nothing'}")
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{path}: {name} is compressed by method {info.compress_type}; numpy reads only deflate")
    with _reading(path):
        with archive.open(info) as stream:
            header = io.BytesIO(stream.read(_MAX_HEADER_BYTES))
        version = npy.read_magic(header)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has .npy version {version}")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read_header(header)
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} holds pickled objects, which are not read; save numbers")
    member = _Member(info, header.tell(), shape, dtype, is_fortran and len(shape) > 1)
    if min(shape, default=0) < 0 or member.header_bytes + member.num_bytes != info.file_size:
        raise ValueError(f"{path}: {name} is declared as {dtype} {shape}, which {info.file_size:,} bytes cannot be")
    return member


def _read_member(archive: zipfile.ZipFile, path: Path, member: _Member) -> np.ndarray:
    """The whole array; the caller has checked its size."""
    with _reading(path), archive.open(member.info) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _skip(stream: IO[bytes], num_bytes: int) -> None:
    while num_bytes > 0 and (skipped := len(stream.read(min(num_bytes, 2**20)))):
        num_bytes -= skipped
