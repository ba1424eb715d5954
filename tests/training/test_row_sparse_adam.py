"""row_sparse_adam in our trainer: the gradients it gets, what it trains, and what it refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from torch.nn.utils import clip_grad_norm_

from sae_lens_alloc import AllocSAETrainer, AllocSAETrainerConfig
from sae_lens_alloc.ops.row_adam import adam_rows_
from sae_lens_alloc.ops.row_gradients import RowGradients
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.row_sparse_adam import RowSparseAdam
from tests.saes.conftest import gradients, make_sae, state_of, tokens, training_step

CASES: list[dict[str, Any]] = [
    {},
    {"aux_loss": "aux_k", "apply_b_dec_to_input": True},
    {"selection_margin": 0.5, "aux_loss": "aux_k"},
    {"architecture": "feature_choice"},
    {
        "architecture": "matryoshka_mutual_choice",
        "matryoshka_widths": [8, 32],
        "selection_margin": 0.5,
    },
    {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": False},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_of_the_selected_features_are_the_dense_ones(options: dict[str, Any]):
    dead = torch.arange(32) < 10
    x = tokens(24, 8)
    sae = make_sae(**options)
    expected = gradients(sae, training_step(sae, x, dead=dead).loss)

    sae = make_sae(**options)
    sae.gradient_memory.rows = RowGradients()
    dense = gradients(sae, training_step(sae, x, dead=dead).loss)
    found = sae.gradient_memory.rows.take()
    torch.testing.assert_close(dense["b_dec"], expected["b_dec"])
    for name, weight in (
        ("W_enc", expected["W_enc"].T),
        ("b_enc", expected["b_enc"][:, None]),
        ("W_dec", expected["W_dec"]),
    ):
        assert not dense[name].any()
        whole = torch.zeros_like(weight)
        whole[found[name].features] = found[name].rows
        torch.testing.assert_close(whole, weight)
        assert 0 < len(found[name].features) <= 32


def test_padding_touches_no_feature(triton_device: torch.device):
    sae = make_sae(d_sae=200, b_enc=-8.0).to(triton_device)
    sae.gradient_memory.rows = RowGradients()
    output = training_step(sae, 3 * tokens(24, 8).to(triton_device))
    output.loss.backward()
    active = output.feature_acts.to_dense().sum(0).nonzero()[:, 0]
    found = sae.gradient_memory.rows.take()
    assert 0 < len(active) < 72
    assert torch.equal(found["W_enc"].features, active)


def batches(n: int, start: int = 0) -> Iterator[torch.Tensor]:
    return iter([tokens(64, 8, seed=100 + start + i) for i in range(n)])


def trainer_of(
    sae: AllocationTrainingSAE[Any],
    n_steps: int,
    data: Iterator[torch.Tensor],
    **overrides: Any,
) -> AllocSAETrainer[Any, Any]:
    settings: dict[str, Any] = {
        "total_training_samples": 64 * n_steps,
        "train_batch_size_samples": 64,
        "lr": 1e-2,
        "lr_end": 1e-3,
        "lr_warm_up_steps": 3,
        "optimizer": "row_sparse_adam",
        **overrides,
    }
    return AllocSAETrainer(AllocSAETrainerConfig(**settings), sae, data)


OPTIONS: dict[str, Any] = {"selection_margin": 0.5, "aux_loss": "aux_zipf", "d_sae": 64}


def test_a_training_is_its_formulas_step_by_step():
    """By dense gradients of which the rows that are zero are left out."""
    n_steps = 6
    sae, reference = make_sae(**OPTIONS), make_sae(**OPTIONS)
    trainer = trainer_of(sae, n_steps, batches(n_steps))
    trainer.fit()

    moments: dict[str, Any] = {}
    rates = [1e-2 * min(1.0, (1 + step) / 3) for step in range(n_steps)]
    for step, x in enumerate(batches(n_steps)):
        reference.zero_grad()
        training_step(reference, x, step).loss.backward()
        clip_grad_norm_(reference.parameters(), 1.0)
        for name, weight in reference.named_parameters():
            assert weight.grad is not None
            as_rows = (
                (lambda t: t.T)
                if name == "W_enc"
                else (lambda t: t[:, None])
                if name == "b_enc"
                else (lambda t: t[None])
                if name == "b_dec"
                else (lambda t: t)
            )
            rows = as_rows(weight.grad).any(1).nonzero()[:, 0]
            m, v, last = moments.setdefault(
                name,
                (
                    torch.zeros_like(as_rows(weight.data)),
                    torch.zeros_like(as_rows(weight.data)),
                    weight.new_zeros(len(as_rows(weight.data))),
                ),
            )
            adam_rows_(
                as_rows(weight.data),
                m,
                v,
                last,
                rows,
                as_rows(weight.grad)[rows],
                step=step + 1,
                lr=rates[step],
                betas=(0.9, 0.999),
                eps=1e-8,
                scale=torch.ones(()),
            )
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(
            sae.get_parameter(name).data, weight.data, rtol=1e-3, atol=1e-5
        )


def test_features_that_were_not_selected_are_not_moved():
    sae = make_sae(d_sae=64)
    before = state_of(sae)
    x = tokens(4, 8)
    active = training_step(make_sae(d_sae=64), x).feature_acts.to_dense().any(0)
    trainer_of(
        sae,
        1,
        iter([x]),
        train_batch_size_samples=4,
        total_training_samples=4,
        lr_warm_up_steps=0,
    ).fit()
    for name in ("W_enc", "b_enc", "W_dec"):
        moved = sae.get_parameter(name).data != before[name]
        if moved.ndim == 2:
            moved = moved.any(0 if name == "W_enc" else 1)
        assert torch.equal(moved, active), name


def test_resuming_is_bit_for_bit(tmp_path: Path):
    whole = make_sae(**OPTIONS)
    trainer_of(whole, 12, batches(12)).fit()

    first = make_sae(**OPTIONS)
    trainer = trainer_of(
        first, 12, batches(12), checkpoint_path=str(tmp_path), n_checkpoints=1
    )
    trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    second = make_sae(seed=5, **OPTIONS)
    second.load_weights_from_checkpoint(checkpoint)
    resumed = trainer_of(second, 12, batches(5, start=7))
    resumed.load_trainer_state(checkpoint)
    assert resumed.n_training_steps == 7
    resumed.fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_run_goes_on_from_a_checkpoint_of_adam(tmp_path: Path):
    sae = make_sae(**OPTIONS)
    trainer_of(
        sae,
        12,
        batches(12),
        optimizer="adam",
        checkpoint_path=str(tmp_path),
        n_checkpoints=1,
    ).fit()
    (checkpoint,) = tmp_path.iterdir()
    second = make_sae(**OPTIONS)
    second.load_weights_from_checkpoint(checkpoint)
    resumed = trainer_of(second, 12, batches(5, start=7))
    resumed.load_trainer_state(checkpoint)
    state = resumed.optimizer.state[second.W_enc]
    assert (state["last_step"] == 7).all()
    assert state["exp_avg"].T.is_contiguous()
    resumed.fit()
    assert second.W_enc.isfinite().all()


def test_what_is_saved_is_what_sae_lens_loads(tmp_path: Path):
    sae = make_sae(**OPTIONS)
    trainer_of(sae, 4, batches(4)).fit()
    assert isinstance(trainer_of(sae, 4, batches(4)).optimizer, RowSparseAdam)
    sae.eval()
    sae.save_inference_model(tmp_path)
    x = tokens(16, 8)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x))


def test_what_it_cannot_train_is_one_sentence():
    stock = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=32, k=3))
    for sae, sentence in (
        (stock, "needs an SAE with an allocation, such as mutual_choice, got 'topk'"),
        (make_sae(dtype="bfloat16"), "needs float32 weights, got sae.dtype 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            trainer_of(sae, 4, batches(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer .sgd. is unknown"):
        trainer_of(make_sae(), 4, batches(4), optimizer="sgd")


def test_hooks_on_the_activations_are_refused():
    sae = make_sae()
    trainer = trainer_of(sae, 4, batches(4))
    sae.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)  # noqa: ARG005
    with pytest.raises(ValueError, match="hooks on the activations of the SAE"):
        trainer.fit()


def test_two_backward_passes_in_a_step_are_refused():
    sae = make_sae()
    trainer_of(sae, 4, batches(4))
    training_step(sae, tokens(24, 8)).loss.backward()
    with pytest.raises(ValueError, match="two gradients of W_dec in one training step"):
        training_step(sae, tokens(24, 8)).loss.backward()
