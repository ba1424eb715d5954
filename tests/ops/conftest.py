from collections.abc import Iterator

import pytest
import torch

from sae_lens_alloc.ops.backend import BACKEND_VARIABLE, has_csr_kernels


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small, several threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(params=["torch", "reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    elif request.param == "torch" and not has_csr_kernels(torch.device("cpu")):
        pytest.skip("torch was built without CSR kernels for this CPU")
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return request.param
