"""Settings of this folder."""

import torch

# One thread: these tensors are tiny, and on a busy machine threads mostly wait for one another.
torch.set_num_threads(1)
