"""SAELens' runner with calibrated thresholds at the end, and seeded."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.evaluation.calibration import calibrate_thresholds
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.trainer import AllocSAETrainer

METRICS_FILENAME = "metrics.jsonl"
CALIBRATION_TOKENS = 65_536


class AllocSAETrainingRunner(LanguageModelSAETrainingRunner):
    """
    SAELens' `LanguageModelSAETrainingRunner` that seeds torch with `cfg.seed`, trains with
    `AllocSAETrainer`, writes the metrics to `metrics.jsonl` in the output folder, and, for
    Mutual Choice and Feature Choice, calibrates the thresholds on 65k tokens of the training
    text before saving. Runs any architecture.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        # SAELens seeds nothing, so the weights of two runs would differ
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, override_dataset, override_model, override_sae)

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        # SAELens' run() builds its trainer itself and offers no seam to pass another class.
        trainer.__class__ = AllocSAETrainer
        assert isinstance(trainer, AllocSAETrainer)
        if self.cfg.output_path is not None:
            output = Path(self.cfg.output_path)
            output.mkdir(parents=True, exist_ok=True)
            trainer.metrics_path = output / METRICS_FILENAME
        try:
            sae = super().run_trainer_with_interruption_handling(trainer)
        except (KeyboardInterrupt, InterruptedException):
            # SAELens saves only the position in the data and the config then
            if self.cfg.checkpoint_path is not None:
                trainer.save_checkpoint(str(trainer.n_training_samples))
            raise
        if isinstance(sae, AllocationTrainingSAE):
            report = calibrate_thresholds(sae, self._calibration_activations(trainer))
            sae.cfg.metadata.l0 = report.l0
        return sae

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:  # SAELens misses its folder when interrupted
            checkpoint_path.mkdir(parents=True, exist_ok=True)
        super().save_checkpoint(checkpoint_path)

    def _calibration_activations(self, trainer: SAETrainer[Any, Any]) -> torch.Tensor:
        n_batches = -(-CALIBRATION_TOKENS // self.cfg.train_batch_size_tokens)
        batches = [next(trainer.data_provider) for _ in range(n_batches)]
        return torch.cat(batches).to(self.cfg.device)
