"""From an SAE and a run's text to its feature page."""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.activations.names import name_for_others
from sae_lens_alloc.evaluation.snippets import Snippet, take_snippets
from sae_lens_alloc.evaluation.usage import RARE_DENSITY
from sae_lens_alloc.features.activity import Activity, measure_activity
from sae_lens_alloc.features.examples import take_examples
from sae_lens_alloc.features.figures import decoder_directions, measure_figures
from sae_lens_alloc.features.lens import find_unembedding, logit_lens
from sae_lens_alloc.features.neighbours import nearest_by_activity, nearest_by_decoder
from sae_lens_alloc.features.page import FeaturePage
from sae_lens_alloc.progress import announced

N_SNIPPETS = 6
LONGEST_SNIPPET = 256


@torch.no_grad()
def measure_features(
    sae: SAE[Any],
    cfg: LanguageModelSAERunnerConfig[Any],
    n_tokens: int,
    features: torch.Tensor,
    title: str,
) -> FeaturePage:
    """
    Runs the language model and the SAE on text, and takes from it what a page shows.

    Args:
        sae: An SAE as `load_readable_sae` gives it.
        cfg: The run whose language model and text are read.
        n_tokens: Tokens of text, special ones included.
        features: Features to show, int64 of shape (n,).
        title: Name of the SAE.

    Raises:
        ValueError: if the language model cannot be loaded, does not fit the SAE or has no
            tokenizer, or as `measure_activity`.
    """
    model: Any = load_language_model(cfg)
    check_language_model(model, cfg)
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            f"{cfg.model_name} has no tokenizer, so no text can be shown: give another model."
        )
    activity = measure_activity(sae, model, cfg, n_tokens)
    directions = decoder_directions(sae)
    shown = directions[features.to(directions.device)]
    pairs = activity.of_features(features)
    unembedding = find_unembedding(
        model, cfg.hook_name, sae.cfg.d_in, cfg.hook_head_index
    )
    with announced("looking at the features"):
        figures = measure_figures(pairs)
        examples = take_examples(pairs, activity.length)
        by_decoder = nearest_by_decoder(directions, features)
        lens = (
            unembedding
            if isinstance(unembedding, str)
            else logit_lens(unembedding, shown)
        )
    return FeaturePage(
        title=title,
        facts=_facts(sae, cfg, activity),
        tokenizer=model.tokenizer,
        activity=activity,
        features=features,
        norms=shown.norm(dim=1),
        figures=figures,
        examples=examples,
        lens=lens,
        by_decoder=by_decoder,
        by_activity=nearest_by_activity(activity.pairs, features),
        snippets=_snippets(activity, model.tokenizer),
    )


def _snippets(activity: Activity, tokenizer: Any) -> list[Snippet]:
    """Text from contexts that are evenly spread over all."""
    n = len(activity.tokens)
    contexts = sorted({n * (2 * i + 1) // (2 * N_SNIPPETS) for i in range(N_SNIPPETS)})
    longest = min(LONGEST_SNIPPET, activity.length - 1)
    taken = take_snippets(activity.tokens, tokenizer, contexts, longest)
    return [snippet for snippet in taken if snippet.tokens]


def _facts(
    sae: SAE[Any], cfg: LanguageModelSAERunnerConfig[Any], activity: Activity
) -> list[tuple[str, str]]:
    firings = activity.pairs.feature_counts()
    n_tokens = activity.n_tokens
    return [
        ("architecture", sae.cfg.architecture()),
        ("model", name_for_others(cfg.model_name)),
        ("hook", cfg.hook_name),
        ("text", f"{name_for_others(cfg.dataset_path)}, {n_tokens:,} tokens"),
        ("features", f"{len(firings):,}"),
        ("per token", f"{int(firings.sum()) / n_tokens:.1f}"),
        ("dead", f"{int((firings == 0).sum()):,}"),
        ("rare or dead", f"{int((firings < RARE_DENSITY * n_tokens).sum()):,}"),
    ]
