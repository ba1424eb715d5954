"""Adam that does not update the features that a step did not select."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override

from sae_lens_alloc.ops.row_adam import adam_rows_
from sae_lens_alloc.ops.row_gradients import RowGradient, RowGradients
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.weight_names import OF_NO_FEATURE
from sae_lens_alloc.training.gradient_norm import norm_over_ranks


class RowSparseAdam(Optimizer):
    """
    Adam that reads and writes the weights and moments of the selected features alone
    (`ops/row_adam.py` has the formulas). What belongs to no feature, such as b_dec, is updated at
    every step.

    The state is that of torch.optim.Adam, and the step at which each feature was last updated.
    So a run can be resumed from a checkpoint of Adam.
    """

    def __init__(
        self,
        sae: AllocationTrainingSAE[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
    ) -> None:
        """
        Args:
            sae: The SAE to train, with float32 weights. From now on its backward pass gives the
                gradients of the selected features to this optimizer alone, and its W_enc is
                stored feature by feature.
            lr: Learning rate.
            betas: Decay of the moments.
            eps: Term in the denominator.
        """
        sae.W_enc.data = _by_feature(sae.W_enc.data)
        self._sae = sae
        self._gradients = RowGradients()
        sae.gradient_memory.rows = self._gradients
        super().__init__(sae.parameters(), {"lr": lr, "betas": betas, "eps": eps})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any("eps" not in group for group in state_dict["param_groups"]):
            raise ValueError(
                "The checkpoint is of muon, and row_sparse_adam cannot go on from it: give the "
                "optimizer that the training began with."
            )
        super().load_state_dict(state_dict)
        for name, weight in self._sae.named_parameters():
            state = self.state[weight]
            if state and "last_step" not in state:  # a state of torch.optim.Adam
                fresh = _fresh_state(weight, name)
                state["last_step"] = fresh["last_step"].fill_(float(state["step"]))
            if state and name == "W_enc":
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = _by_feature(state[moment])

    @override
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the weights. The norm of all gradients together is clipped to 1."""
        del closure
        gradients = self._gradients.take()
        for name, weight in self._sae.named_parameters():
            if weight.grad is None:
                continue
            if name not in OF_NO_FEATURE:
                raise ValueError(
                    f"{name} has a gradient of all features, which hooks on the activations of "
                    "the SAE give it: remove the hooks, or set optimizer to adam."
                )
            every_row = torch.zeros(1, dtype=torch.int64, device=weight.device)
            gradients[name] = RowGradient(every_row, weight.grad[None])
        rows = {name: gradient.rows for name, gradient in gradients.items()}
        norm = norm_over_ranks(rows, self._sae.shard.ranks)
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        (group,) = self.param_groups
        for name, gradient in gradients.items():
            weight = self._sae.get_parameter(name)
            state = self.state[weight]
            if not state:
                state.update(_fresh_state(weight, name))
            state["step"] += 1
            adam_rows_(
                _rows(weight.data, name),
                _rows(state["exp_avg"], name),
                _rows(state["exp_avg_sq"], name),
                state["last_step"],
                gradient.features,
                gradient.rows,
                int(state["step"]),
                float(group["lr"]),
                group["betas"],
                group["eps"],
                scale,
            )


def _rows(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A weight, or one of its moments, as a matrix with one row for each feature."""
    if name == "W_enc":
        return tensor.T
    if name == "b_enc":
        return tensor[:, None]
    return tensor[None] if name in OF_NO_FEATURE else tensor


def _by_feature(W_enc: torch.Tensor) -> torch.Tensor:
    """A matrix of shape (d_in, F), stored column by column, so that a feature is contiguous."""
    return W_enc.T.contiguous().T


def _fresh_state(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros(()),  # on the CPU, as in torch.optim.Adam
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        # float32, since loading a state converts it to the dtype of the weight
        "last_step": weight.new_zeros(len(_rows(weight, name))),
    }
