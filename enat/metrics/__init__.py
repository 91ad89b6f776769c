"""Scores of images and of their features.

moments         mean and covariance in float64, the Fréchet distance, Inception Score, kernel distance
errors          standard errors of these scores, and the Fréchet distance at infinitely many samples
cmmd            maximum mean discrepancy of CLIP embeddings
clip_score      how well images fit their captions
sliced          sliced Wasserstein distance, for few samples
neighbours      precision, recall, density, coverage, authenticity
hamming         the nearest rows of codes, and rows that are equal
extractors      the interface of networks that turn images into features, and the list of them (imports no torch)
inception       InceptionV3;  image_encoders: CLIP and DINOv2;  classifier: a network trained on a dataset's own labels
image_pairs     PSNR and SSIM of reconstructions
adm             the .npz files of ADM's evaluation
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enat.metrics.moments import FeatureMoments, frechet_distance

__all__ = ["FeatureMoments", "frechet_distance"]


def __getattr__(name: str) -> Any:  # loaded on first use, as the names of enat
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from enat.metrics import moments

    return getattr(moments, name)
