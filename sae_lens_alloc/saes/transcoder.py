"""Transcoders: what an SAE does, with another output than its input (docs/transcoders.md)."""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import nn
from typing_extensions import override

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.initial_weights import initial_decoder, initial_encoder
from sae_lens_alloc.saes.skip_connection import with_past
from sae_lens_alloc.saes.transcoder_config import TranscoderTrainingConfig
from sae_lens_alloc.saes.transcoder_start import (
    CentredInputs,
    add_input_mean,
    start_transcoder,
)


class TrainingTranscoder(CentredInputs, AllocationTrainingSAE[Any]):
    """
    Training transcoder whose batch shares one budget of token-feature pairs. It is trained as the
    SAE of the same rule, whose class follows in the bases: the features of x reconstruct y.

    Training takes rows [x, y] of shape (..., d_in + d_out). Everything else takes x alone:
    `encode`, and `forward`, which gives the reconstruction of y. It is saved as a stock
    `jumprelu_transcoder`, or `jumprelu_skip_transcoder` with a skip connection.

    Weights: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_out), b_dec (d_out,) and, with a
    skip connection, W_skip (d_out, d_in), which starts at zero. The buffer `input_mean` (d_in,) is
    subtracted from the inputs. The first training step measures it, and b_dec's start
    (`saes/transcoder_start.py`).
    """

    W_skip: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        cfg: TranscoderTrainingConfig = self.cfg
        where: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # no transpose of the decoder, which lives in another space
        W_dec = initial_decoder(torch.empty(cfg.d_sae, cfg.d_out, **where), cfg)
        W_enc = initial_encoder(torch.empty(cfg.d_sae, cfg.d_in, **where), cfg)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_enc.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **where))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **where))
        add_input_mean(self)
        if cfg.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **where))

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        # as SAELens' transcoders, which do not subtract b_dec
        inputs = self.hook_sae_input(sae_in.to(self.dtype))
        return self.without_input_mean(self.run_time_activation_norm_fn_in(inputs))

    @override
    def before_step(self, step_input: TrainStepInput) -> None:
        if step_input.n_training_steps == 0 and step_input.sae_in.numel() > 0:
            start_transcoder(self, step_input.sae_in)
        super().before_step(step_input)

    @override
    def _norm_out(self, recons: torch.Tensor) -> torch.Tensor:
        return recons  # as SAELens' transcoders: the input's normalization says nothing of y

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction of y, shape (..., d_out), from x, shape (..., d_in)."""
        return self.forward_with_activations(x)[0]

    def forward_with_activations(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` gives, and the feature activations, shape (..., d_sae)."""
        feature_acts = self.encode(x)
        return with_past(self, self.decode(feature_acts), x), feature_acts

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(
        self, scaling_factor: float | Sequence[float]
    ) -> None:
        """
        Makes a transcoder of scaled activations one of the activations themselves.

        Args:
            scaling_factor: What inputs and outputs were multiplied by: one number for both, or
                one for each.
        """
        if isinstance(scaling_factor, Sequence):
            of_input, of_output = scaling_factor
        else:
            of_input = of_output = scaling_factor
        super().fold_activation_norm_scaling_factor(of_output)
        # which has multiplied the encoder by the factor of the output
        self.W_enc.data *= of_input / of_output
        if self.cfg.center_inputs:
            self.input_mean *= 1 / of_input
        if self.cfg.skip_connection:
            self.W_skip.data *= of_input / of_output
