"""Muon, for the encoder and the decoder of an SAE."""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch.optim import Optimizer
from typing_extensions import override

from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.checkpoint_weights import feature_rows

# Decay of the mean of the gradients of the encoder and the decoder (docs/experiments.md).
MOMENTUM = 0.5
OF_FEATURES = ("W_enc", "W_dec")
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
    thus changes by about `lr` in each of its weights, however small its gradients are.

    It keeps one matrix for each weight, where Adam keeps two, and makes another one in a step.
    The features may be shared by ranks, which then add up MᵀM, d_in × d_in numbers.
    """

    def __init__(
        self, sae: TrainingSAE[Any], lr: float, betas: tuple[float, float]
    ) -> None:
        """
        Args:
            sae: The SAE to train, of any architecture. What is called W_enc and W_dec belongs to
                its features.
            lr: Learning rate.
            betas: Decay of Adam's moments. The second is also that of the squares of the rows.
        """
        self._sae = sae
        super().__init__(sae.parameters(), {"lr": lr, "betas": betas})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name, weight in self._sae.named_parameters():
            state = self.state[weight]
            is_of_adam = state and state["exp_avg_sq"].shape == weight.shape
            if name in OF_FEATURES and is_of_adam:
                state.update(_no_squares(name, weight))

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
            if name in OF_FEATURES:
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
        update = orthogonal(feature_rows(name, mean), self._ranks)
        squares, beta = state["exp_avg_sq"], group["betas"][1]
        norms = torch.linalg.vector_norm(update, dim=1)
        squares.lerp_(norms.square() / update.shape[1], 1 - beta)
        scale = (1 - beta ** state["step"]).sqrt() / (squares.sqrt() + EPS)
        feature_rows(name, weight).addcmul_(
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
    # first by the largest entry, since the norm of numbers so small can be zero
    scale = square.diagonal().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    square = square / scale
    norm = torch.linalg.matrix_norm(square).clamp_min(1)
    root = _inverse_root(square / norm)
    return rows @ (root / norm.sqrt()) / scale.sqrt()


def _inverse_root(square: torch.Tensor) -> torch.Tensor:
    """
    P that is about S^(-1/2) for the matrix S of shape (d, d) with eigenvalues from 0 to 1, by
    steps of Newton and Schulz: each multiplies P by a polynomial of what P S P has become.
    """
    dtype = square.dtype
    # rounded products make eigenvalues negative, and those grow at each step
    square = square.double() if rounds_products(square.device) else square
    a, b, c = COEFFICIENTS
    root = None
    for step in range(STEPS):
        factor = b * square + c * (square @ square)
        factor.diagonal().add_(a)
        root = factor if root is None else root @ factor
        if step + 1 < STEPS:
            square = factor @ square @ factor
    assert root is not None
    return root.to(dtype)


def rounds_products(device: torch.device) -> bool:
    """Whether float32 products on a device may be rounded, to TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch below 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return precision in ("tf32", "bf16")


def _no_squares(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean squares of the rows before the first step."""
    n_features = len(feature_rows(name, weight))
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
