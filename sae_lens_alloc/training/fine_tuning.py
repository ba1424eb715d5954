"""Training that starts from another SAE instead of random weights."""

import math
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.gathered import GatheredBatches
from sae_lens_alloc.progress import announced
from sae_lens_alloc.training.before_run import share_features
from sae_lens_alloc.training.conversion import convert_sae
from sae_lens_alloc.training.output_folder import require_other_folder
from sae_lens_alloc.training.resuming import resumed_sae_config
from sae_lens_alloc.training.runner import CALIBRATION_TOKENS, AllocSAETrainingRunner
from sae_lens_alloc.training.source_sae import SourceSAE
from sae_lens_alloc.training.warm_start import ConversionReport

# A file that is loaded as another architecture differs by more than this: a TopK SAE that is loaded as
# a ReLU SAE has 5 to 20 times the features per token (SAELens #308, #553).
MAX_L0_RATIO = 2.0
MAX_EV_LOSS = 0.2


class FineTuningRunner(AllocSAETrainingRunner):
    """
    `AllocSAETrainingRunner` that starts from another SAE. The SAE is converted to the
    architecture of the config. Its statistics and thresholds are estimated on 65k tokens of
    the training text. Each of several processes converts the whole SAE and then keeps its own
    features.
    """

    start: ConversionReport
    sae_is_known = False

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        source: SourceSAE,
        sae_overrides: dict[str, Any],
        overwrite: bool = False,
        evaluation_tokens: int = 0,
    ) -> None:
        """
        Args:
            cfg: The run. Of `cfg.sae` only the architecture is used.
            source: The SAE to start from.
            sae_overrides: Fields of the new SAE's config that differ from those of the source,
                or from the defaults if the source has no such field.
            overwrite: See AllocSAETrainingRunner.
            evaluation_tokens: Tokens of the text to set aside, in `evaluation_contexts`.

        Raises:
            ValueError: as AllocSAETrainingRunner, and if the output is the folder of the source,
                or the source cannot be converted or has implausible figures on the model's
                activations.
            OSError: if a folder cannot be written to.
        """
        require_other_folder(cfg.output_path, source.name, "the SAE to start from")
        super().__init__(
            cfg,
            overwrite=overwrite,
            n_evaluation_contexts=math.ceil(evaluation_tokens / cfg.context_size),
        )
        batches = GatheredBatches(self.activations_store, self.ranks, self.cfg.device)
        # which a config may name for the SAE by itself
        own_device = {} if self.ranks.is_alone else {"device": self.cfg.device}
        activations = batches.take(CALIBRATION_TOKENS)
        with announced("converting the SAE"):
            sae = convert_sae(
                source.sae,
                cfg.sae.architecture(),
                activations=activations,
                scaling_factor=source.scaling_factor,
                **{"device": self.cfg.device, **sae_overrides, **own_device},
            )
        self.start = ConversionReport(**sae.cfg.metadata.conversion)
        require_plausible(source, self.start)
        if self.cfg.resume_from_checkpoint is not None:
            checkpoint = Path(self.cfg.resume_from_checkpoint)
            sae.cfg = resumed_sae_config(checkpoint, sae.cfg, cfg.training_tokens)
        share_features(sae, self.ranks)
        self.sae = sae
        self.cfg.sae = sae.cfg


def require_plausible(source: SourceSAE, start: ConversionReport) -> None:
    """
    Raises ValueError if the figures of an SAE on real activations are implausible, so that it
    was loaded as another architecture, or belongs to another model or hook.
    """
    ev = start.source_ev
    found = (
        f"{source.name!r} has {start.source_l0:.1f} features per token and an explained "
        f"variance of {ev:.3f} on this model's activations"
    )
    expected = source.expected_l0
    if expected and not (
        expected / MAX_L0_RATIO <= start.source_l0 <= expected * MAX_L0_RATIO
    ):
        raise ValueError(
            f"{found}, but should have about {expected:.1f} features: it was saved as another "
            "architecture than it is, or belongs to another model or hook."
        )
    if ev < (source.expected_ev or MAX_EV_LOSS) - MAX_EV_LOSS:
        wanted = f" instead of {source.expected_ev:.3f}" if source.expected_ev else ""
        raise ValueError(
            f"{found}{wanted}: it belongs to another model, hook or normalization of the "
            "activations."
        )
