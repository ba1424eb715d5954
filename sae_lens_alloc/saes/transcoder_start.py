"""
Where the training of a transcoder starts: at the means of its inputs and its outputs.

Inputs of an MLP have a mean that is about as long as what they differ from it by. An SAE learns to
subtract it: b_dec is near the mean, and is subtracted from the inputs. A transcoder has no such
weight. Its affinities would have a part that is the same for all tokens, by which some features are
ahead of all others and many are never active. So the mean of the inputs is measured once and
subtracted. What is saved has it in b_enc, as stock transcoders have no place for it.
"""

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.skip_connection import with_past
from sae_lens_alloc.saes.weight_names import INPUT_MEAN


class CentredInputs(TrainingSAE[Any]):
    """
    What a transcoder of inputs without their mean keeps in its files, whoever gets its budget. Its
    config has `center_inputs`.
    """

    input_mean: torch.Tensor

    def without_input_mean(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encoder inputs of shape (..., d_in) as they are encoded."""
        return inputs - self.input_mean if self.cfg.center_inputs else inputs

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        fold_input_mean(state_dict)
        super().process_state_dict_for_saving_inference(state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        require_input_mean(self, state_dict)


@torch.no_grad()
def start_transcoder(sae: TrainingSAE[Any], rows: torch.Tensor) -> None:
    """
    Takes the start from the first batch of a training. A transcoder that was trained before stays
    what it is. The device is asked nothing: not whether there is a start already, nor whether the
    batch is finite, which the step reports.

    Args:
        sae: The transcoder.
        rows: The batch, shape (..., d_in + d_out).
    """
    x, y = encoded_and_target(sae.cfg, rows)
    left = y - with_past(sae, torch.zeros_like(y), x)
    sae.b_dec.add_(_mean_if(~sae.b_dec.any(), left, sae.b_dec))
    if sae.cfg.center_inputs:
        known = sae.get_buffer(INPUT_MEAN)
        mean = _mean_if(~known.any(), sae.process_sae_in(x), known)
        known += mean
        b_enc = sae.get_parameter("b_enc")
        b_enc += (mean @ sae.W_enc).where(b_enc.any(), 0.0)


def add_input_mean(sae: TrainingSAE[Any]) -> None:
    """
    Gives a new transcoder a mean of 0, shape (d_in,), which checkpoints keep. Not where its config
    leaves the mean in the inputs.
    """
    if not sae.cfg.center_inputs:
        return
    zeros = torch.zeros(sae.cfg.d_in, dtype=sae.dtype, device=sae.device)
    sae.register_buffer(INPUT_MEAN, zeros)


@torch.no_grad()
def fold_input_mean(state_dict: dict[str, Any]) -> None:
    """Makes the weights of a state dict those of inputs as they are: b_enc - mean W_enc."""
    mean: torch.Tensor | None = state_dict.pop(INPUT_MEAN, None)
    if mean is None:
        return
    b_enc: torch.Tensor = state_dict["b_enc"]
    shift = _precise(mean) @ _precise(state_dict["W_enc"])
    state_dict["b_enc"] = (_precise(b_enc) - shift).to(b_enc.dtype)


def require_input_mean(sae: TrainingSAE[Any], state_dict: dict[str, Any]) -> None:
    """Gives the state dict of a transcoder of earlier versions, which subtracted none, a mean of 0."""
    if sae.cfg.center_inputs:
        zeros = torch.zeros_like(sae.get_buffer(INPUT_MEAN))
        state_dict.setdefault(INPUT_MEAN, zeros)


def _mean_if(
    wanted: torch.Tensor, vectors: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """The mean of vectors of shape (..., d), or 0 where it is not wanted or not finite."""
    mean = _precise(vectors).reshape(-1, vectors.shape[-1]).mean(0).to(like)
    return mean.where(wanted & mean.isfinite().all(), 0.0)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
