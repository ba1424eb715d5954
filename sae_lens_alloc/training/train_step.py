"""SAELens' training step for our SAEs, which asks the device nothing."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch.nn.utils import clip_grads_with_norm_

from sae_lens_alloc.compat import stored_entries
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.gradient_norm import norm_over_ranks
from sae_lens_alloc.training.kl_finish import KLStep
from sae_lens_alloc.training.row_sparse_adam import RowSparseAdam
from sae_lens_alloc.training.step_graph import StepGraph


def train_step(
    trainer: SAETrainer[Any, Any],
    sae_in: torch.Tensor,
    graph: StepGraph | None = None,
    kl_step: KLStep | None = None,
) -> TrainStepOutput:
    """
    What `SAETrainer._train_step` does, with the same result. SAELens counts who fired by
    adding up sparse tensors, for which a GPU is asked how many entries there are.

    Args:
        trainer: The trainer, of one of our SAEs.
        sae_in: Activations of shape (B, d_in).
        graph: Takes the forward and backward passes, if there is one.
        kl_step: Adds the KL divergence of the language model to the loss, without a graph.
    """
    trainer.sae.train()
    step_input = TrainStepInput(
        sae_in=sae_in,
        dead_neuron_mask=trainer.dead_neurons,
        coefficients=trainer.get_coefficients(),
        n_training_steps=trainer.n_training_steps,
        is_logging_step=_is_logging_step(trainer),
    )
    if graph is None:
        with trainer.autocast_if_enabled:
            output = trainer.sae.training_forward_pass(step_input)
        if kl_step is not None:
            output = kl_step.add_divergence(trainer, output)
        output.loss.backward()
        clip_gradients(trainer)
    else:
        output = graph.forward_and_backward(step_input)
    count_firings(trainer, output.feature_acts)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.lr_scheduler.step()
    return output


def _is_logging_step(trainer: SAETrainer[Any, Any]) -> bool:
    logger = trainer.cfg.logger
    is_due = (trainer.n_training_steps + 1) % logger.wandb_log_frequency == 0
    return logger.log_to_wandb and is_due


def clip_gradients(trainer: SAETrainer[Any, Any]) -> None:
    """Clips the norm of all gradients together, of all ranks, to 1, as SAELens does."""
    if isinstance(trainer.optimizer, RowSparseAdam):  # which clips by itself
        return
    sae: AllocationTrainingSAE[Any] = trainer.sae
    gradients = {
        name: weight.grad
        for name, weight in sae.named_parameters()
        if weight.grad is not None
    }
    norm = norm_over_ranks(gradients, sae.shard.ranks)
    clip_grads_with_norm_(sae.parameters(), 1.0, norm)


@torch.no_grad()
def count_firings(trainer: SAETrainer[Any, Any], feature_acts: torch.Tensor) -> None:
    """Adds to the trainer's statistics who fired in a step, given (B, F) activations."""
    if feature_acts.is_sparse:
        indices, values = stored_entries(feature_acts)
        counts = torch.zeros_like(trainer.act_freq_scores)
        counts.scatter_add_(0, indices[-1], (values != 0).to(counts))
    else:
        counts = (feature_acts != 0).to(trainer.act_freq_scores).sum(0)
    trainer.n_forward_passes_since_fired += 1
    trainer.n_forward_passes_since_fired.masked_fill_(counts > 0, 0.0)
    trainer.act_freq_scores += counts
    trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
