"""One YAML file, the stages it means, one run.

config   the YAML file as dataclasses
graph    which stages a run has, and what each reads
runner   one run from its config to its answer
summary  the closing summary
"""
