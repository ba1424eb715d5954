"""SAELens' trainer with a fused optimizer, metrics in a file, and checkpoints to rely on."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import logger
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import (
    T_TRAINING_SAE,
    T_TRAINING_SAE_CONFIG,
    TrainStepOutput,
)
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from typing_extensions import Self, override

from sae_lens_alloc.config.run_checks import check_learning_rate
from sae_lens_alloc.config.run_config import cuda_graph_of
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.mutual_choice_sae import with_schedule
from sae_lens_alloc.saes.rows import output_width, row_width
from sae_lens_alloc.shares import steps_of
from sae_lens_alloc.training.checkpointing_trainer import CheckpointingTrainer
from sae_lens_alloc.training.held_out import held_out_metrics
from sae_lens_alloc.training.kl_finish import KLFinish
from sae_lens_alloc.training.metrics_file import append_row
from sae_lens_alloc.training.optimizer import make_optimizer, make_schedule
from sae_lens_alloc.training.row_scaler import RowScaler
from sae_lens_alloc.training.step_graph import StepGraph
from sae_lens_alloc.training.train_step import clip_gradients, train_step


class DataEndedError(ValueError):
    """The data provider ended before the training."""


class AllocSAETrainer(CheckpointingTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """
    SAELens' `SAETrainer` with fused Adam where the device has it. Trains any architecture.

    Mutual Choice gets the recipe's schedule where `feature_choice_steps` is None.

    Its checkpoints are written to a temporary folder and renamed, and count the steps that
    they hold. Where `metrics_path` is set, the metrics that SAELens logs to W&B are appended
    to that file; where `held_out` is set, activations of shape (n_tokens, d_in), metrics on
    them are logged as often as SAELens evaluates. Where `kl_finish` is set, the last steps of
    one of our SAEs have the KL divergence of the language model in their loss. Where
    `interrupted` becomes True, training stops after the running step with a checkpoint. A row
    of metrics or a checkpoint on the way that cannot be written is a warning, and training
    goes on.
    """

    metrics_path: Path | None = None
    held_out: torch.Tensor | None = None
    kl_finish: KLFinish | None = None

    _has_begun = False
    _graph: StepGraph | None = None

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: DataProvider,
        evaluator: Evaluator[T_TRAINING_SAE] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ) -> None:
        """
        Args:
            cfg: The training; `lr_end` must be given.
            sae: The SAE to train.
            data_provider: Iterator of batches of activations, shape (B, d_in), that does not
                end before the training. For a transcoder, shape (B, d_in + d_out).
            evaluator: As for SAETrainer. Not used for a transcoder.
            save_checkpoint_fn: As for SAETrainer.

        Raises:
            ValueError: if the learning-rate schedule cannot be made, the data provider is no
                iterator, or the optimizer cannot train this SAE.
        """
        check_learning_rate(cfg)
        if not hasattr(data_provider, "__next__"):
            raise ValueError(
                "data_provider must be an iterator of batches of shape (B, d_in), such as "
                f"iter(batches), got {type(data_provider).__name__}."
            )
        steps = steps_of(cfg.total_training_samples, cfg.train_batch_size_samples)
        sae.cfg = with_schedule(sae.cfg, steps)
        is_transcoder = output_width(sae.cfg) is not None
        if is_transcoder:
            evaluator = (
                None  # SAELens' replaces what is encoded by what is reconstructed
            )
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        if is_transcoder:
            self.activation_scaler = RowScaler(sae.cfg.d_in)
        # SAELens made its own, which has not stepped
        self.optimizer = make_optimizer(cfg, sae)
        self.lr_scheduler = make_schedule(cfg, self.optimizer)

    @classmethod
    def in_place_of(cls, trainer: SAETrainer[Any, Any]) -> Self:
        """
        A trainer of the same training as one that has not begun. Its SAE keeps its schedule:
        where a run leaves that to the SAE, so does this.
        """
        settled = trainer.sae.cfg
        ours = cls(
            trainer.cfg,
            trainer.sae,
            trainer.data_provider,
            trainer.evaluator,
            trainer.save_checkpoint_fn,
        )
        ours.sae.cfg = settled
        return ours

    def interrupt(self) -> None:
        """
        Lets the running step be the last one.

        Raises:
            KeyboardInterrupt: before the first step, when there is nothing new to save.
        """
        if not self._has_begun:
            raise KeyboardInterrupt
        self.interrupted = True

    @override
    def fit(self) -> T_TRAINING_SAE:
        try:
            sae = super().fit()
        except StopIteration:
            raise DataEndedError(
                f"data_provider ended after {self.n_training_samples:,} of the "
                f"{self.cfg.total_training_samples:,} tokens to train on: give an iterator "
                "that goes on, or lower total_training_samples."
            ) from None
        self._graph = None  # its memory is for what follows the training
        return sae

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        sae = self.sae
        if not self._has_begun:
            self._require_width(batch)
            if isinstance(sae, AllocationTrainingSAE):
                self._graph = self._make_graph(sae)
            self._has_begun = True
        if isinstance(sae, AllocationTrainingSAE):
            # what SAELens does around its own training step, which asks the device who fired
            batch = batch.to(sae.device)
            self.n_training_samples += len(batch)
            kl_step = None
            if self.kl_finish is not None:
                kl_step = self.kl_finish.begin(
                    self.n_training_steps, batch, self.data_provider
                )
            if kl_step is not None:
                batch, self._graph = kl_step.batch, None
            sae_in = self.activation_scaler(batch)
            output = train_step(self, sae_in, self._graph, kl_step)
        else:
            output = super().step(batch)
        every = self.cfg.logger.wandb_log_frequency
        if (self.n_training_steps + 1) % every == 0:
            self._log(output)
        return output

    def _require_width(self, batch: torch.Tensor) -> None:
        width = row_width(self.sae.cfg)
        if batch.ndim != 2 or batch.shape[1] != width:
            what = "d_in" if output_width(self.sae.cfg) is None else "d_in + d_out"
            raise ValueError(
                f"data_provider must yield batches of shape (B, {what} = {width}), got "
                f"{tuple(batch.shape)}."
            )

    def _make_graph(self, sae: AllocationTrainingSAE[Any]) -> StepGraph | None:
        wanted = cuda_graph_of(self.cfg)
        if wanted is False:
            return None
        if torch.device(self.cfg.device).type != "cuda":
            if wanted:
                logger.warning(
                    f"cuda_graph is off: the SAE is trained on {self.cfg.device}, and graphs "
                    "are for CUDA."
                )
            return None
        return StepGraph(
            sae,
            partial(clip_gradients, self),
            self.autocast_if_enabled,
            says_why_not=bool(wanted),
        )

    def _log(self, output: TrainStepOutput) -> None:
        interval = (
            self.cfg.logger.wandb_log_frequency
            * self.cfg.logger.eval_every_n_wandb_logs
        )
        held_out = {}
        if self.held_out is not None and (self.n_training_steps + 1) % interval == 0:
            held_out = {
                f"held_out/{name}": value
                for name, value in held_out_metrics(
                    self.sae,
                    self.activation_scaler(self.held_out),
                    self.cfg.train_batch_size_samples,
                ).items()
            }
            if self.cfg.logger.log_to_wandb:
                wandb.log(held_out, step=self.n_training_steps)
        if self.metrics_path is not None:
            metrics = self.build_train_step_log_dict(output, self.n_training_samples)
            row = {"step": self.n_training_steps, **metrics, **held_out}
            try:
                append_row(self.metrics_path, row)
            except OSError as error:
                logger.warning(
                    f"the metrics of step {self.n_training_steps} cannot be written to "
                    f"{self.metrics_path} ({error.strerror}) and are missing there"
                )
