"""Configuration shared by every architecture that allocates one budget over a batch."""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from sae_lens_alloc.allocation.quotas import MAX_DENSITY
from sae_lens_alloc.saes.auxiliary_loss import AuxiliaryLossTrainingSAEConfig, require
from sae_lens_alloc.shares import BudgetOrNone, Steps, multiple_of_k


@dataclass
class AllocationTrainingSAEConfig(AuxiliaryLossTrainingSAEConfig):
    """
    Configuration shared by Mutual Choice and Feature Choice training SAEs.

    Args:
        k (float): Average number of active features per token: a batch of B tokens has a
            budget of floor(k * B) token-feature pairs. May be fractional.
        k_start (float | None): Budget per token at step 0. It falls linearly to `k` over
            `k_decay_steps` steps. None starts at `k`. May be a share of k, as in YAML.
        k_decay_steps (int): Steps over which the budget falls from `k_start` to `k`. May be a
            share of the training steps, as in YAML.
        selection_margin (float): Under Mutual Choice the encoder also learns from the pairs
            that just missed the budget: from this share of the budget. Each learns by how
            much the error would have fallen if it had been active. 0 turns this off.
        aux_loss (Literal["aux_zipf", "aux_k", "none"]): Which features learn from the
            reconstruction error. "aux_zipf": those that fire less than the fitted Zipf curve
            predicts, and the dead ones. "aux_k": the dead ones only, as in SAELens' topk, but
            they are looked for at every tenth step instead of at each. "none": no feature.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss.
        aux_loss_decay_start (int | None): Training step at which the auxiliary loss starts to
            fade; it is gone a tenth of that many steps later. None keeps it to the end. May
            be a share of the training steps, as in YAML.
        k_aux (int | None): Features per token in the auxiliary loss. None means k, rounded
            up, for "aux_zipf" and d_in / 2 for "aux_k".
        underuse_fraction (float): A feature is underutilised when its density is below this
            fraction of the Zipf curve at its rank. Used by "aux_zipf".
        density_window_tokens (int): Tokens over which the running density of a feature is
            averaged.
        max_density (float): Largest share of a batch's tokens that Feature Choice gives to
            one feature.
        min_tokens_per_feature (float): Smallest number of tokens of a batch that Feature
            Choice gives to one feature, on average over batches.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already
            normalized: features compete with pre-activation * decoder norm.
        decoder_init_norm (float | None): Norm to initialize decoder weights to. Inherited
            from TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of features. Inherited from SAEConfig.
        dtype (str): Data type of the parameters; thresholds and statistics stay float32.
            Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input
            before encoding. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "layer_norm", "covariance_whitening"]):
            Normalization strategy for input activations. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations.
            Inherited from SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training. Inherited from SAEConfig.
    """

    k: float = 100
    k_start: BudgetOrNone = cast(Any, None)
    k_decay_steps: Steps = cast(Any, 0)
    selection_margin: float = 1.0
    aux_loss: Literal["aux_zipf", "aux_k", "none"] = "aux_zipf"
    max_density: float = MAX_DENSITY
    min_tokens_per_feature: float = 0.0
    rescale_acts_by_decoder_norm: bool = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.k <= self.d_sae, "k", self.k, f"in (0, d_sae = {self.d_sae}]")
        if isinstance(self.k_start, str):
            self.k_start = multiple_of_k(self.k, "k_start", self.k_start)
        if self.k_start is not None:
            require(
                self.k <= self.k_start <= self.d_sae,
                "k_start",
                self.k_start,
                f"in [k = {self.k}, d_sae = {self.d_sae}], since the budget only falls",
            )
            require(
                isinstance(self.k_decay_steps, str) or self.k_decay_steps > 0,
                "k_decay_steps",
                self.k_decay_steps,
                "at least 1 when k_start is set, or the budget would never reach k",
            )
        require(
            isinstance(self.k_decay_steps, str) or self.k_decay_steps >= 0,
            "k_decay_steps",
            self.k_decay_steps,
            ">= 0",
        )
        require(
            0 <= self.selection_margin <= 1,
            "selection_margin",
            self.selection_margin,
            "in [0, 1]",
        )
        require(
            self.aux_loss in ("aux_zipf", "aux_k", "none"),
            "aux_loss",
            self.aux_loss,
            "'aux_zipf', 'aux_k' or 'none'",
        )
        require(0 < self.max_density <= 1, "max_density", self.max_density, "in (0, 1]")
        require(
            self.min_tokens_per_feature >= 0,
            "min_tokens_per_feature",
            self.min_tokens_per_feature,
            ">= 0",
        )

    def features_per_token_in_aux_loss(self) -> int:
        """k_aux, or what it means where it is None."""
        if self.k_aux is not None:
            return self.k_aux
        return self.d_in // 2 if self.aux_loss == "aux_k" else math.ceil(self.k)

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig
