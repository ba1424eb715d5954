"""
What our transcoders are compared with: SAELens' TopK and BatchTopK, with another output than their
input. SAELens itself can train neither.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import (
    SAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import nn
from typing_extensions import override

from sae_lens_alloc.saes.initial_weights import initial_decoder, initial_encoder
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.transcoder_start import (
    CentredInputs,
    add_input_mean,
    start_transcoder,
)


@dataclass
class TopKTranscoderConfig(TranscoderConfig):
    """A transcoder with k features for each token, which SAELens does not have."""

    k: int = 100

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"


class TopKTranscoder(Transcoder):
    """A transcoder with k features for each token. Its decoder norms are folded in."""

    cfg: TopKTranscoderConfig  # type: ignore[assignment]

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return TopK(self.cfg.k)


@dataclass
class TopKTrainingTranscoderConfig(TopKTrainingSAEConfig):
    """SAELens' TopK with an output of `d_out` dimensions."""

    d_out: int = field(kw_only=True)
    center_inputs: bool = True
    apply_b_dec_to_input: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKTranscoderConfig


@dataclass
class BatchTopKTrainingTranscoderConfig(BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopK with an output of `d_out` dimensions."""

    d_out: int = field(kw_only=True)
    center_inputs: bool = True
    apply_b_dec_to_input: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


class _OtherOutput(CentredInputs):
    """
    Comes behind SAELens' class in the bases, in place of what all its training SAEs share: rows
    [x, y] are trained on, with the initial weights and the start of our transcoders, so that what
    is compared is who gets the budget.
    """

    @override
    def initialize_weights(self) -> None:
        cfg = self.cfg
        W_dec = torch.empty(cfg.d_sae, cfg.d_out, device=self.device)
        W_enc = torch.empty(cfg.d_sae, cfg.d_in, device=self.device)
        W_dec, W_enc = initial_decoder(W_dec, cfg), initial_encoder(W_enc, cfg)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_enc.T.contiguous())
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, device=self.device))
        add_input_mean(self)

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        return self.without_input_mean(self.hook_sae_input(sae_in))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if step_input.n_training_steps == 0:
            start_transcoder(self, step_input.sae_in)
        x, y = encoded_and_target(self.cfg, step_input.sae_in)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
        sae_out = self.decode(feature_acts)
        auxiliary = self.calculate_aux_loss(
            replace(step_input, sae_in=y), feature_acts, hidden_pre, sae_out
        )
        assert isinstance(auxiliary, dict)
        mse_loss = self.mse_loss_fn(sae_out, y).sum(dim=-1).mean()
        losses = {"mse_loss": mse_loss, **auxiliary}
        return TrainStepOutput(
            sae_in=y,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )


class TopKTrainingTranscoder(TopKTrainingSAE, _OtherOutput):
    """
    Trains a transcoder with k features for each token. SAELens has no such class for inference,
    so that what is saved needs this package.
    """


class BatchTopKTrainingTranscoder(BatchTopKTrainingSAE, _OtherOutput):
    """
    Trains a transcoder with k features for each token on average over a batch. It is saved as
    SAELens' `jumprelu_transcoder`.
    """
