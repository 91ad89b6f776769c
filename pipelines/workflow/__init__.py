"""Stages, their keys, the plan, and running it.

stage       what a stage is and what it may touch
driver      planning and executing a graph of stages
config      YAML and overrides as dataclasses
costs       worker-seconds, device-seconds, money
progress    progress bars
provenance  which code this is, and the code as a package
"""
