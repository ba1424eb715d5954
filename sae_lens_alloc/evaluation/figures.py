"""The figures of a measured SAE as they are kept in a JSON file beside it."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sae_lens_alloc.allocation.zipf import ZipfLaw
from sae_lens_alloc.evaluation.usage import DensityCurve, Usage

# By the text that they were measured on, such as "test".
FIGURES_FILENAME = "{split}.json"
# On what a training held out, beside its SAE.
HELD_OUT_FILENAME = FIGURES_FILENAME.format(split="held_out")
VERY_RARE_DENSITY = 1e-5


def figures_of(usage: Usage, figures: Mapping[str, Any]) -> dict[str, Any]:
    """
    The figures of an SAE that are kept.

    Args:
        usage: How it spends its features.
        figures: Its figures for JSON, such as `usage.to_dict()`, with what else was measured.
    """
    curve = usage.density_curve()
    return {
        **figures,
        "very_rare_features": usage.features_rarer_than(VERY_RARE_DENSITY),
        "zipf": None
        if curve.law is None
        # JSON has no NaN, the R^2 of a flat curve
        else {k: v if math.isfinite(v) else None for k, v in asdict(curve.law).items()},
        "density_curve": {
            "ranks": curve.ranks,
            "firings": curve.firings,
            "n_fitted": curve.n_fitted,
        },
    }


def density_curve(measured: Mapping[str, Any]) -> DensityCurve:
    """The density curve in the figures of an SAE (see `figures_of`)."""
    law = measured["zipf"]
    return DensityCurve(
        **measured["density_curve"],
        n_tokens=measured["n_tokens"],
        law=None
        if law is None
        else ZipfLaw(**{k: math.nan if v is None else v for k, v in law.items()}),
    )
