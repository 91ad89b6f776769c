"""CMMD against scikit-learn's kernel and a plain double sum, in any blocks, with its error."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import rbf_kernel

from enat.metrics import cmmd as module
from enat.metrics.cmmd import cmmd
from enat.metrics.errors import standard_error


def _features(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, 12)) + shift).astype(np.float32)


def _plain(generated: np.ndarray, reference: np.ndarray) -> float:
    x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (generated.astype(float), reference.astype(float)))
    gamma = 1 / (2 * 10.0**2)
    kernels = rbf_kernel(x, x, gamma).mean() + rbf_kernel(y, y, gamma).mean() - 2 * rbf_kernel(x, y, gamma).mean()
    return 1000 * float(kernels)


def test_it_equals_the_published_estimator_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, reference = _features(0, 90, 0.4), _features(1, 70)
    whole = cmmd(generated, reference)
    assert whole.value == pytest.approx(_plain(generated, reference), rel=1e-9)
    monkeypatch.setattr(module, "_BLOCK_SIZE", 17)
    monkeypatch.setattr(module, "_TILE_COLUMNS", 13)
    pieces = cmmd(generated, reference)
    assert pieces.value == pytest.approx(whole.value, rel=1e-9)
    np.testing.assert_allclose(pieces.influence, whole.influence, atol=1e-9)


def test_equal_sets_have_none_and_lengths_do_not_count() -> None:
    generated, reference = _features(0, 50), _features(1, 60)
    assert cmmd(generated, generated).value == pytest.approx(0, abs=1e-9)
    assert cmmd(3 * generated, reference).value == pytest.approx(cmmd(generated, reference).value, rel=1e-6)


@pytest.mark.slow
def test_its_error_is_that_of_drawing_the_samples_again() -> None:
    reference = _features(1, 400)
    found = [cmmd(_features(seed, 100, 0.3), reference) for seed in range(2, 202)]
    deviation = np.std([each.value for each in found], ddof=1)
    assert np.mean([standard_error(each.influence) for each in found]) == pytest.approx(deviation, rel=0.15)


def test_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        cmmd(_features(0, 5), _features(0, 5)[:, :3])
