"""Muon, for the encoder and the decoder of an SAE."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch.optim import Optimizer
from typing_extensions import override

from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE

# Decay of the mean of the gradients of the encoder and the decoder (docs/experiments.md).
MOMENTUM = 0.5
# Steps of Newton and Schulz, and their coefficients a, b and c (Jordan 2024): those of
# torch.optim.Muon.
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8


class Muon(Optimizer):
    """
    Muon (Jordan 2024) with a step size for each feature (NorMuon, arXiv 2510.05491) for the
    encoder and the decoder, and Adam for the other weights.

    The mean gradient M of a matrix, one row for each feature, is replaced by the nearest matrix
    with orthonormal columns, M (MᵀM)^(-1/2). So all directions of the activations are learned
    equally fast, also those with little variance. Each row is then divided by the root of a
    running mean of its squares, as Adam does for each weight. A feature that every step moves
    thus changes by about `lr` in each of its weights.

    It keeps one matrix for each weight, where Adam keeps two, and makes another one in a step.
    The features may be shared by ranks, which then add up MᵀM, d_in × d_in numbers.
    """

    def __init__(
        self, sae: TrainingSAE[Any], lr: float, betas: tuple[float, float]
    ) -> None:
        """
        Args:
            sae: The SAE to train, of any architecture with W_enc and W_dec.
            lr: Learning rate.
            betas: Decay of Adam's moments. The second is also that of the squares of the rows.
        """
        self._sae = sae
        super().__init__(sae.parameters(), {"lr": lr, "betas": betas})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name in ("W_enc", "W_dec"):
            state = self.state[self._sae.get_parameter(name)]
            if state and state["exp_avg_sq"].ndim == 2:  # a state of torch.optim.Adam
                state.update(_no_squares(name, state["exp_avg_sq"]))

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the weights that have a gradient."""
        del closure
        (group,) = self.param_groups
        for name, weight in self._sae.named_parameters():
            if weight.grad is None:
                continue
            state = self.state[weight]
            if name in ("W_enc", "W_dec"):
                self._turn(name, weight, state, group)
            else:
                _adam_(weight, weight.grad, state, group)

    def _turn(
        self,
        name: str,
        weight: torch.Tensor,
        state: dict[str, torch.Tensor],
        group: dict[str, Any],
    ) -> None:
        """A step of a matrix of features."""
        assert weight.grad is not None
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
            state.update(_no_squares(name, weight))
        state["step"] += 1
        mean = state["exp_avg"].lerp_(weight.grad, 1 - MOMENTUM)
        update = orthogonal(_by_feature(name, mean), self._ranks)
        squares, beta = state["exp_avg_sq"], group["betas"][1]
        norms = torch.linalg.vector_norm(update, dim=1)
        squares.lerp_(norms.square() / update.shape[1], 1 - beta)
        scale = (1 - beta ** state["step"]).sqrt() / (squares.sqrt() + EPS)
        _by_feature(name, weight).addcmul_(
            update, scale[:, None], value=-float(group["lr"])
        )

    @property
    def _ranks(self) -> Ranks:
        sae = self._sae
        return sae.shard.ranks if isinstance(sae, AllocationTrainingSAE) else ALONE


def orthogonal(rows: torch.Tensor, ranks: Ranks = ALONE) -> torch.Tensor:
    """
    About the nearest matrix with orthonormal columns, M (MᵀM)^(-1/2), with singular values
    between 0.7 and 1.2. Those below a hundredth of the largest stay smaller.

    Args:
        rows: Matrix M of shape (F, d). Its rows may be shared by ranks.
        ranks: The ranks.
    """
    square = ranks.sum(rows.T @ rows)
    norm = torch.linalg.matrix_norm(square).clamp_min(torch.finfo(rows.dtype).tiny)
    # of M P / sqrt(norm), which each step takes nearer, `square` stays the product with itself
    square = square / norm
    product = identity = torch.eye(len(square), dtype=rows.dtype, device=rows.device)
    a, b, c = COEFFICIENTS
    with _whole_float32():
        for _ in range(STEPS):
            factor = a * identity + b * square + c * (square @ square)
            product = product @ factor
            square = factor @ square @ factor
    return rows @ (product / norm.sqrt())


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Products without TF32: its rounding makes eigenvalues negative, and these grow at each step."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _by_feature(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with one row for each feature."""
    return matrix.T if name == "W_enc" else matrix


def _no_squares(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean squares of the rows before the first step."""
    n_features = len(_by_feature(name, weight))
    return {"step": torch.zeros(()), "exp_avg_sq": weight.new_zeros(n_features)}


def _adam_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
) -> None:
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
    squares = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
    mean = mean / (1 - beta1 ** state["step"])
    squares = squares / (1 - beta2 ** state["step"])
    weight.sub_(float(group["lr"]) * mean / (squares.sqrt() + EPS))
