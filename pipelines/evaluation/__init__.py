"""Scores of samples against a reference.

readers        batches of images from samples, datasets and image sets
extractors     feature extractors with their weights
features       features of many images, on workers
scores         scores from features
judge          whether a classifier sees the label that was asked for
clip_score     how well samples fit their captions
nearest        the nearest rows of a token map
training_scores  scores of a model while it trains
adm_reference  reference statistics from ADM's .npz files
protocol       how an evaluation was measured
"""
