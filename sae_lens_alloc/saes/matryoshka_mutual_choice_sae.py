"""Mutual Choice with nested reconstructions (arXiv 2503.17547)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from typing_extensions import override

from sae_lens_alloc.saes.auxiliary_loss import require
from sae_lens_alloc.saes.mutual_choice_sae import (
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)


@dataclass
class MatryoshkaMutualChoiceTrainingSAEConfig(MutualChoiceTrainingSAEConfig):
    """
    Configuration class for training a MatryoshkaMutualChoiceTrainingSAE.

    Args:
        matryoshka_widths (list[int]): Widths of the levels, ascending. The first features up
            to each width must reconstruct the activations without the others; d_sae, the
            last level, may be left out.
        feature_choice_steps (int | None): Inherited from MutualChoiceTrainingSAEConfig, with
            half of the training in the recipe instead of a quarter.
        k (float): Average number of active features per token. The other fields are
            described in AllocationTrainingSAEConfig.
    """

    matryoshka_widths: list[int] = field(default_factory=list)

    feature_choice_share: ClassVar[float] = 1 / 2

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        widths = [0, *self.inner_widths(), self.d_sae]
        require(
            len(widths) > 2
            and all(low < high for low, high in zip(widths, widths[1:], strict=False)),
            "matryoshka_widths",
            self.matryoshka_widths,
            f"ascending widths between 1 and d_sae = {self.d_sae}, at least one below "
            "d_sae, or there is nothing to nest",
        )

    def inner_widths(self) -> list[int]:
        """Widths of the levels without the last, which is all features."""
        widths = list(self.matryoshka_widths)
        return widths[:-1] if widths[-1:] == [self.d_sae] else widths

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_mutual_choice"


class MatryoshkaMutualChoiceTrainingSAE(MutualChoiceTrainingSAE):
    """
    Mutual Choice SAE whose first features must reconstruct the activations by themselves, at
    several widths: general features come first and are not absorbed by special ones
    (arXiv 2503.17547). The batch is allocated once, and every level reconstructs from its
    part of the active pairs, as in SAELens' matryoshka_batchtopk.
    """

    cfg: MatryoshkaMutualChoiceTrainingSAEConfig  # type: ignore[assignment]

    @override
    def inner_widths(self) -> Sequence[int]:
        return self.cfg.inner_widths()
