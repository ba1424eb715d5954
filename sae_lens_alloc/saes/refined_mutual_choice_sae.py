"""Mutual Choice with refinement: the encoder sees its input a second time (docs/method.md)."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_mutual_choice
from sae_lens_alloc.ops.encode_thresholds import encode_thresholds
from sae_lens_alloc.saes.auxiliary_loss import require
from sae_lens_alloc.saes.mutual_choice_sae import (
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.reconstruction import Weights, reconstruct
from sae_lens_alloc.saes.refined_jumprelu_sae import (
    RefinedJumpReLUSAE,
    RefinedJumpReLUSAEConfig,
)
from sae_lens_alloc.saes.refinement import (
    REFINEMENT,
    require_refinement,
    unexplained_share,
)
from sae_lens_alloc.saes.running_statistics import Derived, StepTotals
from sae_lens_alloc.saes.step_plan import FirstPass, StepPlan


@dataclass
class RefinedMutualChoiceTrainingSAEConfig(MutualChoiceTrainingSAEConfig):
    """
    Configuration class for training a RefinedMutualChoiceTrainingSAE.

    Args:
        refinement (float): Share of what the first pass left unexplained that is added to the
            input of the second pass, in (0, 1].
        k (float): Average number of active features per token. The other fields are those of
            MutualChoiceTrainingSAEConfig.
    """

    refinement: float = REFINEMENT

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_refinement(self.refinement)
        require(
            self.topk_steps == 0,
            "topk_steps",
            self.topk_steps,
            "0 for refined_mutual_choice, whose first pass would not be TopK",
        )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "refined_mutual_choice"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return RefinedJumpReLUSAEConfig


# The running cut of the first passes, scalar; 0 before there was one.
FIRST_CUT = "first_cut"


@dataclass
class _FirstGuess:
    """Whether there is a cut of earlier steps, which makes a selection faster and changes nothing of it."""

    is_there: bool = False


class RefinedMutualChoiceTrainingSAE(MutualChoiceTrainingSAE):
    """
    Mutual Choice SAE that encodes twice. The k * B largest affinities of a batch are active in a
    first pass. The second pass encodes the inputs moved towards what these left unexplained, and
    it alone is the SAE: its pairs are active, learn, and make thresholds and densities. While
    Feature Choice allocates there is one pass.

    Outside of a training step the first pass goes by one threshold, the running cut of the first
    passes of the training. Saved as a RefinedJumpReLUSAE.
    """

    cfg: RefinedMutualChoiceTrainingSAEConfig  # type: ignore[assignment]

    def __init__(
        self, cfg: RefinedMutualChoiceTrainingSAEConfig, use_error_term: bool = False
    ):
        super().__init__(cfg, use_error_term)
        start = torch.zeros_like(self.allocation.cut)
        self.allocation.register_buffer(FIRST_CUT, start)
        self._first_totals = StepTotals()
        self._first_guess = Derived(self.allocation, _FirstGuess)

    @property
    def first_cut(self) -> torch.Tensor:
        """Threshold of the first pass, of shape (), 0 before there was one."""
        return self.allocation.get_buffer(FIRST_CUT)

    @override
    def first_inputs(self, sae_in: torch.Tensor) -> torch.Tensor:
        return super().process_sae_in(sae_in)

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """The inputs of the second pass, shape (..., d_in), by the threshold of the first one."""
        inputs, cut = self.first_inputs(sae_in), self.first_cut
        if not cut > 0:  # there was no first pass yet
            return inputs
        thresholds = cut.expand(self.cfg.d_sae)
        encoder, x = self.encoder(), inputs.reshape(-1, self.cfg.d_in)
        pairs = encode_thresholds(encoder, x, thresholds)
        return self.second_inputs(encoder, inputs, pairs)

    @override
    def first_pass(
        self, encoder: Encoder, x: torch.Tensor, plan: StepPlan
    ) -> FirstPass | None:
        if plan.rule != "mutual":
            return None
        known = self._first_guess.get()
        if not known.is_there:
            known.is_there = bool(self.first_cut > 0)
        guess = self.first_cut if known.is_there else None
        pairs = encode_mutual_choice(encoder, x, plan.budget, guess, self.shard)
        if not plan.continues:
            self._first_totals.begin({FIRST_CUT: self.first_cut})
        self.allocation.follow(FIRST_CUT, self._first_totals, pairs, len(x))
        return FirstPass(pairs, x)

    @override
    def second_inputs(
        self, encoder: Encoder, inputs: torch.Tensor, first: Pairs
    ) -> torch.Tensor:
        # the first pass learns from what it reconstructs alone
        with torch.no_grad():
            x = inputs.reshape(-1, self.cfg.d_in)
            weights = Weights(
                self.W_enc, self.b_enc, self.W_dec, ranks=self.shard.ranks
            )
            (recons,), _ = reconstruct(weights, encoder, x, [first])
            share = unexplained_share(
                inputs,
                recons.view(inputs.shape),
                first.token_counts().view(inputs.shape[:-1]) > 0,
                None if self.cfg.apply_b_dec_to_input else self.b_dec,
                self.cfg.refinement,
            )
        return inputs + share

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            self.first_cut.div_(scaling_factor)

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        cut = self.first_cut
        first = torch.where(cut > 0, cut, torch.inf).expand(self.cfg.d_sae)
        state_dict["first_threshold"] = first.clone()

    @torch.no_grad()
    def stock_form(self) -> JumpReLUSAE:
        """The stock JumpReLU SAE that it is saved with, a copy."""
        saved = SAE.from_dict(self.cfg.get_inference_sae_cfg_dict())
        assert isinstance(saved, RefinedJumpReLUSAE)
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        saved.load_state_dict(state)
        return saved.stock_form()
