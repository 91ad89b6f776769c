"""Training: from a recipe to weights.

config       the recipe
task         input and result of a training run's workers
batches      the groups of images that a step learns from
rendezvous   how the ranks meet
trainer      starting them by Ray Train
loop         the training loop
engine       the model under DeepSpeed
checkpoints  the state of training in the store
monitor      metrics of training, and divergence
previews     sample grids during training
stop_signal  saving and stopping in the same step on all ranks
"""
