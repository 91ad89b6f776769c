"""`enat sample`: images from one model on this machine, without Ray.

request        what to sample
models         opening a model by artifact, registered name or file
fixed_batches  passes of fixed composition, so that a sample does not depend on the others
sample         sampling and writing
pictures       strips and animations
"""
