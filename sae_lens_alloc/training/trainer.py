"""SAELens' trainer with a fused optimizer and metrics in a file."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE


class AllocSAETrainer(SAETrainer[Any, Any]):
    """
    SAELens' `SAETrainer` that uses fused Adam where the device has it and, where
    `metrics_path` is set, appends the metrics that SAELens logs to W&B to that file as JSON
    lines. Trains any architecture.
    """

    metrics_path: Path | None = None
    _optimizer_is_prepared = False

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        if not self._optimizer_is_prepared:
            self._prepare_optimizer()
        output = super().step(batch)
        every = self.cfg.logger.wandb_log_frequency
        if self.metrics_path is not None and (self.n_training_steps + 1) % every == 0:
            metrics = self.build_train_step_log_dict(output, self.n_training_samples)
            row = {"step": self.n_training_steps, **metrics}
            # JSON has no NaN; a law that could not be fitted yet is null
            row = {k: v if math.isfinite(v) else None for k, v in row.items()}
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return output

    def _prepare_optimizer(self) -> None:
        if torch.device(self.cfg.device).type in ("cpu", "cuda"):
            for group in self.optimizer.param_groups:
                group["fused"] = True
        sae = self.sae
        if isinstance(sae, AllocationTrainingSAE):
            self.optimizer.register_step_post_hook(
                lambda *_: sae.gradient_memory.keep(sae.W_enc, sae.W_dec)
            )
        self._optimizer_is_prepared = True
