"""Checkpoints opened by `SAE.load_from_disk` and `SAE.from_pretrained`, as SAEs for inference."""

from functools import partial
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig


class CheckpointForInference(SAE[Any]):
    """
    What SAELens makes of the checkpoint of an architecture that exists only for training: the
    inference SAE that the training SAE would be saved as, with the same activations and
    reconstructions. It is of SAELens' own class, such as JumpReLUSAE, and is saved as such.
    """

    def __new__(cls, cfg: TrainingSAEConfig, use_error_term: bool = False) -> Any:  # noqa: ARG004
        # of another class, so that __init__ is not called
        sae = SAE.from_dict(cfg.get_inference_sae_cfg_dict())
        # SAELens calls it with the tensors of the file, before it takes them
        sae.process_state_dict_for_loading = partial(_for_inference, sae, cfg)
        return sae


def _for_inference(
    sae: SAE[Any], cfg: TrainingSAEConfig, state_dict: dict[str, torch.Tensor]
) -> None:
    """Turns the tensors of a checkpoint into those of the inference SAE, once."""
    del sae.process_state_dict_for_loading
    settings = {**cfg.to_dict(), "device": sae.cfg.device}
    trained = TrainingSAE.load_from_disk(
        "", sae.cfg.device, converter=lambda *_, **__: (settings, dict(state_dict))
    )
    tensors = trained.state_dict()
    trained.process_state_dict_for_saving_inference(tensors)
    state_dict.clear()
    state_dict.update(tensors)


def register_checkpoints(config_class: type[TrainingSAEConfig]) -> None:
    """Lets `SAE.load_from_disk` open checkpoints of an architecture that is only for training."""
    name = config_class.architecture()
    if name not in SAE_CLASS_REGISTRY:
        register_sae_class(name, CheckpointForInference, config_class)
