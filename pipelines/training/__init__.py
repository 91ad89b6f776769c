"""Training: from a recipe to weights.

config       the recipe
task         what a step learns from
batches      which rows a step reads
loop         the steps
engine       DeepSpeed
checkpoints  the state of training in the store
monitor      figures of training, and whether it diverged
previews     sample grids along training
stop_signal  stopping in the same step everywhere
"""
