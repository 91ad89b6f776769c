"""Numbers in so many digits that what is compared with them cannot be as wrong in the same way."""

from __future__ import annotations

import mpmath
import numpy as np


def precise_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Frechet distance of all features (N, F) at once, in 40 digits; covariances must be regular."""
    with mpmath.workdps(40):
        means, covariances = [], []
        for features in (first, second):
            rows = [mpmath.matrix(row.tolist()) for row in features]
            mean = sum(rows[1:], rows[0]) / len(rows)
            scatter = mpmath.zeros(features.shape[1])
            for row in rows:
                scatter += (row - mean) * (row - mean).T
            means.append(mean)
            covariances.append(scatter / (len(rows) - 1))
        root = mpmath.cholesky(covariances[0])
        eigenvalues = mpmath.eigsy(root.T * covariances[1] * root, eigvals_only=True)
        trace = sum(covariances[0][i, i] + covariances[1][i, i] for i in range(first.shape[1]))
        shift = means[0] - means[1]
        return float((shift.T * shift)[0] + trace - 2 * sum(mpmath.sqrt(value) for value in eigenvalues))
