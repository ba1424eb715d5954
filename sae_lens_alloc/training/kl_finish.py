"""
A finish by the KL divergence: in the last steps of a training, the language model runs on the
reconstructions of some tokens, and the SAE also learns from what that changes of its predictions
(Karvonen 2025, arXiv 2503.17272).
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from torch import nn

from sae_lens_alloc.activations.hook_names import hook_names_of
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.config.run_config import AllocSAERunnerConfig, kl_finish_of
from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.evaluation.splicing import (
    Replace,
    Site,
    divergences,
    is_ordinary,
    predictions,
)

# Of a batch, as far as whole contexts come to that. With half as much, the divergence of a step says
# too little (docs/experiments.md).
SHARE_OF_BATCH = 0.5
# In nats. The divergence of a reconstruction that is all but exact does not count for more.
SMALLEST_DIVERGENCE = 1e-6


def with_divergence(
    loss: torch.Tensor, mse: torch.Tensor, divergence: torch.Tensor, weight: float
) -> torch.Tensor:
    """
    The loss of a step and the KL divergence, which counts `weight` times as much as the
    reconstruction loss, however large the two are: loss + weight * KL * (MSE / KL), where the
    gradient goes through the first KL alone.

    Args:
        loss: All losses of the step, shape ().
        mse: The reconstruction loss among them, shape ().
        divergence: KL(untouched || spliced) in nats, shape ().
        weight: How much it counts.
    """
    unit = mse.detach() / divergence.detach().clamp_min(SMALLEST_DIVERGENCE)
    return loss + weight * unit * divergence


class KLFinish:
    """
    The last steps of a training, whose loss has the KL divergence of the language model. In each of
    them, the last rows of the batch are those of a few whole contexts of text. The step is the same
    sparse step, and its reconstruction of these rows takes their place in the language model.

    The contexts of a step follow from its number alone: they begin with the first ones of the
    training text that are not held out. So the batches are those of a run without the finish, and
    a resumed run finds its place.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        store: ResumableActivationsStore,
    ) -> None:
        """
        Args:
            cfg: The run.
            store: Its text, with what is held out of it, and its language model.

        Raises:
            ValueError: if no gradient comes back through the language model.
        """
        assert isinstance(cfg, AllocSAERunnerConfig)
        self.weight = cfg.kl_weight
        self.first_step = cfg.total_training_steps - cfg.kl_finish
        self.site = Site(hook_names_of(cfg)[0], hook_names_of(cfg)[-1])
        wanted = round(
            SHARE_OF_BATCH * cfg.train_batch_size_tokens / store.training_context_size
        )
        self.n_contexts = max(1, min(wanted, store.store_batch_size_prompts))
        # of its own, since the other may be read ahead of the training
        self._text = ResumableActivationsStore.in_place_of(store, cfg)
        self._text.n_held_out_contexts = store.n_held_out_contexts
        self._next_step = self.first_step
        self._require_gradient()

    def begin(
        self, step: int, batch: torch.Tensor, provider: DataProvider
    ) -> "KLStep | None":
        """
        Begins a training step. None if it is before the finish, or no prediction of its contexts
        counts, and the step is one as any other.

        Args:
            step: Number of the step.
            batch: Its batch of rows, shape (B, width).
            provider: What the batches come from. It is not read meanwhile.
        """
        if step < self.first_step:
            return None
        tokens = self._contexts_of(step)
        rows: list[torch.Tensor] = []

        def keep(read: torch.Tensor, replaced: torch.Tensor) -> torch.Tensor:
            is_sae = self.site.read == self.site.replaced
            parts = [read] if is_sae else [read, replaced]
            rows.append(torch.cat([part.to(batch) for part in parts], dim=1))
            return replaced

        with torch.no_grad(), _paused(provider):
            untouched = self.predict(tokens, keep)
        if len(untouched) == 0:
            return None
        n_kept = len(batch) - len(rows[0])
        mixed = torch.cat([batch[:n_kept], rows[0]])
        return KLStep(self, mixed, n_kept, tokens, untouched, provider)

    def predict(self, tokens: torch.Tensor, replace: Replace) -> torch.Tensor:
        """
        Logits of the predictions that count, shape (n, vocabulary), with activations replaced.

        Args:
            tokens: Token ids, shape (contexts, context_size).
            replace: See `predictions`.
        """
        text = self._text
        excluded = text.exclude_special_tokens
        special = [] if excluded is None else excluded.tolist()
        autocast = torch.autocast(
            tokens.device.type, torch.bfloat16, enabled=text.autocast_lm
        )
        with autocast, _frozen(text.model):
            return predictions(
                text.model,
                tokens,
                is_ordinary(tokens, special),
                self.site,
                replace,
                slice(*text.seqpos_slice),
                **text.model_kwargs,
            )[0]

    def _contexts_of(self, step: int) -> torch.Tensor:
        """Token ids of the contexts of a step, shape (n_contexts, context_size)."""
        # a resumed run is behind, and a trainer may take a step twice
        if step < self._next_step:
            self._text.begin_epoch()
            self._next_step = self.first_step
        for _ in range(step - self._next_step):
            self._text.get_batch_tokens(self.n_contexts, move_to_model_device=False)
        self._next_step = step + 1
        return self._text.get_batch_tokens(self.n_contexts)

    def _require_gradient(self) -> None:
        """Raises ValueError if what is put into the language model gets no gradient from it."""
        tokens = self._text.get_batch_tokens(1)
        self._text.begin_epoch()
        reason = "none comes back"
        try:
            logits = self.predict(tokens, lambda _, x: x.detach().requires_grad_())
            if logits.requires_grad:
                logits.sum().backward()
            if logits.requires_grad or len(logits) == 0:
                return
        except Exception as error:  # each kind of model has errors of its own
            reason = f"that fails ({in_one_sentence(error).rstrip('.')})"
        raise ValueError(
            "kl_finish needs a gradient of the language model with respect to the activations at "
            f"{self.site.replaced!r}, but {reason}: give kl_finish=0, or another hook or model."
        )


@dataclass(frozen=True, eq=False)
class KLStep:
    """
    A training step of the finish.

    Args:
        finish: The finish.
        batch: The rows of the step, shape (B, width).
        n_kept: How many of them are not those of the contexts.
        tokens: The contexts, token ids of shape (n_contexts, context_size).
        untouched: Logits of the predictions that count, shape (n, vocabulary).
        provider: What the batches come from.
    """

    finish: KLFinish
    batch: torch.Tensor
    n_kept: int
    tokens: torch.Tensor
    untouched: torch.Tensor
    provider: DataProvider

    def add_divergence(
        self, trainer: SAETrainer[Any, Any], output: TrainStepOutput
    ) -> TrainStepOutput:
        """
        The output of the step with the KL divergence in its loss, and, in nats, among its losses.

        Raises:
            ValueError: as `DeviceChecks`, if the divergence is not finite.
        """
        # in the place of a transcoder's output in a row
        recons = output.sae_out[self.n_kept :]
        n_before = self.batch.shape[1] - recons.shape[1]
        rows = torch.cat([recons.new_zeros(len(recons), n_before), recons], dim=1)
        recons = trainer.activation_scaler.unscale(rows)[:, n_before:]
        with _paused(self.provider):
            spliced = self.finish.predict(self.tokens, lambda *_: recons)
        divergence = divergences(spliced, self.untouched).mean().to(output.loss.device)
        trainer.sae.checks.require(
            divergence.detach().isfinite(),
            "The KL divergence of training step {step} is NaN or Inf: check the language model and "
            "its dtype.",
            trainer.n_training_steps,
        )
        mse = output.losses["mse_loss"]
        assert isinstance(mse, torch.Tensor)
        loss = with_divergence(output.loss, mse, divergence, self.finish.weight)
        losses = {**output.losses, "kl_loss": divergence.detach()}
        return replace(output, loss=loss, losses=losses)


def finish_of_run(
    cfg: LanguageModelSAERunnerConfig[Any], store: Any
) -> KLFinish | None:
    """
    The finish of a run, None if it has none.

    Args:
        cfg: The run, which `check_kl_finish` has checked.
        store: What it trains on.

    Raises:
        ValueError: if no gradient comes back through the language model.
    """
    return KLFinish(cfg, store) if kl_finish_of(cfg) else None


@contextmanager
def _frozen(model: nn.Module) -> Generator[None, None, None]:
    """Within it, no gradient of the parameters of a model is recorded."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _paused(provider: DataProvider) -> Any:
    """Within it, no thread runs the language model, whose hooks are the same for all threads."""
    if isinstance(provider, PrefetchingIterator):
        return provider.paused()
    return nullcontext()
