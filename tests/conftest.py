import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks at it when it is imported, which SAELens' dependencies do
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Triton's kernels, on new tensors: compiled on a GPU, interpreted elsewhere."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("SAE_LENS_ALLOC_BACKEND", "triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        yield device
