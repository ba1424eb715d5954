"""Settings that may be shares: step counts as "75%" of a training, budgets as "200%" of k."""

import re
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from sae_lens_alloc.typed_values import shown

# Step counts that may be given as a share of the training steps, such as "75%".
SHARE_KEYS = (
    "lr_warm_up_steps",
    "lr_decay_steps",
    "dead_feature_window",
    "kl_finish",
    "sae.l1_warm_up_steps",
    "sae.l0_warm_up_steps",
    "sae.feature_choice_steps",
    "sae.mutual_choice_steps",
    "sae.topk_steps",
    "sae.aux_loss_decay_start",
    "sae.k_decay_steps",
)
# May be given as a share of k, such as "200%".
BUDGET_SHARE_KEY = "sae.k_start"

T = TypeVar("T")

if TYPE_CHECKING:

    class _OrShare(Generic[T]):
        """A field of a config that reads as a number and may be written as a share, too."""

        def __get__(self, instance: Any, owner: Any) -> T: ...
        def __set__(self, instance: Any, value: T | str) -> None: ...

    Steps = _OrShare[int]
    StepsOrNone = _OrShare[int | None]
    BudgetOrNone = _OrShare[float | None]
else:
    # of these, SAELens' command line makes its options
    Steps = int
    StepsOrNone = int | None
    BudgetOrNone = float | None


def share_of(steps: int | Fraction, key: str, text: str) -> int:
    """
    The step count that a share means, rounded down.

    Args:
        steps: All steps of the training, not rounded, so that shares of them are exact.
        key: The setting, for the error.
        text: The share, such as "75%".

    Raises:
        ValueError: if it is none from "0%" to "100%".
    """
    share = _percentage(text)
    if share is None or not 0 <= share <= 1:
        raise ValueError(
            f"{key} must be a number of steps or a share of them from '0%' to '100%', "
            f"got {shown(text)}."
        )
    return int(share * steps)


def multiple_of_k(k: float, key: str, text: str) -> float:
    """
    The number of features that a share of k means.

    Raises:
        ValueError: if it is no share from "100%" on.
    """
    share = _percentage(text)
    if share is None or share < 1:
        raise ValueError(
            f"{key} must be a number of features or a share of k from '100%' on, got "
            f"{shown(text)}."
        )
    return float(share * Fraction(str(k)))


def shares_of_sae(sae: Any) -> dict[str, str]:
    """The fields of an SAE's config that are still shares of the training, by name."""
    names = [key.removeprefix("sae.") for key in SHARE_KEYS if key.startswith("sae.")]
    values = {name: getattr(sae, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def check_shares(sae: Any) -> None:
    """Raises ValueError if a share in an SAE's config is none."""
    for name, text in shares_of_sae(sae).items():
        share_of(1, name, text)


def require_step_counts(sae: Any) -> None:
    """Raises ValueError if an SAE's config has shares of a training that nobody told the length of."""
    for name, text in shares_of_sae(sae).items():
        raise ValueError(
            f"{name} is {text!r}, a share of the training, whose length SAELens' own trainers do "
            "not tell an SAE: give a number of steps, or train with AllocSAETrainingRunner or "
            "AllocSAETrainer."
        )


def sae_with_step_counts(sae: T, steps: int | Fraction) -> T:
    """An SAE's config with step counts for shares, the config itself if it has none."""
    shares = shares_of_sae(sae)
    if not shares:
        return sae
    counts = {name: share_of(steps, name, text) for name, text in shares.items()}
    with_counts: Any = replace(cast(Any, sae), **counts)
    return with_counts


def settle_shares(run: Any, steps: int | Fraction) -> None:
    """Puts step counts for shares in the config of a run or a trainer, not in its SAE's."""
    for key in SHARE_KEYS:
        value = getattr(run, key, None)
        if isinstance(value, str):
            setattr(run, key, share_of(steps, key, value))


def steps_of(tokens: Any, batch_size: Any) -> Fraction:
    """
    Steps of a training, not rounded; 0 where one of the numbers is none, which is found later.

    Args:
        tokens: Tokens to train on.
        batch_size: Tokens of a step.
    """
    try:
        return Fraction(tokens) / Fraction(batch_size)
    except (TypeError, ValueError, ArithmeticError):
        return Fraction(0)


def _percentage(text: str) -> Fraction | None:
    """The number of a text such as "75%", None if it is no percentage."""
    number = re.fullmatch(r"\s*([-+]?\d{1,9}(\.\d{0,9})?)\s*%\s*", text, re.ASCII)
    return None if number is None else Fraction(number[1]) / 100
