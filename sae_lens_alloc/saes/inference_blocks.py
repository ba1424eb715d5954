"""The tensors that an SAE is saved with for inference, some of its features at a time."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import nn

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.checkpoint_weights import feature_rows, is_by_feature


class InferenceBlocks:
    """
    What `save_inference_model` would save, so that no second copy of the weights is made.

    Args:
        sae: The SAE, of all features or those of this rank. Not changed.

    Raises:
        ValueError: if its weights are not finite.
    """

    def __init__(self, sae: AllocationTrainingSAE[Any]) -> None:
        sae.checks.report(wait=True)
        self._sae = sae
        # without memory: it is given views of the weights
        view = TrainingSAE.from_dict({**sae.cfg.to_dict(), "device": "meta"})
        assert isinstance(view, AllocationTrainingSAE)
        view.dtype = sae.dtype
        self._view: AllocationTrainingSAE[Any] = view

    @torch.no_grad()
    def of(self, features: slice) -> dict[str, torch.Tensor]:
        """
        Tensors by name, as in the file of the SAE, of some of the features that the SAE has
        here.
        """
        sae, view = self._sae, self._view
        for name, weight in sae.named_parameters():
            part = weight.data
            if is_by_feature(name):
                rows = feature_rows(name, part)[features]
                part = feature_rows(name, rows)
            setattr(view, name, nn.Parameter(part))
        for name, buffer in sae.named_buffers(recurse=False):  # of no feature
            setattr(view, name, buffer)
        for name in sae.allocation.by_feature:
            setattr(view.allocation, name, getattr(sae.allocation, name)[features])
        state = view.state_dict()
        view.process_state_dict_for_saving_inference(state)
        return state
