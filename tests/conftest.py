import os

import torch

if not torch.cuda.is_available():
    # has to be set before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
