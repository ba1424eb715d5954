"""SAELens' runner with runs that can be repeated, resumed and trusted."""

from pathlib import Path
from typing import Any, ClassVar

import torch
import wandb
from sae_lens import logger
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.activations.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.activations.local_dataset import override_for_local_dataset
from sae_lens_alloc.activations.on_text import take_tokens
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.training.after_training import AfterTraining
from sae_lens_alloc.training.before_run import (
    no_warning_of_overrides,
    pretrained_sae,
    require_rows,
    settled_run,
)
from sae_lens_alloc.training.final_sae import require_artifact_names
from sae_lens_alloc.training.held_out import held_out_tokens
from sae_lens_alloc.training.interruption import interruptible, noting
from sae_lens_alloc.training.metrics_file import drop_rows_from, save_fingerprint
from sae_lens_alloc.training.provenance import provenance
from sae_lens_alloc.training.rng_state import (
    restore_rng_state,
    save_rng_state,
    seed_all,
)
from sae_lens_alloc.training.run_folders import (
    METRICS_FILENAME,
    claimed_folders,
    metrics_path,
)
from sae_lens_alloc.training.trainer import AllocSAETrainer

__all__ = ["CALIBRATION_TOKENS", "METRICS_FILENAME", "AllocSAETrainingRunner"]

CALIBRATION_TOKENS = 65_536


class AllocSAETrainingRunner(LanguageModelSAETrainingRunner):
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
      same when SAELens loads it.
    """

    held_out: torch.Tensor  # activations that are not trained on, (n_tokens, d_in)
    evaluation_contexts: torch.Tensor  # nor these, if any, (n_contexts, context_size)

    sae_is_known: ClassVar[bool] = True  # before the language model has run

    _resumed_from: str | None = None
    _metrics_path: Path | None = None

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        overwrite: bool = False,
        n_evaluation_contexts: int = 0,
    ) -> None:
        """
        Args:
            cfg: The run.
            override_dataset: As for SAELens' runner.
            override_model: As for SAELens' runner.
            override_sae: As for SAELens' runner.
            overwrite: Whether an SAE in the output folder may be replaced.
            n_evaluation_contexts: Further contexts to set aside, in `evaluation_contexts`.

        Raises:
            ValueError: if the run would lose something in its folders or has no room there,
                cannot be resumed, or the text is too short.
            OSError: if its folders cannot be written to.
        """
        cfg = settled_run(cfg, override_sae, overwrite, self.sae_is_known)
        self.overwrite = overwrite
        # SAELens seeds nothing, so the weights of two runs would differ
        seed_all(cfg.seed)
        if override_sae is None:
            override_sae = pretrained_sae(cfg)
        require_rows(override_dataset)
        with no_warning_of_overrides(
            dataset=override_dataset is None, model=override_model is None
        ):
            super().__init__(
                cfg,
                override_for_local_dataset(cfg)
                if override_dataset is None
                else override_dataset,
                load_language_model(cfg) if override_model is None else override_model,
                override_sae,
            )
        check_language_model(self.model, cfg)
        store = ResumableActivationsStore.in_place_of(self.activations_store, cfg)
        self.activations_store = self.evaluator.activations_store = store
        n_tokens = held_out_tokens(cfg, store.training_context_size)
        n_evaluation_tokens = n_evaluation_contexts * store.training_context_size
        store.require_text(store.tokens_in_batches(n_tokens) + n_evaluation_tokens)
        self.held_out = store.hold_out(n_tokens)
        if n_evaluation_contexts:
            contexts = store.hold_out_contexts(n_evaluation_contexts)
            self.evaluation_contexts = contexts.to(str(cfg.llm_device))
        self._after = AfterTraining(cfg, self.held_out)

    @property
    def saved_in(self) -> Path | None:
        """Where the SAE has been saved so far."""
        return self._after.saved_in

    @override
    def run(self) -> TrainingSAE[Any]:
        self._after = AfterTraining(self.cfg, self.held_out)
        with claimed_folders(self.cfg, self.overwrite), interruptible():
            # again, so that it does not matter what was drawn since the runner was made
            seed_all(self.cfg.seed)
            if self.cfg.resume_from_checkpoint is not None:
                # SAELens does so with prefetch_llm_batches only when a thread reads the store
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
        host, trainer = trainer, AllocSAETrainer.in_place_of(trainer)
        if self._resumed_from is not None:
            self._load(trainer, self._resumed_from)
        metadata = trainer.sae.cfg.metadata
        if self.cfg.logger.log_to_wandb:
            require_artifact_names(trainer.sae)
        metadata.provenance = provenance(self.cfg.seed)
        # of the SAE that it starts from, perhaps
        for key in ("calibration", "held_out"):
            metadata.__dict__.pop(key, None)
        trainer.held_out = self.held_out
        self._metrics_path = trainer.metrics_path = metrics_path(self.cfg)
        if trainer.metrics_path is not None:
            drop_rows_from(trainer.metrics_path, trainer.n_training_steps)
        if self.cfg.resume_from_checkpoint is not None:
            restore_rng_state(Path(self.cfg.resume_from_checkpoint))
        with noting(trainer.interrupt):
            sae: TrainingSAE[Any] = trainer.fit()
            self._after.save_first(sae, trainer.log_feature_sparsity)
        if trainer.interrupted:
            raise InterruptedException()
        self._after.calibrate(sae, lambda: self._calibration_activations(trainer))
        sae.eval()
        self._after.record_held_out(sae)
        host.act_freq_scores = trainer.act_freq_scores
        host.n_frac_active_samples = trainer.n_frac_active_samples
        return sae

    def _load(self, trainer: AllocSAETrainer[Any, Any], checkpoint: str) -> None:
        logger.info(f"Resuming from checkpoint: {checkpoint}")
        self.cfg.resume_from_checkpoint = checkpoint
        if self.cfg.logger.log_to_wandb:
            wandb.config.update(
                {"resume_from_checkpoint": checkpoint}, allow_val_change=True
            )
        trainer.load_trainer_state(checkpoint)
        self.sae.load_weights_from_checkpoint(checkpoint)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            if self._metrics_path is not None:
                save_fingerprint(self._metrics_path, checkpoint_path)
            save_rng_state(checkpoint_path)

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
        if self.cfg.logger.log_to_wandb:
            with self._after.survived("it was not uploaded to W&B"):
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
        taken = take_tokens(trainer.data_provider, CALIBRATION_TOKENS)
        return taken.to(self.cfg.device)
