"""Settings of this folder."""

import sys
from pathlib import Path

import torch

# This folder for plain.py and small_models.py, whatever import mode pytest runs in. The repository's root before it: tests/ may
# stand on the path, too, where a folder called enat would hide the package.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

# One thread: these tensors are tiny, and on a busy machine threads mostly wait for one another.
torch.set_num_threads(1)
