import pytest
import torch

from sae_lens_alloc.ops.backend import BACKEND_VARIABLE, has_csr_kernels
from tests.helpers import one_thread

__all__ = ["one_thread"]


@pytest.fixture(params=["torch", "reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    elif request.param == "torch" and not has_csr_kernels(torch.device("cpu")):
        pytest.skip("torch was built without CSR kernels for this CPU")
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return request.param
