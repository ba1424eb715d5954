"""
What the server of processes loads before it forks. Nothing may ask for a GPU meanwhile, as
SAELens does at import: CUDA does not survive a fork.
"""

from importlib import import_module

import torch

_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: False
try:
    for module in ("benchmarks.measure", "benchmarks.gpu.plan"):
        import_module(module)
finally:
    torch.cuda.is_available = _is_available
