"""Scores of images and of their features.

moments         mean and covariance in float64, the Fréchet distance, Inception Score
neighbours      precision, recall, density, coverage, kernel distance
extractors      networks that turn images into features; image_encoders: CLIP and DINOv2
feature_arrays  features on disk
image_pairs     PSNR and SSIM of reconstructions
adm             the .npz files of ADM's evaluation
"""

from enat.metrics.moments import FeatureMoments, frechet_distance

__all__ = ["FeatureMoments", "frechet_distance"]
