"""The method's training: what is masked, what is minimized, and averages of the weights.

masking       which codes are masked
loss          the objective
averages      averages of weights over the training, of any length from a few that were kept
tokenizer     a recipe of a VQGAN for small images
"""
