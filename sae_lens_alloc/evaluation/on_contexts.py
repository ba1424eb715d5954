"""SAEs measured on contexts of a run's text, with the language model as far as it can judge them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.hook_names import hook_name_out_of
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.evaluation.baseline import Baseline, measure_baseline
from sae_lens_alloc.evaluation.metrics import evaluate_sae
from sae_lens_alloc.evaluation.snippets import Snippet, take_snippets
from sae_lens_alloc.evaluation.splicing import is_ordinary
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage
from sae_lens_alloc.progress import shown
from sae_lens_alloc.saes.rows import encoded_and_target

CONTEXTS_PER_BATCH = 8
N_SNIPPETS = 3


class OnContexts:
    """
    Measures SAEs of one run on the same contexts. The language model runs on their
    reconstructions, except where an SAE reads one head, or a part of each context, alone.

    Args:
        store: The run's text, with the language model.
        cfg: The run.
        contexts: Token ids, shape (contexts, context_size).
        special_token_ids: Tokens that are not measured.
    """

    def __init__(
        self,
        store: ResumableActivationsStore,
        cfg: LanguageModelSAERunnerConfig[Any],
        contexts: torch.Tensor,
        special_token_ids: Sequence[int],
    ) -> None:
        self.store = store
        self.cfg = cfg
        self.contexts = contexts.to(str(cfg.llm_device))
        self.special_token_ids = special_token_ids

    @property
    def runs_the_model(self) -> bool:
        """Whether the language model runs on the reconstructions."""
        return self.cfg.hook_head_index is None and not any(self.store.seqpos_slice)

    def measure(self, sae: SAE[Any]) -> Usage:
        """
        The figures of an SAE, an Evaluation if the language model runs on its reconstructions.

        Raises:
            ValueError: if nothing can be judged at this hook or on this text.
        """
        if not self.runs_the_model:
            encoded, target = encoded_and_target(sae.cfg, self.activations)
            return measure_usage(as_user(sae), encoded, target=target)
        return evaluate_sae(
            sae,
            self.store.model,
            self.contexts,
            self.cfg.hook_name,
            self._baseline,
            self.special_token_ids,
            hook_name_out=hook_name_out_of(self.cfg),
        )

    @cached_property
    def activations(self) -> torch.Tensor:
        """Activations, or rows of a transcoder, of all tokens that are measured."""
        taken: list[torch.Tensor] = []
        batches = self.contexts.split(CONTEXTS_PER_BATCH)
        for batch in shown(batches, "reading activations"):
            tokens = batch[:, slice(*self.store.seqpos_slice)]
            ordinary = is_ordinary(tokens, self.special_token_ids)
            activations = self.store.get_activations(batch)
            taken.append(activations[ordinary.to(activations.device)].flatten(1))
        return torch.cat(taken)

    def snippets(self) -> list[Snippet]:
        """Parts of the text to show, none where the tokens of an Evaluation are not known."""
        tokenizer = getattr(self.store.model, "tokenizer", None)
        if tokenizer is None or not self.runs_the_model:
            return []
        n = len(self.contexts)
        spread = {n * (2 * i + 1) // (2 * N_SNIPPETS) for i in range(N_SNIPPETS)}
        taken = take_snippets(self.contexts.cpu(), tokenizer, sorted(spread))
        return [snippet for snippet in taken if snippet.tokens]

    @cached_property
    def _baseline(self) -> Baseline:
        return measure_baseline(
            self.store.model,
            self.contexts,
            self.cfg.hook_name,
            self.special_token_ids,
            hook_name_out=hook_name_out_of(self.cfg),
        )
