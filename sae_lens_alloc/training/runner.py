"""SAELens' runner with runs that can be repeated, resumed and trusted."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.activations.gathered import paused, take_activations
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.config.rank_checks import require_no_hooks
from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.launch import on_device
from sae_lens_alloc.training.after_training import AfterTraining
from sae_lens_alloc.training.before_run import pretrained_sae, settled_run
from sae_lens_alloc.training.final_sae import require_artifact_names
from sae_lens_alloc.training.interruption import interruptible, noting
from sae_lens_alloc.training.kl_finish import finish_of_run
from sae_lens_alloc.training.metrics_file import save_fingerprint
from sae_lens_alloc.training.rng_state import (
    restore_rng_state,
    save_rng_state,
    seed_all,
    seed_of_rank,
)
from sae_lens_alloc.training.run_folders import METRICS_FILENAME, claimed_folders
from sae_lens_alloc.training.run_on_ranks import ranks_of_run
from sae_lens_alloc.training.run_trainer import (
    begin_metadata,
    give_firings,
    open_metrics,
    resume,
    trainer_of_run,
)
from sae_lens_alloc.training.sourced_runner import SourcedRunner, with_rows

__all__ = ["CALIBRATION_TOKENS", "METRICS_FILENAME", "AllocSAETrainingRunner"]

CALIBRATION_TOKENS = 65_536


class AllocSAETrainingRunner(SourcedRunner):
    """
    SAELens' `LanguageModelSAETrainingRunner` for any architecture, which besides

    - seeds all random generators with `cfg.seed`, so that two runs are equal;
    - gives Mutual Choice the recipe's schedule where `feature_choice_steps` is None;
    - trains with `AllocSAETrainer` and writes the metrics to `metrics.jsonl` in the output
      folder, among them metrics on held-out activations;
    - goes on bit for bit from its own checkpoints, which are never half-written;
      `cfg.resume_from_checkpoint` may also be the folder that holds them, for the last whole
      one. On SIGINT and SIGTERM it saves one after the running step; the second time it stops
      at once;
    - saves the SAE right after the last step. For Mutual Choice and Feature Choice, it then
      calibrates the thresholds on 65k tokens of the training text and saves it again; what
      fails after the last step is a warning that says how to make up for it;
    - refuses an output folder that already holds an SAE unless `overwrite` is given or the SAE
      is of the run that is resumed, and folders that cannot be written to, have no room or
      are in use by another run. What is in the folder stays until the SAE is saved;
    - returns the SAE in evaluation mode, records its metrics on held-out activations, seed,
      versions and git commit in its metadata, and warns if the saved SAE does not give the
      same when SAELens loads it;
    - trains one SAE by all processes where torchrun has started several: each runs the language
      model on its own part of the dataset and holds some of the features (docs/distributed.md).
      `run` then returns on each of them an SAE of its own features alone, and the saved SAE has
      all of them;
    - trains on activations of one's own where `cfg.activations` names them or they are given.
    """

    sae_is_known: ClassVar[bool] = True  # before the language model has run

    _resumed_from: str | None = None
    _metrics_path: Path | None = None
    _batches: DataProvider | None = None

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        overwrite: bool = False,
        n_evaluation_contexts: int = 0,
        override_activations: Any = None,
    ) -> None:
        """
        Args:
            cfg: The run.
            override_dataset: As for SAELens' runner.
            override_model: As for SAELens' runner.
            override_sae: As for SAELens' runner.
            overwrite: Whether an SAE in the output folder may be replaced.
            n_evaluation_contexts: Further contexts to set aside, in `evaluation_contexts`.
            override_activations: Activations to train on in place of those of a language model:
                what `train_on_activations` takes.

        Raises:
            ValueError: if the run would lose something in its folders or has no room there,
                cannot be resumed, or the text or the activations are too few or do not fit.
            OSError: if its folders cannot be written to.
        """
        hosts = ranks_of_run()
        with failing_together(hosts):
            cfg, rows = with_rows(cfg, override_activations)
        cfg = settled_run(cfg, override_sae, overwrite, self.sae_is_known, hosts)
        self.ranks = on_device(hosts, cfg.device)
        self.overwrite = overwrite
        # SAELens seeds nothing, so the weights of two runs would differ
        seed_all(cfg.seed)
        if override_sae is None:
            override_sae = pretrained_sae(cfg)
        self.begin(
            cfg,
            override_dataset,
            override_model,
            override_sae,
            rows,
            n_evaluation_contexts,
        )
        self.kl_finish = finish_of_run(cfg, self.activations_store)
        self._after = AfterTraining(cfg, self.held_out, self.ranks)

    @property
    def saved_in(self) -> Path | None:
        """Where the SAE has been saved so far."""
        return self._after.saved_in

    @override
    def run(self) -> TrainingSAE[Any]:
        self._after = AfterTraining(self.cfg, self.held_out, self.ranks)
        require_no_hooks(self.sae, self.ranks)
        claimed = claimed_folders(self.cfg, self.overwrite, ranks=self.ranks)
        with claimed, interruptible():
            # again, so that it does not matter what was drawn since the runner was made
            seed_all(seed_of_rank(self.cfg.seed, self.ranks))
            if self.cfg.resume_from_checkpoint is not None:
                # SAELens does so with prefetch_llm_batches only when a thread reads the store
                with failing_together(self.ranks):
                    self.activations_store.load_from_checkpoint(
                        self.cfg.resume_from_checkpoint
                    )
            # SAELens' run() would load it with its own trainer, into the schedule of another
            # training where that has changed; ours loads it below
            self._resumed_from = self.cfg.resume_from_checkpoint
            self.cfg.resume_from_checkpoint = None
            try:
                return super().run()
            except (InterruptedException, KeyboardInterrupt):
                if self.saved_in is None:
                    raise InterruptedException() from None
                raise InterruptedException(self._after.what_there_is) from None
            finally:
                self.cfg.resume_from_checkpoint = self._resumed_from

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        # SAELens' run() makes its trainer itself, and asks it for the sparsity afterwards
        host, trainer = trainer, trainer_of_run(trainer, self.ranks)
        if self._resumed_from is not None:
            self.cfg.resume_from_checkpoint = self._resumed_from
            resume(trainer, self._resumed_from)
        if self.cfg.logger.log_to_wandb:
            require_artifact_names(trainer.sae)
        begin_metadata(trainer.sae, self.cfg, self.ranks)
        trainer.held_out, trainer.kl_finish = self.held_out, self.kl_finish
        self._metrics_path = open_metrics(trainer, self.cfg, self.ranks)
        self._batches = trainer.data_provider
        if self.cfg.resume_from_checkpoint is not None:
            restore_rng_state(Path(self.cfg.resume_from_checkpoint), self.ranks)
        with noting(trainer.interrupt, only_once=not self.ranks.is_alone):
            sae: TrainingSAE[Any] = trainer.fit()
            self._after.save_first(sae, trainer.log_feature_sparsity)
        if self.ranks.any(trainer.interrupted):
            raise InterruptedException()
        self._after.calibrate(sae, lambda: self._calibration_activations(trainer))
        sae.eval()
        self._after.record_held_out(sae)
        give_firings(trainer, host)
        return sae

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is None:
            return
        with paused(self._batches):
            if self.ranks.rank == 0:
                super().save_checkpoint(checkpoint_path)
            else:  # each has a state of its own, and the config is rank 0's
                self.activations_store.save_to_checkpoint(checkpoint_path)
        if self._metrics_path is not None:
            save_fingerprint(self._metrics_path, checkpoint_path)
        save_rng_state(checkpoint_path, self.ranks)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        """
        Saves an SAE for inference, checks what was saved, and uploads it where W&B is on.
        Files of the same name are replaced once all are written. What fails after that is a
        warning.

        Raises:
            OSError: in one sentence, if it cannot be written.
        """
        output = Path(output_path)
        self._after.save(sae, output, log_feature_sparsity)
        if self.cfg.logger.log_to_wandb and self.ranks.rank == 0:
            with self._after.survived("it was not uploaded to W&B", by_all=False):
                self.cfg.logger.log(
                    self,
                    output / SAE_WEIGHTS_FILENAME,
                    output / SAE_CFG_FILENAME,
                    None
                    if log_feature_sparsity is None
                    else output / SPARSITY_FILENAME,
                    wandb_aliases=["final_model"],
                )

    def _calibration_activations(self, trainer: SAETrainer[Any, Any]) -> torch.Tensor:
        batches = trainer.data_provider
        return take_activations(batches, CALIBRATION_TOKENS, self.cfg.device)
