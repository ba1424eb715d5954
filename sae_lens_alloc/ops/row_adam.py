"""Adam on some rows of a matrix, at the cost of these rows."""

import torch

# Elements of the rows that are worked on together: what is gathered of a chunk stays in the
# caches, so that each row is read from memory and written to it once.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@torch.no_grad()
def adam_rows_(
    weights: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    last_step: torch.Tensor,
    features: torch.Tensor,
    gradient: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    scale: torch.Tensor,
) -> None:
    """
    One step of Adam on the rows `features`, in place. The other rows, their moments included,
    stay as they are. A row's moments decay by all the steps since it was last updated, as if
    its gradient had been zero in these, before this step's gradient comes in:

        m <- beta1^n m + (1 - beta1) g        with n steps since the last update of the row
        v <- beta2^n v + (1 - beta2) g^2
        w <- w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)    at step t

    A row that has a gradient at every step is updated as by torch.optim.Adam.

    Args:
        weights: Shape (F, d).
        exp_avg: First moments m, shape (F, d).
        exp_avg_sq: Second moments v, shape (F, d).
        last_step: Step at which each row was last updated, 0 for never, of shape (F,)
            and the dtype of the weights.
        features: Rows to update, each once, int64 of shape (U,).
        gradient: Gradients of these rows, shape (U, d).
        step: Number of this step t, from 1 on.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Term in the denominator.
        scale: Factor of the gradient, scalar tensor.
    """
    beta1, beta2 = betas
    missed = (step - last_step[features])[:, None]
    last_step[features] = step
    decays1, decays2 = beta1**missed, beta2**missed
    size = lr / (1 - beta1**step)
    root = (1 - beta2**step) ** 0.5
    n_rows = max(1, _CHUNK_ELEMENTS[weights.device.type] // weights.shape[1])
    for rows, g, decay1, decay2 in zip(
        *(part.split(n_rows) for part in (features, gradient, decays1, decays2)),
        strict=True,
    ):
        g = g * scale
        m = exp_avg.index_select(0, rows).mul_(decay1).add_(g, alpha=1 - beta1)
        v = exp_avg_sq.index_select(0, rows).mul_(decay2)
        v.addcmul_(g, g, value=1 - beta2)
        exp_avg.index_copy_(0, rows, m)
        exp_avg_sq.index_copy_(0, rows, v)
        moved = weights.index_select(0, rows)
        moved.addcdiv_(m, v.sqrt_().div_(root).add_(eps), value=-size)
        weights.index_copy_(0, rows, moved)
