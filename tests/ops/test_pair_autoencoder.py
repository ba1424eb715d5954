"""The sparse decode and its gradients against the dense SAELens formulas."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sae_lens_alloc.ops.backend import is_interpreted
from sae_lens_alloc.ops.pair_autoencoder import (
    GradientMemory,
    decode_pairs,
    pair_pre_acts,
)

pytestmark = pytest.mark.usefixtures("backend")

B, D_IN, F = 4, 3, 6


@pytest.fixture
def not_interpreted(backend: str) -> None:
    if backend == "triton" and is_interpreted():
        pytest.skip("a gradcheck takes a minute where Triton's kernels are interpreted")


class Weights(NamedTuple):
    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


def random_weights(
    n_tokens: int = B,
    d_in: int = D_IN,
    n_features: int = F,
    dtype: torch.dtype = torch.float64,
) -> Weights:
    torch.manual_seed(0)
    weights = Weights(
        torch.randn(n_tokens, d_in, dtype=dtype),
        torch.randn(d_in, n_features, dtype=dtype),
        torch.randn(n_features, dtype=dtype),
        torch.randn(n_features, d_in, dtype=dtype),
    )
    return Weights(*(tensor.requires_grad_() for tensor in weights))


def masks(n_sets: int) -> torch.Tensor:
    """
    Pairs of shape (n_sets, B, F). Token 1 and feature 3 have none; the second set has (0, 0)
    and (2, 1) in common with the first.
    """
    mask = torch.zeros(2, B, F)
    for token, feature in [(0, 0), (0, 2), (2, 1), (2, 2), (2, 5), (3, 0)]:
        mask[0, token, feature] = 1
    for token, feature in [(0, 0), (0, 4), (2, 1), (3, 5), (3, 4)]:
        mask[1, token, feature] = 1
    assert mask[:, 1].sum() == mask[:, :, 3].sum() == 0
    return mask[:n_sets]


def indices(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and features of masks of shape (n_sets, B, F)."""
    rows, features = mask.flatten(0, 1).nonzero(as_tuple=True)
    return rows, features


def reconstruct_pairs(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    rows: torch.Tensor,
    features: torch.Tensor,
    pre_acts: torch.Tensor,
    n_sets: int = 1,
    memory: GradientMemory | None = None,
    subtracted: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decodes the pre-activations of the pairs: both halves, one after the other."""
    values = pair_pre_acts(
        *(x, W_enc, b_enc, rows, features, pre_acts, n_sets, subtracted, memory, real)
    )
    return decode_pairs(values, W_dec, rows, features, len(x), n_sets, memory, real)


def reconstruct(
    weights: Weights, mask: torch.Tensor, subtracted: torch.Tensor | None = None
) -> torch.Tensor:
    """`reconstruct_pairs` of the pre-activations that the weights give."""
    rows, features = indices(mask)
    x, W_enc, b_enc, _ = weights
    with torch.no_grad():
        pre_acts = (x @ W_enc + b_enc)[rows % len(x), features]
    return reconstruct_pairs(
        *weights, rows, features, pre_acts, len(mask), subtracted=subtracted
    )


def dense_reconstruct(weights: Weights, mask: torch.Tensor) -> torch.Tensor:
    x, W_enc, b_enc, W_dec = weights
    return torch.stack([(m * (x @ W_enc + b_enc)) @ W_dec for m in mask.to(x.dtype)])


def test_reconstruct_pairs_by_hand():
    # one token x = [1, 2], features with encoders [1, 0], [0, 1], [1, 1], biases [0, 1, -1]
    x = torch.tensor([[1.0, 2.0]])
    W_enc = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], requires_grad=True)
    b_enc = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    W_dec = torch.tensor([[5.0, 0.0], [0.0, 1.0], [2.0, 3.0]], requires_grad=True)
    # features 1 and 2 are active, with pre-activations 2 + 1 = 3 and 1 + 2 - 1 = 2
    out = reconstruct_pairs(
        x,
        W_enc,
        b_enc,
        W_dec,
        rows=torch.tensor([0, 0]),
        features=torch.tensor([1, 2]),
        pre_acts=torch.tensor([3.0, 2.0]),
    )
    # 3 * [0, 1] + 2 * [2, 3] = [4, 9]
    assert out.tolist() == [[[4, 9]]]
    # gradient [1, 10]: of the pre-activations [1, 10] . [0, 1] = 10, [1, 10] . [2, 3] = 32
    out.backward(torch.tensor([[[1.0, 10.0]]]))
    assert W_dec.grad is not None and W_enc.grad is not None and b_enc.grad is not None
    assert W_dec.grad.tolist() == [[0, 0], [3, 30], [2, 20]]
    assert b_enc.grad.tolist() == [0, 10, 32]
    assert W_enc.grad.tolist() == [[0, 10, 32], [0, 20, 64]]


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("n_sets", [1, 2])
def test_reconstruct_pairs_passes_gradcheck(n_sets: int):
    mask = masks(n_sets)

    def function(*weights: torch.Tensor) -> torch.Tensor:
        return reconstruct(Weights(*weights), mask)

    assert torch.autograd.gradcheck(function, tuple(random_weights()))


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("n_sets", [1, 2])
def test_reconstruct_pairs_passes_gradcheck_with_a_subtracted_bias(n_sets: int):
    mask = masks(n_sets)
    weights = random_weights()
    torch.manual_seed(1)
    b_dec = torch.randn(D_IN, dtype=torch.float64, requires_grad=True)

    def function(
        b_dec: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
    ) -> torch.Tensor:
        # x depends on b_dec, and says so through `subtracted` alone
        x = (weights.x - b_dec).detach()
        return reconstruct(Weights(x, W_enc, b_enc, W_dec), mask, b_dec)

    assert torch.autograd.gradcheck(function, (b_dec, *weights[1:]))


@pytest.mark.parametrize("with_subtracted", [False, True])
@pytest.mark.parametrize("n_sets", [1, 2])
def test_gradients_are_those_of_the_dense_saelens_formula(
    n_sets: int, with_subtracted: bool
):
    mask = masks(n_sets)
    weights = random_weights()
    torch.manual_seed(1)
    b_dec = torch.randn(D_IN, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(n_sets, B, D_IN, dtype=torch.float64)

    centred = weights._replace(x=weights.x - b_dec)
    expected = dense_reconstruct(centred, mask)
    expected_grads = torch.autograd.grad(expected, (*weights, b_dec), grad_out)

    if with_subtracted:
        detached = weights._replace(x=centred.x.detach())
        actual = reconstruct(detached, mask, b_dec)
        grads = torch.autograd.grad(actual, (*weights[1:], b_dec), grad_out)
        expected_grads = expected_grads[1:]
    else:
        actual = reconstruct(weights._replace(x=weights.x - b_dec), mask)
        grads = torch.autograd.grad(actual, (*weights, b_dec), grad_out)

    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    assert len(grads) == len(expected_grads)
    for actual_grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert expected_grad.abs().max() > 0.1
        assert torch.allclose(actual_grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_float32_gradients_at_a_realistic_size():
    weights = random_weights(64, 32, 200, torch.float32)
    mask = (torch.rand(2, 64, 200) < 0.05).float()
    grad_out = torch.randn(2, 64, 32)
    in_double = Weights(*(t.detach().double().requires_grad_() for t in weights))
    actual = reconstruct(weights, mask)
    expected = dense_reconstruct(in_double, mask)
    grads = torch.autograd.grad(actual, weights, grad_out)
    expected_grads = torch.autograd.grad(expected, in_double, grad_out.double())
    for a, e in zip((actual, *grads), (expected, *expected_grads), strict=True):
        assert a.dtype == torch.float32
        assert torch.allclose(a.double(), e, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_decoded_in_float32_and_get_bfloat16_gradients():
    weights = Weights(
        *(t.detach().bfloat16().requires_grad_() for t in random_weights())
    )
    in_double = Weights(*(t.detach().double().requires_grad_() for t in weights))
    b_dec = torch.zeros(D_IN, dtype=torch.bfloat16, requires_grad=True)
    mask = masks(2)
    rows, features = indices(mask)
    # pre-activations of the bf16 weights, in float32 as the selection gives them
    pre_acts = (in_double.x @ in_double.W_enc + in_double.b_enc)[rows % B, features]
    actual = reconstruct_pairs(
        weights.x.detach(),
        *weights[1:],
        rows,
        features,
        pre_acts.detach().float(),
        2,
        subtracted=b_dec,
    )
    expected = dense_reconstruct(in_double, mask)
    assert actual.dtype == torch.float32
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)

    grad_out = torch.randn_like(actual)
    grads = torch.autograd.grad(actual, (*weights[1:], b_dec), grad_out)
    expected_grads = torch.autograd.grad(expected, in_double, grad_out.double())
    # b_dec is subtracted from every row of x
    expected_b_dec = -expected_grads[0].sum(0)
    for a, e in zip(grads, (*expected_grads[1:], expected_b_dec), strict=True):
        assert a.dtype == torch.bfloat16
        # one rounding to bf16 (8 bits) of an exact sum
        assert torch.allclose(a.double(), e, rtol=2**-8, atol=1e-4)


def test_autocast_does_not_change_a_bit():
    weights = random_weights(dtype=torch.float32)
    mask, grad_out = masks(2), torch.randn(2, B, D_IN)
    rows, features = indices(mask)
    pre_acts = (weights.x @ weights.W_enc + weights.b_enc)[rows % B, features].detach()

    def run() -> list[torch.Tensor]:
        out = reconstruct_pairs(*weights, rows, features, pre_acts, 2)
        return [out, *torch.autograd.grad(out, weights, grad_out)]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = run()
    assert all(map(torch.equal, plain, autocast))


def test_no_pairs_at_all_give_zeros():
    weights = random_weights()
    b_dec = torch.zeros(D_IN, dtype=torch.float64, requires_grad=True)
    out = reconstruct(weights, torch.zeros(2, B, F), b_dec)
    assert out.shape == (2, B, D_IN)
    assert out.count_nonzero() == 0
    grads = torch.autograd.grad(out.sum(), (*weights, b_dec))
    for tensor, grad in zip((*weights, b_dec), grads, strict=True):
        assert grad.shape == tensor.shape
        assert grad.count_nonzero() == 0


def test_one_empty_set_does_not_touch_the_other():
    weights, mask = random_weights(), masks(1)
    alone = reconstruct(weights, mask)
    both = reconstruct(weights, torch.cat([torch.zeros_like(mask), mask]))
    assert both[0].count_nonzero() == 0
    assert torch.equal(both[1], alone[0])


def test_padding_changes_neither_outputs_nor_gradients():
    weights, mask = random_weights(dtype=torch.float32), masks(1)
    rows, features = indices(mask)
    x, W_enc, b_enc, _ = weights
    pre_acts = (x @ W_enc + b_enc)[rows, features].detach()
    grad_out = torch.randn(1, B, D_IN)
    expected = reconstruct_pairs(*weights, rows, features, pre_acts)
    expected_grads = torch.autograd.grad(expected, weights, grad_out)

    last = torch.ones(5, dtype=torch.int64)
    actual = reconstruct_pairs(
        *weights,
        torch.cat([rows, (B - 1) * last]),
        torch.cat([features, (F - 1) * last]),
        torch.cat([pre_acts, torch.zeros(5)]),
        real=torch.arange(len(rows) + 5) < len(rows),
    )
    grads = torch.autograd.grad(actual, weights, grad_out)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, rtol=1e-6, atol=1e-6)


def test_triton_does_no_work_for_padding_forward_and_backward(
    triton_device: torch.device,
):
    weights, mask = random_weights(dtype=torch.float32), masks(2)
    # no pair is of the last feature, to which the padding of both sets points
    mask[:, :, F - 1] = 0
    rows, features = indices(mask)
    x, W_enc, b_enc, W_dec = weights
    pre_acts = (x @ W_enc + b_enc)[rows % B, features].detach()
    expected = reconstruct_pairs(*weights, rows, features, pre_acts, 2)
    grad_out = torch.randn(2, B, D_IN)
    expected_grads = torch.autograd.grad(expected, weights, grad_out)

    with torch.no_grad():
        W_enc[:, F - 1], W_dec[F - 1] = float("nan"), float("nan")
    n_first = int((rows < B).sum())
    padding = torch.ones(50, dtype=torch.int64)

    def padded(pairs: torch.Tensor, first: int, second: int) -> torch.Tensor:
        parts = (pairs[:n_first], first * padding, pairs[n_first:], second * padding)
        return torch.cat([part.to(pairs.dtype) for part in parts])

    actual = reconstruct_pairs(
        *weights,
        padded(rows, B - 1, 2 * B - 1),
        padded(features, F - 1, F - 1),
        padded(pre_acts, 0, 0),
        2,
        real=padded(torch.ones_like(rows, dtype=torch.bool), False, False),
    )
    grads = torch.autograd.grad(actual, weights, grad_out)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, rtol=1e-6, atol=1e-6)
    assert actual.device.type == triton_device.type


def test_inputs_without_gradient_get_none():
    weights = random_weights()
    weights = weights._replace(x=weights.x.detach())
    reconstruct(weights, masks(1)).sum().backward()
    assert weights.x.grad is None
    assert weights.W_enc.grad is not None


def test_two_runs_agree_bit_for_bit():
    def run() -> list[torch.Tensor]:
        weights = random_weights(40, 16, 60, torch.float32)
        mask = (torch.rand(2, 40, 60) < 0.1).float()
        b_dec = torch.zeros(16, requires_grad=True)
        out = reconstruct(weights, mask, b_dec)
        grad_out = torch.randn(2, 40, 16)
        return [out, *torch.autograd.grad(out, (*weights, b_dec), grad_out)]

    assert all(map(torch.equal, run(), run()))


def largest_saved(function: Callable[[], torch.Tensor]) -> int:
    """Elements of the largest tensor that autograd saves for the backward."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return max(sizes)


def test_nothing_dense_is_saved_for_backward():
    n_tokens, d_in, n_features = 100, 3, 200
    weights = random_weights(n_tokens, d_in, n_features, torch.float32)
    mask = torch.zeros(1, n_tokens, n_features)
    mask[0, torch.arange(n_tokens), torch.arange(n_tokens)] = 1
    rows, features = indices(mask)
    pre_acts = (weights.x @ weights.W_enc + weights.b_enc)[rows, features].detach()
    dense = largest_saved(lambda: dense_reconstruct(weights, mask))
    assert dense == n_tokens * n_features
    sparse_ = largest_saved(
        lambda: reconstruct_pairs(*weights, rows, features, pre_acts)
    )
    # the weights themselves, 3 * 200
    assert sparse_ == d_in * n_features


def test_gradients_take_over_the_memory_of_the_last_ones():
    x, W_enc, b_enc, W_dec = (
        nn.Parameter(tensor.detach()) for tensor in random_weights()
    )
    memory = GradientMemory()

    def backward(mask: torch.Tensor) -> None:
        rows, features = indices(mask)
        pre_acts = (x @ W_enc + b_enc).detach()[rows, features]
        reconstruct_pairs(
            x, W_enc, b_enc, W_dec, rows, features, pre_acts, memory=memory
        ).sin().sum().backward()

    def grads() -> tuple[torch.Tensor, torch.Tensor]:
        assert W_enc.grad is not None
        assert W_dec.grad is not None
        return W_enc.grad, W_dec.grad

    second_mask = masks(2)[1:]
    backward(second_mask)
    expected = [grad.clone() for grad in grads()]
    W_enc.grad = W_dec.grad = None
    backward(masks(1))
    addresses = [grad.data_ptr() for grad in grads()]

    memory.keep(W_enc, W_dec)
    backward(second_mask)

    assert [grad.data_ptr() for grad in grads()] == addresses
    for grad, other in zip(grads(), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=0)
    # handed out once: a second backward adds to the first one's gradients
    backward(second_mask)
    for grad, other in zip(grads(), expected, strict=True):
        torch.testing.assert_close(grad, 2 * other)
