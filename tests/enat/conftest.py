"""Settings of this folder: two threads, and properties that draw the same examples in every run."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

# plain.py and small_models.py stand beside the tests, whatever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(2)

# No deadline: the first forward pass of a process is many times slower than the next.
settings.register_profile("enat", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("enat")
