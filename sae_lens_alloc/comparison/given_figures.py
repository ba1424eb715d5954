"""SAEs that one already has, measured on the same text: as saved, and at equal L0."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.util import get_special_token_ids

from sae_lens_alloc.activations.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.activations.text_store import open_text, read_contexts
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.evaluation.on_contexts import OnContexts
from sae_lens_alloc.evaluation.report_run import AtEqualL0, ReportRun, read_history
from sae_lens_alloc.evaluation.snippets import Snippet
from sae_lens_alloc.progress import announced
from sae_lens_alloc.saes.reference_transcoders import TopKTranscoder
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.thresholds.operating_point import at_l0
from sae_lens_alloc.training.run_folders import METRICS_FILENAME

# An SAE that keeps its rule is at equal L0 if it is so near.
NEAR = 0.05


@dataclass(frozen=True, eq=False)
class GivenFigures:
    """
    Figures of some SAEs on the same text.

    Args:
        as_saved: One for each SAE.
        equal_l0: The same SAEs at equal L0, None if that was not asked for.
        snippets: Parts of the text to show.
    """

    as_saved: Sequence[ReportRun]
    equal_l0: AtEqualL0 | None
    snippets: Sequence[Snippet]


@torch.no_grad()
def measure_given_saes(
    saes: Mapping[str, SAE[Any]],
    cfg: LanguageModelSAERunnerConfig[Any],
    n_tokens: int,
    at_equal_l0: bool = False,
    target_l0: float | None = None,
) -> GivenFigures:
    """
    Measures SAEs on the first contexts of a text. For equal L0, thresholds are set on every other
    context, and the figures are those of the contexts between them.

    Args:
        saes: Inference SAEs of the same activations, by name. Their thresholds may be changed.
        cfg: The run whose language model and text are read.
        n_tokens: Tokens to measure on, special ones included, in whole contexts.
        at_equal_l0: Whether to measure them at equal L0, too.
        target_l0: Features per token there. None for the smallest that one of the SAEs has; of
            topk SAEs, if there are any, since they keep their rule.

    Raises:
        ValueError: if the language model does not fit, or the text is too short.
    """
    model: Any = load_language_model(cfg)
    check_language_model(model, cfg)
    store = open_text(model, cfg)
    contexts = read_contexts(store, n_tokens * (2 if at_equal_l0 else 1))
    if at_equal_l0 and len(contexts) < 2:
        raise ValueError(
            f"{store.dataset_name} has not two contexts of {store.context_size} tokens, one to "
            "set thresholds and one to measure: give more text."
        )
    tokenizer = getattr(model, "tokenizer", None)
    special = get_special_token_ids(tokenizer) if tokenizer else []
    step = 2 if at_equal_l0 else 1
    measured = OnContexts(store, cfg, contexts[::step], special)
    as_saved = [
        ReportRun(name, measured.measure(sae), settings=_settings(sae))
        for name, sae in saes.items()
    ]
    equal_l0 = None
    if at_equal_l0:
        setting = OnContexts(store, cfg, contexts[1::2], special)
        if target_l0 is None:
            target_l0 = common_l0(saes, as_saved)
        equal_l0 = _at_equal_l0(saes, as_saved, target_l0, setting, measured)
    return GivenFigures(as_saved, equal_l0, measured.snippets())


def common_l0(saes: Mapping[str, SAE[Any]], as_saved: Sequence[ReportRun]) -> float:
    """
    The L0 that all SAEs can be brought to: the smallest one, since fewer features than an SAE has
    can always be had. The rule of topk SAEs gives theirs.

    Raises:
        ValueError: if no feature is active.
    """
    active = {run.name: run.evaluation.l0 for run in as_saved if run.evaluation.l0 > 0}
    fixed = [l0 for name, l0 in active.items() if _keeps_its_rule(saes[name])]
    if not active:
        raise ValueError("no SAE activates a feature on this text: give other text.")
    return min(fixed or active.values())


def history_of(folder: str) -> list[dict[str, float]]:
    """The training metrics in the folder of an SAE, empty if there are none that can be read."""
    path = Path(folder) / METRICS_FILENAME
    try:
        return read_history(path) if path.is_file() else []
    except json.JSONDecodeError:
        return []


def _at_equal_l0(
    saes: Mapping[str, SAE[Any]],
    as_saved: Sequence[ReportRun],
    target_l0: float,
    setting: OnContexts,
    measured: OnContexts,
) -> AtEqualL0:
    runs: list[ReportRun] = []
    left_out: dict[str, str] = {}
    for run in as_saved:
        sae = saes[run.name]
        if _keeps_its_rule(sae):
            if abs(run.evaluation.l0 - target_l0) <= NEAR * target_l0:
                runs.append(run)
            else:
                left_out[run.name] = (
                    f"its rule gives every token {run.evaluation.l0:.2f} features; "
                    "`sae-lens-alloc calibrate` makes an SAE with thresholds of it."
                )
            continue
        try:
            encoded, _ = encoded_and_target(sae.cfg, setting.activations)
            with announced("setting the thresholds"):
                moved = at_l0(sae, encoded.to(sae.device, sae.dtype), target_l0)
            moved.turn_off_forward_pass_hook_z_reshaping()
            runs.append(ReportRun(run.name, measured.measure(moved)))
        except ValueError as error:
            left_out[run.name] = f"{as_reason(error)}."
    return AtEqualL0(target_l0, runs, left_out)


def _keeps_its_rule(sae: SAE[Any]) -> bool:
    return isinstance(sae, TopKSAE | TopKTranscoder)


def _settings(sae: SAE[Any]) -> dict[str, str]:
    cfg = sae.cfg
    settings = {
        "architecture": cfg.architecture(),
        "trained as": cfg.metadata.training_architecture,
        "features": f"{cfg.d_sae:,}",
        "dtype": cfg.dtype,
    }
    return {name: str(value) for name, value in settings.items() if value}
