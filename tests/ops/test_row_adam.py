"""Adam on some rows, against its formulas and against torch's Adam."""

import pytest
import torch

from sae_lens_alloc.ops import row_adam
from sae_lens_alloc.ops.row_adam import adam_rows_

N_ROWS, WIDTH, N_STEPS = 7, 5, 12
LR, BETAS, EPS = 0.1, (0.9, 0.99), 1e-8


@pytest.fixture(params=[1, 2**18], ids=["a row at a time", "all at once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"cpu": request.param, "cuda": request.param}
    monkeypatch.setattr(row_adam, "_CHUNK_ELEMENTS", sizes)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def train(
    chosen: list[torch.Tensor], scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights after a step on the chosen rows each, and the gradients of all steps."""
    weights = normal(N_ROWS, WIDTH, seed=0)
    exp_avg, exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
    last_step = weights.new_zeros(N_ROWS)
    gradients = normal(len(chosen), N_ROWS, WIDTH, seed=1)
    for i, rows in enumerate(chosen):
        adam_rows_(
            weights,
            exp_avg,
            exp_avg_sq,
            last_step,
            rows,
            gradients[i][rows],
            step=i + 1,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            scale=torch.tensor(scale, dtype=torch.float64),
        )
    return weights, gradients


@pytest.mark.usefixtures("chunk")
def test_rows_with_a_gradient_at_every_step_are_updated_as_by_torch():
    weights, gradients = train([torch.arange(N_ROWS)] * N_STEPS, scale=0.5)
    expected = torch.nn.Parameter(normal(N_ROWS, WIDTH, seed=0))
    optimizer = torch.optim.Adam([expected], lr=LR, betas=BETAS, eps=EPS)
    for gradient in gradients:
        expected.grad = 0.5 * gradient
        optimizer.step()
    torch.testing.assert_close(weights, expected.data, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("seed", range(5))
def test_moments_decay_by_the_steps_that_a_row_missed(seed: int):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(N_STEPS, N_ROWS, generator=generator) < 0.4
    masks[3] = False  # nobody
    weights, gradients = train([mask.nonzero()[:, 0] for mask in masks])

    # step by step, with gradients of zero and weights that stay where they are
    expected = normal(N_ROWS, WIDTH, seed=0)
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for i, mask in enumerate(masks):
        g = gradients[i] * mask[:, None]
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        corrected = m / (1 - BETAS[0] ** (i + 1))
        root = (v / (1 - BETAS[1] ** (i + 1))).sqrt() + EPS
        expected = torch.where(
            mask[:, None], expected - LR * corrected / root, expected
        )
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def test_a_strided_matrix_is_updated_in_place():
    stored = normal(WIDTH, N_ROWS, seed=0)
    adam_rows_(
        stored.T,
        torch.zeros(N_ROWS, WIDTH, dtype=torch.float64),
        torch.zeros(N_ROWS, WIDTH, dtype=torch.float64),
        stored.new_zeros(N_ROWS),
        torch.tensor([2]),
        torch.ones(1, WIDTH, dtype=torch.float64),
        step=1,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        scale=torch.ones((), dtype=torch.float64),
    )
    moved = normal(WIDTH, N_ROWS, seed=0) - stored
    # the first step of Adam is one learning rate
    expected = torch.zeros_like(moved)
    expected[:, 2] = LR
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-12)
