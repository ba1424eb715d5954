"""What a step is measured at, and the sweeps around the centre."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

# Factors of the centre's value along each axis, one axis at a time.
SWEEPS = {
    "d_sae": (1 / 4, 1 / 2, 2, 4, 8),
    "batch": (1 / 2, 2, 4, 8),
    "k": (1 / 2, 2, 4),
}
MEMORY_LINE = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Shape:
    """
    Args:
        d_in: Width of the activations.
        d_sae: Number of features.
        k: Active features per token.
        batch: Tokens per step, B.
        aux: A tenth of the features counts as dead and learns from the auxiliary loss;
            otherwise none does, and there is nothing for it to do.
    """

    d_in: int = 768
    d_sae: int = 16384
    k: int = 32
    batch: int = 2048
    aux: bool = False

    @property
    def n_parameters(self) -> int:
        return 2 * self.d_in * self.d_sae + self.d_sae + self.d_in

    @property
    def n_dead(self) -> int:
        return self.d_sae // 10

    def scaled(self, axis: str, factor: float) -> "Shape":
        return replace(self, **{axis: int(getattr(self, axis) * factor)})

    def sweeps(self) -> Iterator["Shape"]:
        """The shapes of all sweeps, without the centre itself."""
        for axis, factors in SWEEPS.items():
            for factor in factors:
                yield self.scaled(axis, factor)

    def with_aux(self) -> "Shape":
        return replace(self, aux=True)
