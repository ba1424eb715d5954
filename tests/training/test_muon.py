"""Muon in our trainer: its steps, what it trains, and what it refuses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_alloc import AllocSAETrainer, AllocSAETrainerConfig
from sae_lens_alloc.training.muon import Muon, orthogonal, rounds_products
from tests.saes.conftest import make_sae, tokens, training_step

N_STEPS = 6
OPTIONS: dict[str, Any] = {"selection_margin": 0.5, "aux_loss": "aux_zipf", "d_sae": 64}


def batches(n: int, start: int = 0) -> Iterator[torch.Tensor]:
    return iter([tokens(64, 8, seed=100 + start + i) for i in range(n)])


def trainer_of(
    sae: TrainingSAE[Any], n_steps: int, start: int = 0, **overrides: Any
) -> AllocSAETrainer[Any, Any]:
    settings: dict[str, Any] = {
        "total_training_samples": 64 * n_steps,
        "train_batch_size_samples": 64,
        "lr": 1e-2,
        "lr_end": 1e-3,
        "lr_warm_up_steps": 3,
        "optimizer": "muon",
        **overrides,
    }
    data = batches(n_steps - start, start)
    return AllocSAETrainer(AllocSAETrainerConfig(**settings), sae, data)


def by_hand(matrix: torch.Tensor) -> torch.Tensor:
    """Each singular value s becomes that of five times 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    # the norm of the product with itself, by which Muon divides first
    s = s / s.pow(4).sum().pow(0.25)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@given(st.integers(0, 10_000), st.sampled_from([(40, 6), (6, 6), (4, 9)]))
def test_the_columns_become_orthonormal_by_the_known_polynomial(
    seed: int, shape: tuple[int, int]
):
    matrix = tokens(*shape, seed=seed)
    matrix = matrix * torch.linspace(0.1, 3, shape[1])
    found = orthogonal(matrix)
    torch.testing.assert_close(found.double(), by_hand(matrix), rtol=1e-3, atol=1e-3)


def test_singular_values_are_near_one_and_their_vectors_stay():
    matrix = tokens(300, 16) * torch.logspace(-1, 0, 16)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    along = u.T @ orthogonal(matrix) @ v.T
    torch.testing.assert_close(
        along - along.diag().diag(), torch.zeros(16, 16), rtol=0, atol=1e-4
    )
    assert (along.diag() > 0.65).all()
    assert (along.diag() < 1.25).all()


def test_no_gradient_is_no_step():
    assert not orthogonal(torch.zeros(5, 3)).any()


@pytest.mark.parametrize("exponent", [-18, -15, -12, -6, 6, 12, 18])
def test_its_scale_does_not_matter(exponent: int):
    matrix = tokens(20, 6)
    torch.testing.assert_close(
        orthogonal(10.0**exponent * matrix), orthogonal(matrix), rtol=1e-4, atol=1e-5
    )


def test_gradients_that_vanish_leave_weights_finite():
    weights = torch.nn.ParameterDict({"W_dec": torch.zeros(40, 6)})
    muon = Muon(weights, 1e-2, (0.9, 0.999))  # type: ignore[arg-type]
    for step in range(400):
        weights["W_dec"].grad = tokens(40, 6, seed=step) * (step < 5)
        muon.step()
    assert weights["W_dec"].isfinite().all()


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of the products of square matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is torch.ops.aten.mm.default and args[0].shape == args[1].shape:
            self.found.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_root_is_in_float64_where_products_are_rounded(precision: str):
    matrix, expected = tokens(300, 16), orthogonal(tokens(300, 16))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert rounds_products(matrix.device) == (precision != "highest")
        with Dtypes() as dtypes:
            found = orthogonal(matrix)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    whole = torch.float32 if precision == "highest" else torch.float64
    assert dtypes.found == {whole}
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_torch_s_newer_way_to_round_products_is_known():
    script = """
import torch
from sae_lens_alloc.training.muon import orthogonal, rounds_products
torch.backends.fp32_precision = "tf32"
assert rounds_products(torch.device("cpu"))
assert rounds_products(torch.device("cuda"))
assert orthogonal(torch.randn(30, 4)).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_training_is_its_formulas_step_by_step(rescale: bool):
    options: dict[str, Any] = {**OPTIONS, "rescale_acts_by_decoder_norm": rescale}
    sae, reference = make_sae(**options), make_sae(**options)
    trainer_of(sae, N_STEPS).fit()

    means: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    others = [w for name, w in reference.named_parameters() if name[0] == "b"]
    adam = torch.optim.Adam(others, lr=1e-2, betas=(0.9, 0.999))
    for step, x in enumerate(batches(N_STEPS)):
        reference.zero_grad()
        training_step(reference, x, step).loss.backward()
        clip_grad_norm_(reference.parameters(), 1.0)
        rate = 1e-2 * min(1.0, (1 + step) / 3)
        for name in ("W_enc", "W_dec"):
            weight = reference.get_parameter(name)
            assert weight.grad is not None
            gradient = weight.grad.T if name == "W_enc" else weight.grad
            mean = 0.5 * means.get(name, torch.zeros_like(gradient)) + 0.5 * gradient
            update = by_hand(mean)
            square = 0.999 * squares.get(name, torch.zeros(64))
            square = square + 0.001 * (update**2).mean(1)
            means[name], squares[name] = mean, square
            root = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            change = (rate * update / root[:, None]).to(weight)
            weight.data -= change.T if name == "W_enc" else change
        adam.param_groups[0]["lr"] = rate
        adam.step()
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(
            sae.get_parameter(name).data, weight.data, rtol=1e-3, atol=1e-4
        )


def test_the_unit_of_the_activations_of_a_feature_does_not_matter():
    """A feature whose gradients are always a tenth as large moves as far."""
    weights = torch.nn.ParameterDict(
        {name: torch.zeros(3, 5) for name in ("W_enc", "W_dec")}
    )
    weights["W_dec"] = torch.nn.Parameter(torch.zeros(5, 3))
    muon = Muon(weights, 1e-2, (0.9, 0.999))  # type: ignore[arg-type]
    gradient = torch.eye(5, 3)
    gradient[1] *= 0.1
    weights["W_dec"].grad = gradient
    muon.step()
    moved = weights["W_dec"].data.norm(dim=1)
    torch.testing.assert_close(moved[:3], torch.full((3,), 1e-2 * 3**0.5))
    assert not moved[3:].any()


STOCK: list[TrainingSAEConfig] = [
    BatchTopKTrainingSAEConfig(d_in=8, d_sae=64, k=3),
    GatedTrainingSAEConfig(d_in=8, d_sae=64),
    JumpReLUTrainingSAEConfig(d_in=8, d_sae=64),
    MatchingPursuitTrainingSAEConfig(d_in=8, d_sae=64),
    StandardTrainingSAEConfig(d_in=8, d_sae=64),
]


@pytest.mark.parametrize(
    "stock", [None, *STOCK], ids=lambda cfg: cfg.architecture() if cfg else "ours"
)
def test_resuming_is_bit_for_bit(stock: TrainingSAEConfig | None, tmp_path: Path):
    def new(seed: int) -> TrainingSAE[Any]:
        if stock is None:
            return make_sae(seed=seed, **OPTIONS)
        torch.manual_seed(seed)
        return TrainingSAE.from_dict(stock.to_dict())

    whole = new(0)
    trainer_of(whole, 12).fit()
    trainer_of(new(0), 12, checkpoint_path=str(tmp_path), n_checkpoints=1).fit()
    (checkpoint,) = tmp_path.iterdir()
    second = new(5)
    second.load_weights_from_checkpoint(checkpoint)
    resumed = trainer_of(second, 12, start=7)
    resumed.load_trainer_state(checkpoint)
    assert resumed.n_training_steps == 7
    resumed.fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_run_goes_on_from_a_checkpoint_of_adam(tmp_path: Path):
    trainer_of(
        make_sae(**OPTIONS),
        12,
        optimizer="adam",
        checkpoint_path=str(tmp_path),
        n_checkpoints=1,
    ).fit()
    (checkpoint,) = tmp_path.iterdir()
    second = make_sae(**OPTIONS)
    second.load_weights_from_checkpoint(checkpoint)
    resumed = trainer_of(second, 12, start=7)
    resumed.load_trainer_state(checkpoint)
    of_adam = torch.load(checkpoint / "trainer_state.pt")["optimizer"]["state"]
    state = resumed.optimizer.state[second.W_enc]
    assert any(torch.equal(state["exp_avg"], s["exp_avg"]) for s in of_adam.values())
    assert torch.equal(state["exp_avg_sq"], torch.zeros(64))
    assert state["step"] == 0
    before = second.W_enc.detach().clone()
    rate = resumed.optimizer.param_groups[0]["lr"]
    resumed.step(next(resumed.data_provider))
    change = (second.W_enc - before).square().mean(0).sqrt()
    # the first step of every feature that has a gradient
    torch.testing.assert_close(
        change[change > 0], torch.full_like(change[change > 0], rate), rtol=0.05, atol=0
    )
    assert (change > 0).sum() > 32


@pytest.mark.parametrize(
    ("first", "then"),
    [("muon", "adam"), ("muon", "row_sparse_adam"), ("row_sparse_adam", "adam")],
)
def test_a_checkpoint_of_another_optimizer_is_refused(
    first: str, then: str, tmp_path: Path
):
    trainer_of(
        make_sae(**OPTIONS),
        4,
        optimizer=first,
        checkpoint_path=str(tmp_path),
        n_checkpoints=1,
    ).fit()
    (checkpoint,) = tmp_path.iterdir()
    other = trainer_of(make_sae(**OPTIONS), 4, optimizer=then)
    with pytest.raises(ValueError, match="that the training began with"):
        other.load_trainer_state(checkpoint)


def test_what_is_saved_is_what_sae_lens_loads(tmp_path: Path):
    sae = make_sae(**OPTIONS)
    trainer_of(sae, 4).fit()
    sae.eval()
    sae.save_inference_model(tmp_path)
    x = tokens(16, 8)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x))


def test_other_weights_than_float32_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="needs float32 weights, got sae.dtype"):
        trainer_of(make_sae(dtype="bfloat16"), 4)
