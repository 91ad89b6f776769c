"""Stages, their keys, the plan, and its execution.

stage        what a stage is, what is known of it, and what it may use
driver       planning and executing a graph of stages
node_run     one node of it: reused, or computed and committed; what all nodes of a run share
model_runs   runs of MLflow, one for each model
inputs       data of artifacts, as MLflow lists it
summary      what one stage tells another, stored in manifests
models       the summaries of tokenizers and models
config       YAML and overrides as dataclasses
work         what a stage has to do, in numbers; prices of hours
costs        worker-seconds, device-seconds, money
progress     progress bars
interruption Ctrl-C while stages run in threads
provenance   which code this is, and the code as a package
"""
