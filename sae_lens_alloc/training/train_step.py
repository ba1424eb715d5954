"""SAELens' training step for our SAEs, which asks the device nothing."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch.nn.utils import clip_grad_norm_

from sae_lens_alloc.training.row_sparse_adam import RowSparseAdam


def train_step(trainer: SAETrainer[Any, Any], sae_in: torch.Tensor) -> TrainStepOutput:
    """
    What `SAETrainer._train_step` does, with the same result. SAELens counts who fired by
    adding up sparse tensors, for which a GPU is asked how many entries there are.

    Args:
        trainer: The trainer, of one of our SAEs.
        sae_in: Activations of shape (B, d_in).
    """
    trainer.sae.train()
    with trainer.autocast_if_enabled:
        output = trainer.sae.training_forward_pass(
            TrainStepInput(
                sae_in=sae_in,
                dead_neuron_mask=trainer.dead_neurons,
                coefficients=trainer.get_coefficients(),
                n_training_steps=trainer.n_training_steps,
                is_logging_step=trainer._is_logging_step(),
            )
        )
    count_firings(trainer, output.feature_acts)
    output.loss.backward()
    if not isinstance(trainer.optimizer, RowSparseAdam):  # which clips by itself
        clip_grad_norm_(trainer.sae.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.lr_scheduler.step()
    return output


@torch.no_grad()
def count_firings(trainer: SAETrainer[Any, Any], feature_acts: torch.Tensor) -> None:
    """Adds to the trainer's statistics who fired in a step, given (B, F) activations."""
    if feature_acts.is_sparse:
        features, values = feature_acts._indices()[-1], feature_acts._values()
        counts = torch.zeros_like(trainer.act_freq_scores)
        counts.scatter_add_(0, features, (values != 0).to(counts))
    else:
        counts = (feature_acts != 0).to(trainer.act_freq_scores).sum(0)
    trainer.n_forward_passes_since_fired += 1
    trainer.n_forward_passes_since_fired.masked_fill_(counts > 0, 0.0)
    trainer.act_freq_scores += counts
    trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
