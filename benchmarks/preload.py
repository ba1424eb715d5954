"""
What the server of processes loads before it forks. Nothing may ask for a GPU meanwhile, as
SAELens does at import: CUDA does not survive a fork.
"""

import torch

_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: False
try:
    import benchmarks.gpu.plan
    import benchmarks.measure
finally:
    torch.cuda.is_available = _is_available

__all__ = ["benchmarks"]
