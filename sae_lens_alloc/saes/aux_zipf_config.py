"""Configuration of aux_zipf_loss on an architecture of SAELens."""

from dataclasses import dataclass
from typing import ClassVar

from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from typing_extensions import override

from sae_lens_alloc.saes.auxiliary_loss import AuxiliaryLossTrainingSAEConfig


@dataclass
class AuxZipfTrainingSAEConfig(AuxiliaryLossTrainingSAEConfig):
    """
    What an architecture of SAELens gains by aux_zipf_loss: the fields of
    AuxiliaryLossTrainingSAEConfig. `aux_loss_coefficient` weighs aux_zipf_loss also where the
    architecture has that field for its own aux_k loss, whose place aux_zipf_loss takes.
    """

    base_config_class: ClassVar[type[TrainingSAEConfig]]

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "use_matryoshka_aux_loss", False):
            raise ValueError(
                f"use_matryoshka_aux_loss has no effect on {self.architecture()}, where "
                "aux_zipf_loss takes the place of SAELens' auxiliary loss: leave it out."
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return f"{cls.base_config_class.architecture()}_aux_zipf"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        base = self.base_config_class
        stock = TrainingSAEConfig.get_inference_config_class
        if base.get_inference_config_class is stock:
            # it looks the training architecture up among those for inference
            return get_sae_class(base.architecture())[1]
        return super().get_inference_config_class()
