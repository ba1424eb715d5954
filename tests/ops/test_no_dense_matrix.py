"""No tensor of a training step is anywhere near tokens x features."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sae_lens_alloc import (
    FeatureChoiceTrainingSAE,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.ops import block_encoder, sparse
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE

N_TOKENS, D_IN, N_FEATURES, K = 256, 8, 1024, 4
DENSE = N_TOKENS * N_FEATURES
# A block of 64 features is 1/16 of the dense matrix. In the first step, which has no bound, the
# row and column of every positive affinity of a block are about as many numbers again, and
# the auxiliary loss takes 64 tokens x the flagged features, half of all or more, at a time.
SMALL = DENSE // 4


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result holds, and which one it was."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0
        self.operation = ""

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, torch.Tensor)
                and stored_elements(leaf) > self.n_elements
            ):
                self.n_elements = stored_elements(leaf)
                self.operation = str(func)
        return result


def stored_elements(tensor: torch.Tensor) -> int:
    """Elements in memory: of a sparse tensor its indices and values, of a view its storage."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().numel() + tensor._values().numel()
    if tensor.layout == torch.sparse_csr:
        return tensor.crow_indices().numel() + 2 * tensor.values().numel()
    if tensor.dtype == torch.uint8 and tensor.dim() == 1:
        return 0  # workspaces counted in bytes
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def mutual_choice(**options: Any) -> MutualChoiceTrainingSAE:
    return MutualChoiceTrainingSAE(
        MutualChoiceTrainingSAEConfig(d_in=D_IN, d_sae=N_FEATURES, k=K, **options)
    )


def feature_choice(**options: Any) -> FeatureChoiceTrainingSAE:
    return FeatureChoiceTrainingSAE(
        FeatureChoiceTrainingSAEConfig(d_in=D_IN, d_sae=N_FEATURES, k=K, **options)
    )


def training_step(sae: TrainingSAE[Any], step: int) -> torch.Tensor:
    """Loss of one training step after its backward pass, with 400 dead features."""
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[:400] = True
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=torch.randn(N_TOKENS, D_IN),
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    return output.loss


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(sparse, "_REFERENCE_CHUNK", DENSE // 32)


def test_the_recorder_sees_a_dense_matrix_forward_and_backward():
    x, weights = torch.randn(N_TOKENS, D_IN), torch.randn(D_IN, N_FEATURES)
    with LargestTensor() as largest:
        product = x @ weights
    assert largest.n_elements == product.numel() == DENSE
    small = torch.randn(1, N_FEATURES, requires_grad=True)
    with torch.no_grad():
        total = small.sum()
    assert total.numel() == 1
    loss = small.expand(N_TOKENS, -1).pow(2).sum()
    with LargestTensor() as largest:
        loss.backward()
    assert largest.n_elements == DENSE


@pytest.mark.parametrize("make_sae", [mutual_choice, feature_choice])
@pytest.mark.parametrize(
    ("options", "csr_kernels"),
    [
        ({}, True),
        ({}, False),
        ({"aux_loss": "aux_k"}, True),
        (
            {
                "aux_loss": "none",
                "rescale_acts_by_decoder_norm": False,
                "apply_b_dec_to_input": True,
            },
            True,
        ),
        ({"normalize_activations": "layer_norm", "dtype": "bfloat16"}, True),
    ],
)
def test_training_steps_hold_no_tensor_near_tokens_x_features(
    make_sae: Callable[..., TrainingSAE[Any]],
    options: dict[str, Any],
    csr_kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if not csr_kernels:
        monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    torch.manual_seed(0)
    sae = make_sae(**options)
    # the first step has no cut and no bounds yet; step 10 flags features again
    for step in (0, 1, 2, 10):
        with LargestTensor() as largest:
            loss = training_step(sae, step)
        assert torch.isfinite(loss)
        assert 0 < largest.n_elements <= SMALL, largest.operation
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.count_nonzero() > 0


@pytest.mark.parametrize("make_sae", [mutual_choice, feature_choice])
def test_training_steps_save_no_tensor_near_tokens_x_features(
    make_sae: Callable[..., TrainingSAE[Any]],
):
    torch.manual_seed(0)
    sae = make_sae()
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(stored_elements(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        training_step(sae, 0)
    assert 0 < max(sizes) <= SMALL
