"""Settings of this folder."""

import sys
from pathlib import Path

import torch

# This folder, for plain.py and small_models.py in any import mode of pytest. The repository's root comes first: if tests/ is on the
# path, its folder named enat would hide the package.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

# One thread: these tensors are tiny, and on a busy machine threads mostly wait for one another.
torch.set_num_threads(1)
