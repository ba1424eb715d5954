"""SAELens' runner with runs that can be repeated, resumed and trusted."""

import copy
import logging
import math
import os
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.evaluation.activations import take_tokens
from sae_lens_alloc.evaluation.calibration import calibrate_thresholds
from sae_lens_alloc.run_checks import check_run
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.mutual_choice_sae import with_schedule
from sae_lens_alloc.training.activations_store import make_resumable
from sae_lens_alloc.training.checkpoint import find_checkpoint, require_same_sae
from sae_lens_alloc.training.held_out import held_out_metrics
from sae_lens_alloc.training.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.training.local_dataset import override_for_local_dataset
from sae_lens_alloc.training.metrics_file import drop_rows_from
from sae_lens_alloc.training.preflight import check_devices, check_memory
from sae_lens_alloc.training.pretrained import load_pretrained
from sae_lens_alloc.training.provenance import provenance
from sae_lens_alloc.training.rng_state import rng_state, seed_all, set_rng_state
from sae_lens_alloc.training.self_check import check_saved_sae
from sae_lens_alloc.training.trainer import AllocSAETrainer

METRICS_FILENAME = "metrics.jsonl"
RNG_STATE_FILENAME = "rng_state.pt"
CALIBRATION_TOKENS = 65_536
# At most, and a hundredth of the training tokens in a short run.
HELD_OUT_TOKENS = 16_384


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
    - for Mutual Choice and Feature Choice, calibrates the thresholds on 65k tokens of the
      training text before saving;
    - returns the SAE in evaluation mode, records its metrics on held-out activations, seed,
      versions and git commit in its metadata, and warns if the saved SAE does not give the
      same when SAELens loads it.
    """

    held_out: torch.Tensor  # activations that are not trained on, (n_tokens, d_in)

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
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
        if cfg.resume_from_checkpoint is not None:
            checkpoint = find_checkpoint(cfg.resume_from_checkpoint)
            require_same_sae(checkpoint, cfg.sae)
            cfg.resume_from_checkpoint = str(checkpoint)
        # SAELens seeds nothing, so the weights of two runs would differ
        seed_all(cfg.seed)
        if override_sae is None:
            override_sae = _pretrained_sae(cfg)
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
        n_tokens = min(HELD_OUT_TOKENS, math.ceil(cfg.training_tokens / 100))
        self.held_out = make_resumable(self.activations_store).hold_out(n_tokens)

    @override
    def run(self) -> TrainingSAE[Any]:
        # again, so that it does not matter what was drawn since the runner was made
        seed_all(self.cfg.seed)
        if self.cfg.resume_from_checkpoint is not None:
            # SAELens does so with prefetch_llm_batches only when a thread reads the store
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
        return super().run()

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        # SAELens' run() builds its trainer itself and offers no seam to pass another class.
        trainer.__class__ = AllocSAETrainer
        assert isinstance(trainer, AllocSAETrainer)
        trainer.held_out = self.held_out
        if self.cfg.output_path is not None:
            output = Path(self.cfg.output_path)
            output.mkdir(parents=True, exist_ok=True)
            trainer.metrics_path = output / METRICS_FILENAME
            drop_rows_from(trainer.metrics_path, trainer.n_training_steps)
        if self.cfg.resume_from_checkpoint is not None:
            _restore_rng_state(Path(self.cfg.resume_from_checkpoint))
        with _interrupted_between_steps(trainer):
            sae = trainer.fit()
        if isinstance(sae, AllocationTrainingSAE):
            report = calibrate_thresholds(sae, self._calibration_activations(trainer))
            sae.cfg.metadata.l0 = report.l0
        sae.eval()
        sae.cfg.metadata.held_out = {
            **held_out_metrics(sae, self.held_out, self.cfg.train_batch_size_tokens),
            "n_tokens": len(self.held_out),
        }
        sae.cfg.metadata.provenance = provenance(self.cfg.seed)
        return sae

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            torch.save(rng_state(), checkpoint_path / RNG_STATE_FILENAME)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        output = Path(output_path)
        partial = output.with_name(f"{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        super().save_final_sae(sae, str(partial), log_feature_sparsity)
        output.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            os.replace(file, output / file.name)
        partial.rmdir()
        check_saved_sae(
            output,
            sae.cfg.metadata.held_out,
            self.held_out,
            self.cfg.train_batch_size_tokens,
            self.cfg.device,
        )

    def _calibration_activations(self, trainer: SAETrainer[Any, Any]) -> torch.Tensor:
        taken = take_tokens(trainer.data_provider, CALIBRATION_TOKENS)
        return taken.to(self.cfg.device)


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


@contextmanager
def _interrupted_between_steps(trainer: AllocSAETrainer) -> Generator[None, None, None]:
    """
    On SIGINT and SIGTERM, lets the trainer stop after the running step: SAELens stops within
    it, with a batch that counts as seen and was not learned. The second time stops at once.
    """

    def interrupt(*_: Any) -> None:
        if trainer.interrupted:
            raise InterruptedException()
        trainer.interrupted = True

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
