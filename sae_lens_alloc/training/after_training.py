"""What follows the last step: whatever fails then is a warning, since the SAE is there."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.speaking import is_lost_peer
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.refined_jumprelu_sae import STOCK_FOLDER
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAE,
)
from sae_lens_alloc.thresholds.calibration import calibrate_thresholds
from sae_lens_alloc.training.final_sae import (
    how_to_calibrate,
    write_sae,
    write_sae_somewhere,
)
from sae_lens_alloc.training.held_out import held_out_metrics
from sae_lens_alloc.training.self_check import check_saved_sae


class AfterTraining:
    """
    Saves, calibrates, measures and checks the SAE of a run, and knows how far that is. All ranks of
    several call it; rank 0 checks the saved SAE alone.
    """

    saved_in: Path | None = None  # where the SAE has been saved so far

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        held_out: torch.Tensor,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            cfg: The run.
            held_out: Activations that are not trained on, shape (n_tokens, d_in).
            ranks: The ranks that share the features of the SAE.
        """
        self.cfg = cfg
        self.held_out = held_out
        self.ranks = ranks
        self.what_there_is = "the SAE is trained"

    @contextmanager
    def survived(
        self, missing: str, by_all: bool = True
    ) -> Generator[None, None, None]:
        """
        Within it, an error is a warning that says what there is and what is missing.

        Args:
            missing: What is missing after an error.
            by_all: Whether all ranks do it together. Then it is survived only if all have the error.
        """
        try:
            yield
        except Exception as error:
            if by_all and not self.ranks.is_alone and not _is_of_all(error):
                raise
            reason = str(error).rstrip(".") or type(error).__name__
            logger.warning(f"{self.what_there_is}, but {missing}: {reason}.")

    def save_first(
        self, sae: TrainingSAE[Any], log_feature_sparsity: torch.Tensor
    ) -> None:
        """
        Saves the SAE right after the last step, as `write_sae_somewhere` does, if the run has
        an output folder.
        """
        if self.cfg.output_path is not None:
            output = Path(self.cfg.output_path)
            write_sae_somewhere(sae, self.cfg, output, log_feature_sparsity)
            self._note_saved(sae, output)

    def save(
        self,
        sae: TrainingSAE[Any],
        output: Path,
        log_feature_sparsity: torch.Tensor | None,
    ) -> None:
        """
        Saves the SAE with its metrics and checks what was saved. If it has been saved there
        before, an error is a warning.

        Raises:
            OSError: in one sentence, if it cannot be written.
        """
        if sae.cfg.metadata.held_out is None:
            self.record_held_out(sae)
        is_saved = output == self.saved_in
        with self.survived("it was not saved again") if is_saved else nullcontext():
            write_sae(sae, self.cfg, output, log_feature_sparsity)
            self._note_saved(sae, output)
            self._check(output, sae.cfg.metadata.held_out)

    def calibrate(
        self, sae: TrainingSAE[Any], activations: Callable[[], torch.Tensor]
    ) -> None:
        """
        Calibrates the thresholds of an SAE of ours, or leaves them as they are if that fails.

        Args:
            sae: The SAE.
            activations: Gives activations of shape (n_tokens, d_in) to calibrate them on.
        """
        if not isinstance(sae, AllocationTrainingSAE):
            return
        with self.survived("its thresholds were not calibrated"):
            tracked = sae.allocation.threshold.clone()
            try:
                report = calibrate_thresholds(sae, activations())
            except BaseException:
                sae.allocation.threshold.copy_(tracked)
                raise
            sae.cfg.metadata.l0 = report.l0

    def record_held_out(self, sae: TrainingSAE[Any]) -> None:
        """Records the metrics of the SAE on held-out activations in its metadata."""
        with self.survived("it could not be measured on held-out activations"):
            sae.cfg.metadata.held_out = {
                **held_out_metrics(
                    sae, self.held_out, self.cfg.train_batch_size_tokens
                ),
                "n_tokens": len(self.held_out),
            }
            if isinstance(sae, RefinedMutualChoiceTrainingSAE):
                stock = sae.stock_form()
                stock.turn_off_forward_pass_hook_z_reshaping()
                sae.cfg.metadata.stock_form = {
                    **held_out_metrics(
                        stock, self.held_out, self.cfg.train_batch_size_tokens
                    ),
                    "n_tokens": len(self.held_out),
                    "folder": STOCK_FOLDER,
                }

    def _check(self, output: Path, recorded: dict[str, Any] | None) -> None:
        if recorded is None or self.ranks.rank > 0:
            return
        with self.survived("it could not be checked", by_all=False):
            check_saved_sae(
                output,
                recorded,
                self.held_out,
                self.cfg.train_batch_size_tokens,
                self.cfg.device,
            )

    def _note_saved(self, sae: TrainingSAE[Any], output: Path) -> None:
        self.saved_in = output
        self.what_there_is = f"the SAE is saved in {str(output)!r}"
        if isinstance(sae, AllocationTrainingSAE) and not sae.cfg.metadata.calibration:
            self.what_there_is += (
                " with the thresholds of training, which "
                f"`{how_to_calibrate(sae, output)}` calibrates"
            )


def _is_of_all(error: Exception) -> bool:
    """
    Whether all ranks have an error: they compute the same from the same, and agree on what cannot
    be read or written. A device may fail on one alone, for which the others would wait.
    """
    return isinstance(error, ValueError | OSError) and not is_lost_peer(error)
