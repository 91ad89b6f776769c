"""`enat sample`: images from one model on this machine, without Ray.

request        what to sample
presets        samplers by name, from presets.yaml and from files
models         opening a model by artifact, registered name or file
fixed_batches  passes of fixed composition, which make a sample independent of the others
sample         sampling, decoding and writing
pictures       grids, strips and animations
pyfunc         a registered model as MLflow loads it
"""
