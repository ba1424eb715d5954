"""
When Feature Choice has brought most of what it brings, told from the training losses alone.

Features learn fast under Feature Choice, but at the end Mutual Choice explains more. SAELens' own
trainers do not tell the SAE how long they will train, so there Feature Choice must end by itself.
The loss falls about like a power of the step. The exponent is large while the features find their
tokens, and becomes smaller afterwards. Feature Choice ends when the exponent is clearly past its
peak and a doubling of the steps reduces the loss by less than 30%. docs/experiments.md compares that
with a switch after a quarter of the training.
"""

import math
from collections.abc import Sequence

# The first steps, in which the optimizer gathers momentum, say nothing.
FIRST_STEP = 16
WINDOWS_PER_DOUBLING = 3
# So many windows end after 16 million steps.
MAX_WINDOWS = 60

# Exponents of the loss over the step. While the peak is below the first, as in a long warm-up of the
# learning rate, the features have not begun to learn, and the exponents are noise.
LEARNING_EXPONENT = 0.1
SETTLED_EXPONENT = 0.5
SETTLED_SHARE_OF_PEAK = 0.75


def window_start(window: int) -> int:
    """The first step of a window. Windows follow each other, and grow by a quarter each."""
    return round(FIRST_STEP * 2 ** (window / WINDOWS_PER_DOUBLING))


def has_settled(losses: Sequence[float]) -> bool:
    """
    Whether Feature Choice should end.

    Args:
        losses: Mean loss of each window so far.
    """
    exponents = [
        math.log2(before / after) if before > 0 and after > 0 else 0.0
        for before, after in zip(losses, losses[WINDOWS_PER_DOUBLING:], strict=False)
    ]
    if len(exponents) < 2:
        return False
    *earlier, last = exponents
    peak = max(earlier)
    settled = min(SETTLED_EXPONENT, SETTLED_SHARE_OF_PEAK * peak)
    return peak > LEARNING_EXPONENT and last < settled
