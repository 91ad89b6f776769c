"""scikit-learn's handwritten digits: real 8 x 8 scans with 17 gray levels, as PNG bytes.

The file is read from scikit-learn's folder, because importing scikit-learn takes over a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from enat.images import png_bytes
from pipelines.data.sources.base import Entry, Findings, Source


class DigitsSource(Source):
    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, 8, 8), and labels int32 (B,)"""
        spec = find_spec("sklearn")
        if spec is None or spec.origin is None:
            raise ValueError("dataset.kind is digits, which scikit-learn contains. Install scikit-learn.")
        rows = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        return np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), rows[:, -1].astype(np.int32)

    def fingerprint(self) -> str:
        images, labels = self._digits
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def known_classes(self) -> Sequence[str]:
        return tuple(map(str, range(10)))

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        for index, label in enumerate(self._digits[1]):
            yield Entry(f"digit-{index:04d}", "", index, 0, int(label))

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        for entry in entries:
            yield png_bytes(Image.fromarray(self._digits[0][entry.position]))
