"""Running densities of the features, and the flags of those that the auxiliary loss trains."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from typing_extensions import override

from sae_lens_alloc.allocation.density import (
    fit_floor,
    underused_features,
    update_density,
)
from sae_lens_alloc.allocation.zipf import MIN_FEATURES, FittedLaw, ZipfLaw
from sae_lens_alloc.compat import ModuleOfKeptDtypes
from sae_lens_alloc.ops.topk_selection import FlaggedFeatures

# Densities move slowly, and ranking them takes time: once in so many steps.
STEPS_BETWEEN_FLAGS = 10

T_TOTAL = TypeVar("T_TOTAL", torch.Tensor, float, int)


def kept_in_place(kept: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """
    The tensor that keeps a value: the old one with the new value, or a first one. What outlives
    a step stays at its address, as a CUDA graph needs it.
    """
    return value.clone() if kept is None else kept.copy_(value)


class StepTotals:
    """
    Sums over the calls of one training step.

    Attributes:
        start: The running statistics as they were before the step, by name, kept in place.
    """

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self._sums: dict[str, Any] = {}

    def begin(self, statistics: Mapping[str, torch.Tensor]) -> None:
        """Begins a step at the given running statistics."""
        self._sums.clear()
        for name, value in statistics.items():
            self.start[name] = kept_in_place(self.start.get(name), value)

    def add(self, name: str, value: T_TOTAL) -> T_TOTAL:
        """Adds what a call has found, and returns the sum over the calls so far."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        return self._sums[name]


class DensityState(ModuleOfKeptDtypes):
    """
    How often each feature fires and which ones the auxiliary loss trains: what a checkpoint
    needs besides the weights. All of it stays float32 whatever the dtype of the SAE.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        device: Device of the buffers.
    """

    # the buffers that every call of a step moves anew from where the step began
    tracked: ClassVar[tuple[str, ...]] = ("density", "density_tokens")
    # those that checkpoints of earlier versions do not have
    added_later: ClassVar[tuple[str, ...]] = ()
    continues_step: bool = False

    density: torch.Tensor  # (F,) running rate per token at which each feature fires
    density_tokens: torch.Tensor  # () tokens in the running densities
    n_steps: torch.Tensor  # () training steps done
    underused: torch.Tensor  # (F,) features that the auxiliary loss trains

    def __init__(
        self, d_sae: int, density_window_tokens: int, device: torch.device
    ) -> None:
        super().__init__()
        self.density_window_tokens = density_window_tokens
        self.register_buffer("density", torch.zeros(d_sae, device=device))
        for name in ("density_tokens", "n_steps"):
            self.register_buffer(name, torch.zeros((), device=device))
        self.register_buffer(
            "underused", torch.zeros(d_sae, dtype=torch.bool, device=device)
        )
        self._forget_derived()
        self.register_load_state_dict_post_hook(_forget_derived_after_loading)

    def _forget_derived(self) -> None:
        """Drops what is derived from the buffers, or only makes a step faster."""
        self._step_offset: int | None = None
        self._running_step: int | None = None
        self._totals = StepTotals()
        self._flagged: FlaggedFeatures | None = None

    @override
    def after_moving(self) -> None:
        self._forget_derived()

    def begin_step(self, n_training_steps: int) -> int:
        """
        The number of this training step, by which rules, budgets and flags change.

        SAELens saves the checkpoints of a run before it counts the step, so that a resumed
        trainer counts one behind; from there on the SAE's own count holds. A trainer that
        starts at 0 starts the schedules anew.

        A step is all the calls in a row with the same `n_training_steps`: more than one where
        gradients are accumulated over parts of a batch. `continues_step` is true from the
        second of them on. What happens once a step, such as a change of rule, happens at the
        first; running statistics are, after each call, what one call with all the tokens of
        the step so far would have made of them.
        """
        if self._step_offset is None:
            behind = int(self.n_steps) - n_training_steps
            self._step_offset = behind if n_training_steps > 0 and behind > 0 else 0
        step = n_training_steps + self._step_offset
        self.continues_step = step == self._running_step
        self._running_step = step
        self.n_steps.fill_(step + 1)
        return step

    @property
    def last_step(self) -> int:
        """The number of the last training step, 0 before the first one."""
        return max(int(self.n_steps) - 1, 0)

    def begin_totals(self) -> None:
        """Starts the sums over the calls of a step from the statistics as they are now."""
        self._totals.begin({name: getattr(self, name) for name in self.tracked})

    def update_density(self, counts: torch.Tensor, n_tokens: int) -> None:
        """
        Averages the tokens of a call into the running densities, together with those of the
        calls of the same step before it.

        Args:
            counts: Tokens of the call on which each feature fired, shape (F,).
            n_tokens: Tokens in the call.
        """
        totals = self._totals
        for name in ("density", "density_tokens"):
            getattr(self, name).copy_(totals.start[name])
        update_density(
            self.density,
            self.density_tokens,
            totals.add("counts", counts),
            totals.add("n_tokens", n_tokens),
            self.density_window_tokens,
        )

    def fit_law(self, n_tokens: int) -> ZipfLaw | None:
        """
        Zipf law of the running densities, None where too few features have fired.

        Args:
            n_tokens: Tokens per batch, which sets the density below which a rate is noise.
        """
        floor = fit_floor(n_tokens)
        if int((self.density > floor).sum()) < MIN_FEATURES:
            return None
        return ZipfLaw.fit(self.density, floor)

    def renew_flags(
        self,
        step: int,
        dead: torch.Tensor | None,
        fraction: float | None,
        n_tokens: int,
    ) -> bool:
        """
        At every tenth step, flags the features that the auxiliary loss trains: those below
        `fraction` of the law and the dead ones, or the dead ones only where `fraction` is
        None. The host is told nothing of it.

        Args:
            step: Number of the training step.
            dead: Boolean mask of dead features, shape (F,), or None for none.
            fraction: Share of the predicted density below which a feature is underutilised.
            n_tokens: Tokens per batch.

        Returns:
            Whether the flags were renewed.
        """
        if step % STEPS_BETWEEN_FLAGS:
            return False
        if dead is None:
            dead = torch.zeros_like(self.underused)
        law = None
        if fraction is not None:
            law = FittedLaw.fit(self.density, fit_floor(n_tokens))
        self.underused.copy_(
            underused_features(self.density, dead, law, fraction or 0.0)
        )
        self._flagged = None
        return True

    @property
    def flagged(self) -> FlaggedFeatures:
        """The features that the auxiliary loss trains, until the flags are next renewed."""
        if self._flagged is None:
            self._flagged = FlaggedFeatures(self.underused)
        return self._flagged

    def metrics(self, n_tokens: int) -> dict[str, Callable[[], torch.Tensor | float]]:
        """
        What SAELens' logger shows of the densities; computed only when a step is logged.

        Args:
            n_tokens: Tokens per batch.
        """

        @lru_cache(maxsize=1)
        def law_after(step: int | None) -> ZipfLaw | None:
            del step  # the law of one step is not that of the next
            return self.fit_law(n_tokens)

        def of_law(name: str) -> Callable[[], float]:
            return lambda: getattr(law_after(self._running_step), name, float("nan"))

        return {
            "underused_features": lambda: self.underused.sum(),
            "zipf_alpha": of_law("alpha"),
            "zipf_beta": of_law("beta"),
            "zipf_r2": of_law("r2"),
            "zipf_r2_middle": of_law("r2_middle"),
        }

    def write_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Puts the buffers into an SAE's state dict, so that they survive SAELens' loader."""
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point():
                state_dict[prefix + name] = _in_bfloat16_parts(buffer)

    def read_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Undoes `write_checkpoint` in a state dict that was loaded."""
        for name, buffer in self.named_buffers():
            key = prefix + name
            if key not in state_dict:
                if name in self.added_later:
                    state_dict[key] = buffer
                continue
            if buffer.is_floating_point():
                state_dict[key] = state_dict[key].to(buffer.dtype).sum(0)
            state_dict[key] = state_dict[key].to(buffer.dtype)


def remove_statistics(state_dict: dict[str, Any], prefix: str) -> None:
    """Takes out of a state dict what inference has no use for."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


def _forget_derived_after_loading(state: DensityState, _: Any) -> None:
    state._forget_derived()


def _in_bfloat16_parts(tensor: torch.Tensor) -> torch.Tensor:
    """
    A float32 tensor as three that sum to it, each of which bfloat16 holds exactly; shape
    (3, *shape). So it survives SAELens' loader, which casts all tensors of a file to the
    dtype of the weights.
    """
    first = tensor.bfloat16().float()
    second = (tensor - first).bfloat16().float()
    return torch.stack([first, second, tensor - first - second])
