"""Plain versions of what is fast in the sources: tests hold both to the same numbers.

plain             the model, as the paper states it
slow_sampler      parallel decoding, one image after another
plain_training    the training step, without DeepSpeed
precise           numbers in many digits
"""
