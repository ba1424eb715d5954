"""What is known of a saved SAE without measuring anything: figures, calibration, densities."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file

from sae_lens_alloc.evaluation.figures import FIGURES_FILENAME
from sae_lens_alloc.evaluation.usage import log_spaced
from sae_lens_alloc.saes.saved_sae import number_or_none, read_json_mapping

# Where an SAE has been measured on several texts, the first of these counts.
MEASURED_ON = {
    "test": "test text",
    "validation": "validation text",
    "held_out": "held-out text",
}
# SAELens adds it to a density before it takes the logarithm.
LOG_OFFSET = 1e-10


@dataclass(frozen=True)
class KnownFigures:
    """
    Figures of a saved SAE. None is not known.

    Args:
        l0: Features per token.
        explained_variance: Share of the variance of the activations.
        dead_features: Features active on no token.
        n_tokens: Tokens that these were measured on.
        text: What these tokens are.
        ce_recovered: Share of the next-token loss added by mean ablation that the SAE recovers.
    """

    l0: float | None = None
    explained_variance: float | None = None
    dead_features: int | None = None
    n_tokens: int | None = None
    text: str = ""
    ce_recovered: float | None = None


# Points of a curve: ranks from 1 on, and the share of tokens for each.
Curve = tuple[list[int], list[float]]


def known_figures(sae: SAE[Any], folder: Path) -> KnownFigures:
    """
    The figures that `train`, `compare` or `calibrate` has left in the folder of an SAE or in its
    metadata.
    """
    for split, text in MEASURED_ON.items():
        measured = _measured(folder, split)
        if measured is not None:
            return _figures(measured, text)
    metadata = sae.cfg.metadata
    calibration = metadata.calibration or {}
    if "l0_held_out_after" in calibration:  # by `calibrate`
        names = {
            "l0": "l0_held_out_after",
            "explained_variance": "ev_held_out_after",
            "dead_features": "dead_held_out_after",
        }
        known = {name: calibration.get(key) for name, key in names.items()}
        known["n_tokens"] = calibration.get("n_tokens")
        return _figures(known, "tokens that did not set the thresholds")
    return _figures(metadata.held_out or {}, "held-out tokens")


def known_curve(folder: Path) -> Curve | None:
    """The densities of an SAE by rank, as measured or, if they were not, of its training."""
    for split in MEASURED_ON:
        measured = _measured(folder, split) or {}
        curve, n_tokens = measured.get("density_curve"), measured.get("n_tokens")
        if curve and n_tokens:
            return curve["ranks"], [count / n_tokens for count in curve["firings"]]
    path = folder / SPARSITY_FILENAME
    if not path.is_file():
        return None
    log_densities = load_file(path)["sparsity"].double()
    densities = (10**log_densities - LOG_OFFSET).sort(descending=True).values
    ranks = log_spaced(int((densities > LOG_OFFSET).sum()))
    return ranks.tolist(), densities[ranks - 1].tolist()


def calibration_in_words(sae: SAE[Any]) -> str | None:
    """What set the thresholds of an SAE, in sentences. None if it is not known."""
    found: Mapping[str, Any] = sae.cfg.metadata.calibration or {}
    target, n_tokens = (
        number_or_none(found.get(key)) for key in ("target_l0", "n_tokens")
    )
    before, after = (
        number_or_none(found.get(key, found.get(by_calibrate)))
        for key, by_calibrate in (("l0_before", "l0_before"), ("l0", "l0_after"))
    )
    if target is None or n_tokens is None:
        return None
    text = (
        f"The thresholds were set for {target:g} features per token on {n_tokens:,.0f} "
        "tokens of text."
    )
    if found.get("per_feature"):
        text += " One factor moved the densities of all features."
    if before is not None and after is not None:
        text += f" Features per token there: {before:.2f} before, {after:.2f} after."
    return text


def _measured(folder: Path, split: str) -> dict[str, Any] | None:
    path = folder / FIGURES_FILENAME.format(split=split)
    return read_json_mapping(path) if path.is_file() else None


def _figures(measured: Mapping[str, Any], text: str) -> KnownFigures:
    def number(name: str) -> float | None:
        value = measured.get(name)
        return 0 if value == 0 else number_or_none(value)

    dead, n_tokens = number("dead_features"), number("n_tokens")
    return KnownFigures(
        l0=number("l0"),
        explained_variance=number("explained_variance"),
        dead_features=None if dead is None else int(dead),
        n_tokens=None if n_tokens is None else int(n_tokens),
        text=text,
        ce_recovered=number("ce_recovered_mean"),
    )
