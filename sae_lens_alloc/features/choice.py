"""Features chosen by number: "0-99,512"."""

import re

import torch


def chosen_features(text: str | None, d_sae: int) -> torch.Tensor:
    """
    The features that a text names.

    Args:
        text: Numbers and ranges, their ends included, with commas between; None for all features.
        d_sae: Number of features of the SAE.

    Returns:
        Numbers of features, int64 of shape (n,), ascending and each once.

    Raises:
        ValueError: if the text is something else, or names a feature that the SAE does not have.
    """
    if text is None:
        return torch.arange(d_sae)
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(
                f"--features is {text!r}, but must be numbers and ranges with commas between, "
                "such as 0-99,512."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(
                f"--features names the range {part.strip()}, whose end comes before its start."
            )
        if last >= d_sae:
            raise ValueError(
                f"--features names feature {last}, but the features of this SAE are 0 to "
                f"{d_sae - 1}."
            )
        chosen.update(range(first, last + 1))
    return torch.tensor(sorted(chosen))
