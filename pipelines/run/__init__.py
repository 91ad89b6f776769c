"""One YAML file, its stages, one run.

config   the YAML file as dataclasses
loading  a run from such a file, checked
keys     every key of it, for `enat config` and the guide
graph    the list of the stages, and their wiring
own_images  a config for a folder of images, for `enat init`
prediction  what a run will take
runner   one run from its config to its answer
kept_log the log of a run, copied to the store and to MLflow
tracked  the runs of MLflow that it starts
searching  a search: trials as stages, and the winners judged
summary  the closing summary
conformance  whether scores are those of others
"""
