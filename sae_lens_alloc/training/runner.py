"""SAELens' runner with runs that can be repeated, resumed and trusted."""

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
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
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.activations.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.activations.local_dataset import override_for_local_dataset
from sae_lens_alloc.activations.on_text import take_tokens
from sae_lens_alloc.activations.store import make_resumable
from sae_lens_alloc.config.run_checks import check_run
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.mutual_choice_sae import with_schedule
from sae_lens_alloc.thresholds.calibration import calibrate_thresholds
from sae_lens_alloc.training.final_sae import (
    how_to_calibrate,
    require_artifact_names,
    write_sae,
    write_sae_somewhere,
)
from sae_lens_alloc.training.held_out import held_out_metrics, held_out_tokens
from sae_lens_alloc.training.interruption import interruptible, noting
from sae_lens_alloc.training.metrics_file import drop_rows_from, save_fingerprint
from sae_lens_alloc.training.preflight import check_devices, check_memory
from sae_lens_alloc.training.pretrained import load_pretrained
from sae_lens_alloc.training.provenance import provenance
from sae_lens_alloc.training.resuming import settle_resumed_run
from sae_lens_alloc.training.rng_state import rng_state, seed_all, set_rng_state
from sae_lens_alloc.training.run_folders import (
    METRICS_FILENAME,
    claimed_folders,
    metrics_path,
)
from sae_lens_alloc.training.self_check import check_saved_sae
from sae_lens_alloc.training.trainer import AllocSAETrainer

__all__ = ["CALIBRATION_TOKENS", "METRICS_FILENAME", "AllocSAETrainingRunner"]

RNG_STATE_FILENAME = "rng_state.pt"
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
    saved_in: Path | None = None  # where the SAE has been saved so far

    sae_is_known: ClassVar[bool] = True  # before the language model has run

    _after_training = "the SAE is trained"
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
        steps = cfg.total_training_steps
        cfg = copy.copy(cfg)
        if override_sae is not None:
            # what is checked and recorded is the SAE that is trained
            override_sae.cfg = with_schedule(override_sae.cfg, steps)
            cfg.sae = override_sae.cfg
        cfg.sae = with_schedule(cfg.sae, steps)
        check_run(cfg)
        check_devices(cfg)
        check_memory(cfg)
        settle_resumed_run(cfg, self.sae_is_known)
        self.overwrite = overwrite
        with claimed_folders(cfg, overwrite):
            pass  # so that a run that cannot be saved is found before the model is loaded
        # SAELens seeds nothing, so the weights of two runs would differ
        seed_all(cfg.seed)
        if override_sae is None:
            override_sae = _pretrained_sae(cfg)
        if override_dataset is not None and next(iter(override_dataset), None) is None:
            raise ValueError("override_dataset holds no rows.")
        with _no_warning_of_overrides(
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
        store = make_resumable(self.activations_store, cfg.dataset_path)
        n_tokens = held_out_tokens(cfg, store.training_context_size)
        n_evaluation_tokens = n_evaluation_contexts * store.training_context_size
        store.require_text(store.tokens_in_batches(n_tokens) + n_evaluation_tokens)
        self.held_out = store.hold_out(n_tokens)
        if n_evaluation_contexts:
            contexts = store.hold_out_contexts(n_evaluation_contexts)
            self.evaluation_contexts = contexts.to(str(cfg.llm_device))

    @override
    def run(self) -> TrainingSAE[Any]:
        self.saved_in = None
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
                raise InterruptedException(self._after_training) from None
            finally:
                self.cfg.resume_from_checkpoint = self._resumed_from

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        # SAELens' run() builds its trainer itself and offers no seam to pass another class.
        trainer.__class__ = AllocSAETrainer
        assert isinstance(trainer, AllocSAETrainer)
        trainer.choose_optimizer()
        if self._resumed_from is not None:
            self._load(trainer, self._resumed_from)
        metadata = trainer.sae.cfg.metadata
        if self.cfg.logger.log_to_wandb:
            require_artifact_names(trainer.sae)
        metadata.provenance = provenance(self.cfg.seed)
        for key in (
            "calibration",
            "held_out",
        ):  # of the SAE that it starts from, perhaps
            metadata.__dict__.pop(key, None)
        trainer.held_out = self.held_out
        self._metrics_path = trainer.metrics_path = metrics_path(self.cfg)
        if trainer.metrics_path is not None:
            drop_rows_from(trainer.metrics_path, trainer.n_training_steps)
        if self.cfg.resume_from_checkpoint is not None:
            _restore_rng_state(Path(self.cfg.resume_from_checkpoint))
        with noting(trainer.interrupt):
            sae: TrainingSAE[Any] = trainer.fit()
            if self.cfg.output_path is not None:
                output = Path(self.cfg.output_path)
                write_sae_somewhere(sae, self.cfg, output, trainer.log_feature_sparsity)
                self._note_saved(sae, output)
        if trainer.interrupted:
            raise InterruptedException()
        if isinstance(sae, AllocationTrainingSAE):
            with self._survived("its thresholds were not calibrated"):
                self._calibrate(sae, trainer)
        sae.eval()
        self._record_held_out(sae)
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
            torch.save(rng_state(), checkpoint_path / RNG_STATE_FILENAME)

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
        if sae.cfg.metadata.held_out is None:
            self._record_held_out(sae)
        is_saved = output == self.saved_in
        with self._survived("it was not saved again") if is_saved else nullcontext():
            write_sae(sae, self.cfg, output, log_feature_sparsity)
            self._note_saved(sae, output)
            self._check(output, sae.cfg.metadata.held_out)
        if self.cfg.logger.log_to_wandb:
            with self._survived("it was not uploaded to W&B"):
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

    def _calibrate(
        self, sae: AllocationTrainingSAE[Any], trainer: AllocSAETrainer[Any, Any]
    ) -> None:
        tracked = sae.allocation.threshold.clone()
        try:
            report = calibrate_thresholds(sae, self._calibration_activations(trainer))
        except BaseException:
            sae.allocation.threshold.copy_(tracked)
            raise
        sae.cfg.metadata.l0 = report.l0

    def _record_held_out(self, sae: TrainingSAE[Any]) -> None:
        with self._survived("it could not be measured on held-out activations"):
            sae.cfg.metadata.held_out = {
                **held_out_metrics(
                    sae, self.held_out, self.cfg.train_batch_size_tokens
                ),
                "n_tokens": len(self.held_out),
            }

    def _check(self, output: Path, recorded: dict[str, Any] | None) -> None:
        if recorded is None:
            return
        with self._survived("it could not be checked"):
            check_saved_sae(
                output,
                recorded,
                self.held_out,
                self.cfg.train_batch_size_tokens,
                self.cfg.device,
            )

    @contextmanager
    def _survived(self, missing: str) -> Generator[None, None, None]:
        """Makes a warning of what fails once the SAE is trained: the SAE is there all the same."""
        try:
            yield
        except Exception as error:
            reason = str(error).rstrip(".") or type(error).__name__
            logger.warning(f"{self._after_training}, but {missing}: {reason}.")

    def _note_saved(self, sae: TrainingSAE[Any], output: Path) -> None:
        self.saved_in = output
        self._after_training = f"the SAE is saved in {str(output)!r}"
        if isinstance(sae, AllocationTrainingSAE) and not sae.cfg.metadata.calibration:
            self._after_training += (
                " with the thresholds of training, which "
                f"`{how_to_calibrate(sae, output)}` calibrates"
            )


def _pretrained_sae(
    cfg: LanguageModelSAERunnerConfig[Any],
) -> TrainingSAE[Any] | None:
    """SAELens would train the SAE of the folder's config, not the one of the run's."""
    if cfg.from_pretrained_path is None:
        return None
    if cfg.resume_from_checkpoint is not None:  # whose weights it gets
        return TrainingSAE.from_dict(cfg.sae.to_dict())
    return load_pretrained(cfg.from_pretrained_path, cfg.sae, cfg.device)


@contextmanager
def _no_warning_of_overrides(dataset: bool, model: bool) -> Generator[None, None, None]:
    """
    SAELens warns that a run with overrides cannot be repeated from its config, which is not
    so where they are what the config names.
    """
    untrue = tuple(
        f"You just passed in a {what}"
        for what, is_ours in (("dataset", dataset), ("model", model))
        if is_ours
    )

    def is_true(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(untrue)

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)


def _restore_rng_state(checkpoint: Path) -> None:
    path = checkpoint / RNG_STATE_FILENAME
    if path.exists():  # SAELens' own checkpoints have none
        set_rng_state(torch.load(path, map_location="cpu", weights_only=True))
