"""JumpReLU SAEs that encode twice: what a refined training SAE is saved as."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn
from typing_extensions import override

from sae_lens_alloc.saes.refinement import (
    REFINEMENT,
    require_refinement,
    unexplained_share,
)

# In the folder of a refined SAE that a run has saved: its stock form.
STOCK_FOLDER = "stock_jumprelu"


@dataclass
class RefinedJumpReLUSAEConfig(JumpReLUSAEConfig):
    """
    Configuration class for a RefinedJumpReLUSAE.

    Args:
        refinement (float): Share of what the first pass left unexplained that is added to the
            input of the second pass.
        d_in (int): Input dimension. The other fields are those of JumpReLUSAEConfig.
    """

    refinement: float = REFINEMENT

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_refinement(self.refinement)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "refined_jumprelu"


class RefinedJumpReLUSAE(JumpReLUSAE):
    """
    A JumpReLU SAE whose encoder sees its input a second time, moved towards what the features of a
    first pass left unexplained. `encode`, `decode` and hooks are those of JumpReLU SAEs, and what
    a token gives does not depend on its batch. Encoding costs three products with a weight
    matrix instead of one.

    Beside the weights of a JumpReLU SAE it has `first_threshold`, shape (d_sae,): the threshold of
    each feature in the first pass, infinite for none.
    """

    cfg: RefinedJumpReLUSAEConfig  # type: ignore[assignment]
    first_threshold: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.first_threshold = nn.Parameter(torch.zeros_like(self.threshold))

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        inputs = super().process_sae_in(sae_in)
        affinities = inputs @ self.W_enc + self.b_enc
        first = affinities * (affinities > self.first_threshold.clamp(min=0))
        return inputs + unexplained_share(
            inputs,
            first @ self.W_dec,
            (first > 0).any(-1),
            None if self.cfg.apply_b_dec_to_input else self.b_dec,
            self.cfg.refinement,
        )

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        norms = self.get_W_dec_norm().to(self.first_threshold)
        super().fold_W_dec_norm()
        self.first_threshold.mul_(norms)

    @torch.no_grad()
    def stock_form(self) -> JumpReLUSAE:
        """
        The first pass alone: the stock JumpReLU SAE of the same weights, a copy. Its thresholds are
        those of the first pass, lower for the features that have a lower one in the second. Its
        metadata holds its own figures on held-out text, as far as this SAE's does.
        """
        settings: dict[str, Any] = self.cfg.to_dict()
        del settings["refinement"]
        stock = SAE.from_dict(
            {**settings, "architecture": JumpReLUSAEConfig.architecture()}
        )
        assert isinstance(stock, JumpReLUSAE)
        weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        highest = self.threshold.where(self.threshold.isfinite(), 0.0).max()
        lowered = self.threshold / highest if highest > 0 else 1.0
        weights["threshold"] = weights.pop("first_threshold") * lowered
        stock.load_state_dict(weights)
        metadata = stock.cfg.metadata
        figures: dict[str, Any] | None = metadata.stock_form
        metadata.stock_form = metadata.calibration = metadata.held_out = None
        metadata.l0 = None
        if figures is not None:
            metadata.held_out = {k: v for k, v in figures.items() if k != "folder"}
            metadata.l0 = figures["l0"]
        if not self.hook_z_reshaping_mode:
            stock.turn_off_forward_pass_hook_z_reshaping()
        return stock
