import pytest
import torch

from sae_lens_alloc.ops import backend
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE, backend_for, has_csr_kernels

CPU = torch.device("cpu")


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert backend_for(CPU) == ("torch" if has_csr_kernels(CPU) else "reference")
    assert backend_for(torch.device("cuda")) == "torch"
    assert backend_for(torch.device("meta")) == "reference"


def test_the_environment_variable_overrides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert backend_for(CPU) == "reference"


def test_a_wrong_backend_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "tritn")
    with pytest.raises(
        ValueError,
        match="SAE_LENS_ALLOC_BACKEND must be one of reference, torch, triton, triton_prefilter, got 'tritn'",
    ):
        backend_for(CPU)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_backend_that_cannot_run_here_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(BACKEND_VARIABLE, name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError,
        match=f"SAE_LENS_ALLOC_BACKEND={name} cannot be used: .*; unset it",
    ):
        backend_for(torch.device("meta"))


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(ValueError, match="triton is not installed"):
        backend_for(torch.device("cuda"))
