"""Parallel decoding in a few steps.

predictor     what each step predicts: its passes, what they reuse, and guidance
sampler       the loop: predict, draw, re-mask
cuda_graph    the loop as one CUDA graph
"""
