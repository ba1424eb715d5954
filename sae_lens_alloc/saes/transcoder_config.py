"""What a transcoder's config has beside that of an SAE."""

from dataclasses import dataclass, field

from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
)
from typing_extensions import override

from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.auxiliary_loss import require


@dataclass
class TranscoderTrainingConfig(AllocationTrainingSAEConfig):
    """
    Configuration shared by the transcoders that allocate. It stands before that of the SAE of the
    same rule.

    Args:
        d_out (int): Output dimension: that of the activations at `hook_name_out`.
        skip_connection (bool): Whether the output has a share that is linear in the input,
            W_skip x, beside that of the features.
        center_inputs (bool): Whether the mean of the inputs, measured on the first batch, is
            subtracted before they are encoded. Without it many features are never active. What
            is saved has it in b_enc.
        apply_b_dec_to_input (bool): False, since b_dec belongs to the output.
    """

    d_out: int = field(kw_only=True)
    skip_connection: bool = False
    center_inputs: bool = True
    apply_b_dec_to_input: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.d_out > 0, "d_out", self.d_out, ">= 1")
        require(
            not self.apply_b_dec_to_input,
            "apply_b_dec_to_input",
            self.apply_b_dec_to_input,
            "False in a transcoder, whose b_dec belongs to the output",
        )
        require(
            self.normalize_activations != "covariance_whitening",
            "normalize_activations",
            self.normalize_activations,
            "'none', 'expected_average_only_in' or 'layer_norm' in a transcoder, whose output "
            "would need a whitening of its own",
        )
        require(
            self.reshape_activations == "none",
            "reshape_activations",
            self.reshape_activations,
            "'none' in a transcoder, as SAELens runs them",
        )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        if self.skip_connection:
            return JumpReLUSkipTranscoderConfig
        return JumpReLUTranscoderConfig
