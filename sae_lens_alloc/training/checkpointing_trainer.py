"""SAELens' trainer with checkpoints that are whole, and runs that can be interrupted."""

import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from sae_lens import logger
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG
from sae_lens.training.prefetch import PrefetchingIterator
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR
from typing_extensions import override

from sae_lens_alloc.compat import InterruptedException, StepwiseTrainer
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.stored_tensors import holds_stored_tensors
from sae_lens_alloc.training.checkpoint import partial_path, publish_checkpoint
from sae_lens_alloc.training.output_folder import named_write_errors
from sae_lens_alloc.training.sharded_checkpoint import read_trainer_state


class CheckpointingTrainer(StepwiseTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """
    SAELens' `SAETrainer` whose checkpoints are written to a temporary folder and renamed, and
    count the steps that they hold. Where `interrupted` becomes True, training stops after the
    running step with a checkpoint. A checkpoint on the way that cannot be written is a warning,
    and training goes on.
    """

    optimizer: Optimizer
    interrupted: bool = False

    @property
    def ranks(self) -> Ranks:
        """Those that train together, and save together."""
        return ALONE

    @override
    def fit(self) -> T_TRAINING_SAE:
        # a resumed trainer has passed some already, and would save once a step for each
        self.checkpoint_thresholds = [
            n for n in self.checkpoint_thresholds if n >= self.n_training_samples
        ]
        return super().fit()

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """
        Goes on from a checkpoint. The learning rate is that of this trainer's own schedule
        after so many steps, which is the checkpoint's where the settings are.
        """
        # SAELens would put the state of one schedule into another, or fail to
        schedule, rates = self.lr_scheduler, self._learning_rates()
        self.lr_scheduler = ConstantLR(SGD([torch.zeros(1)]))
        self.read_trainer_state(Path(checkpoint_path))
        n_steps, self.lr_scheduler = self.lr_scheduler.last_epoch, schedule
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group.update(rate)
        with warnings.catch_warnings():
            # the optimizer took these steps in the run that goes on
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(n_steps):
                schedule.step()

    def read_trainer_state(self, checkpoint: Path) -> None:
        """Puts the trainer where a checkpoint is, and its schedule where that of the checkpoint."""
        if holds_stored_tensors(checkpoint):
            read_trainer_state(self, checkpoint)
        else:
            super().load_trainer_state(checkpoint)

    def _learning_rates(self) -> list[dict[str, float]]:
        keys = ("lr", "initial_lr")
        return [{key: g[key] for key in keys} for g in self.optimizer.param_groups]

    @override
    def between_steps(self) -> None:
        try:
            super().between_steps()
        except OSError as error:
            self.checkpoint_thresholds.pop(0)  # the next one may be luckier
            logger.warning(f"{error} Training goes on without this checkpoint.")
        if self.must_stop():
            self._stop()

    def must_stop(self) -> bool:
        """Whether the training ends behind this step, since it was interrupted."""
        return self.interrupted

    def _stop(self) -> None:
        if self.cfg.checkpoint_path is None:
            logger.warning("interrupted; checkpoint_path is None, so nothing is saved")
        else:
            logger.warning("interrupted, saving progress")
            self.save_checkpoint(str(self.n_training_samples))
        raise InterruptedException()

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """
        Saves a checkpoint, whole or not at all. SAELens saves one named `final_...` after the
        last step and before the SAE: if that fails, it is a warning.

        Raises:
            OSError: in one sentence, if a checkpoint of another name cannot be written.
        """
        try:
            self._save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        except Exception as error:
            if not checkpoint_name.startswith("final_"):
                raise
            logger.warning(f"The final checkpoint is missing: {error}")

    def _save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None,
        wandb_aliases: list[str] | None,
    ) -> None:
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None:
            self.write_checkpoint(checkpoint_name, None, wandb_aliases)
            return
        checkpoint = Path(base) / checkpoint_name
        partial = partial_path(checkpoint)
        self._remove(partial)
        provider = self.data_provider
        try:
            # so that the store's state does not change while it is saved
            with (
                named_write_errors(f"the checkpoint {checkpoint_name}", Path(base)),
                provider.paused()
                if isinstance(provider, PrefetchingIterator)
                else nullcontext(),
            ):
                self.write_checkpoint(partial.name, base, wandb_aliases)
                publish_checkpoint(checkpoint, self.n_training_samples, self.ranks)
        except OSError:
            self._remove(partial)
            raise

    def write_checkpoint(
        self, name: str, base_path: Path | str | None, wandb_aliases: list[str] | None
    ) -> None:
        """Writes the files of a checkpoint, as SAELens' `save_checkpoint` does."""
        super().save_checkpoint(name, base_path, wandb_aliases)

    def _remove(self, partial: Path) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
