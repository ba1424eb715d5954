"""The page: what it holds, as numbers, and how it is put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from sae_lens_alloc.evaluation.snippets import Snippet, TokenTexts
from sae_lens_alloc.evaluation.usage import RARE_DENSITY
from sae_lens_alloc.features.activity import Activity
from sae_lens_alloc.features.examples import Examples
from sae_lens_alloc.features.figures import FeatureFigures
from sae_lens_alloc.features.lens import LogitLens
from sae_lens_alloc.features.neighbours import Neighbours
from sae_lens_alloc.features.packing import pack
from sae_lens_alloc.features.ragged import offsets_of, places_of_runs
from sae_lens_alloc.progress import announced

# Shades of an activation, as parts of the feature's largest one.
N_SHADES = 255


@dataclass(frozen=True, eq=False)
class FeaturePage:
    """
    All that a page shows of n features of an SAE.

    Args:
        title: Name of the SAE.
        facts: What is worth knowing of SAE and text, as (name, value).
        tokenizer: Tokenizer of the language model.
        activity: What all features do on the text.
        features: Numbers of the n features, int64 of shape (n,).
        norms: Norm of the decoder of each, shape (n,).
        figures: Their figures.
        examples: Text for each.
        lens: Their logit lens, or in one sentence why there is none.
        by_decoder: Nearest features by the cosine of the decoders.
        by_activity: Nearest features by the tokens on which they are active.
        snippets: Text to show with all the features of each token, in the order of their contexts.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    tokenizer: PreTrainedTokenizerBase
    activity: Activity
    features: torch.Tensor
    norms: torch.Tensor
    figures: FeatureFigures
    examples: Examples
    lens: LogitLens | str
    by_decoder: Neighbours
    by_activity: Neighbours
    snippets: Sequence[Snippet]

    def write(self, path: Path) -> None:
        """Writes the page as one HTML file that loads nothing."""
        environment = Environment(
            loader=PackageLoader("sae_lens_alloc", "features"),
            autoescape=True,
            undefined=StrictUndefined,
        )
        with announced("writing the page"):
            page = environment.get_template("page.html.jinja").render(
                title=self.title, facts=self.facts, data=Markup(self.packed())
            )
            path.write_text(page, encoding="utf-8")

    def packed(self) -> str:
        """All numbers of the page, see `packing`."""
        contexts, text_rows = self._shown_contexts()
        words, arrays = self._words(contexts)
        arrays |= self._of_features()
        arrays |= self._of_examples(text_rows)
        arrays |= self._of_snippets(text_rows)
        facts = {
            "title": self.title,
            "n_tokens": self.activity.n_tokens,
            "length": self.activity.length,
            "rare_density": RARE_DENSITY,
            "n_shades": N_SHADES,
            "no_lens": self.lens if isinstance(self.lens, str) else None,
            "words": words,
        }
        return pack(facts, arrays)

    def _shown_contexts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts that the page shows something of, and the row of each context among them."""
        of_snippets = torch.tensor([snippet.context for snippet in self.snippets])
        of_examples = self.examples.tokens // self.activity.length
        contexts = torch.cat([of_snippets.long(), of_examples]).unique()
        rows = torch.zeros(len(self.activity.tokens), dtype=torch.long)
        rows[contexts] = torch.arange(len(contexts))
        return contexts, rows

    def _words(self, contexts: torch.Tensor) -> tuple[list[str], dict[str, Any]]:
        """The words that the page shows, and where which one is shown."""
        texts_of = TokenTexts(self.tokenizer)
        # a special token is another word than the same characters in a text
        words: dict[tuple[str, bool], int] = {}

        def number(text: str, is_special: bool) -> int:
            return words.setdefault((text, is_special), len(words))

        shown = zip(
            self.activity.tokens[contexts].tolist(),
            self.activity.ordinary[contexts].tolist(),
            strict=True,
        )
        text = [
            number(word, not is_ordinary)
            for tokens, ordinary in shown
            for word, is_ordinary in zip(
                texts_of.in_context(tokens), ordinary, strict=True
            )
        ]
        arrays = {"text": _uint32(torch.tensor(text))}
        if isinstance(self.lens, LogitLens):
            for name, tokens in (
                ("promoted", self.lens.largest),
                ("suppressed", self.lens.smallest),
            ):
                found = [number(texts_of.of_token(t), False) for t in _numbers(tokens)]
                arrays[name] = _uint32(torch.tensor(found))
            arrays["promoted_effects"] = _float32(self.lens.largest_effects)
            arrays["suppressed_effects"] = _float32(self.lens.smallest_effects)
        special = [i for (_, is_special), i in words.items() if is_special]
        arrays["special_words"] = _uint32(torch.tensor(special))
        return [word for word, _ in words], arrays

    def _of_features(self) -> dict[str, Any]:
        figures = self.figures
        return {
            "features": _uint32(self.features),
            "norms": _float32(self.norms),
            "firings": _uint32(figures.firings),
            "means": _float32(figures.mean),
            "quantiles": _float32(figures.quantiles),
            "histograms": _uint32(figures.histogram),
            "near_by_decoder": _int32(self.by_decoder.features),
            "cosines": _float32(self.by_decoder.nearness),
            "near_by_activity": _int32(self.by_activity.features),
            "overlaps": _float32(self.by_activity.nearness),
        }

    def _of_examples(self, text_rows: torch.Tensor) -> dict[str, Any]:
        examples, length = self.examples, self.activity.length
        per_feature = examples.features.bincount(minlength=len(self.features))
        largest = self.figures.largest[examples.features]
        shades = examples.active_values / largest.repeat_interleave(examples.n_active)
        return {
            "examples_from": _uint32(offsets_of(per_feature)),
            "example_rows": _uint32(text_rows[examples.tokens // length]),
            "example_positions": _uint32(examples.tokens % length),
            "example_bands": examples.bands.numpy().astype(np.uint8),
            "example_values": _float32(examples.values),
            "active_from": _uint32(offsets_of(examples.n_active)),
            "active_positions": _uint32(examples.active_positions),
            "active_shades": (shades * N_SHADES)
            .round()
            .clamp(1, N_SHADES)
            .numpy()
            .astype(np.uint8),
        }

    def _of_snippets(self, text_rows: torch.Tensor) -> dict[str, Any]:
        """Each snippet's place in the text, and all features of its tokens, the largest first."""
        pairs, length = self.activity.pairs, self.activity.length
        first_of_token = offsets_of(pairs.token_counts())
        starts = torch.tensor([s.context * length + s.start for s in self.snippets])
        lengths = torch.tensor([len(s.tokens) for s in self.snippets])
        tokens = places_of_runs(starts.long(), lengths.long())
        n_active = (first_of_token.diff())[tokens]
        places = places_of_runs(first_of_token[tokens], n_active)
        order = pairs.values[places].argsort(descending=True, stable=True)
        order = order[pairs.token_indices[places[order]].argsort(stable=True)]
        places = places[order]
        contexts = torch.tensor([s.context for s in self.snippets]).long()
        return {
            "snippet_rows": _uint32(text_rows[contexts]),
            "snippet_starts": _uint32(starts.long() % length),
            "snippet_lengths": _uint32(lengths),
            "token_features_from": _uint32(offsets_of(n_active)),
            "token_features": _uint32(pairs.feature_indices[places]),
            "token_values": _float32(pairs.values[places]),
        }


def _numbers(tensor: torch.Tensor) -> list[int]:
    return tensor.flatten().tolist()


def _uint32(tensor: torch.Tensor) -> Any:
    return tensor.flatten().numpy().astype(np.uint32)


def _int32(tensor: torch.Tensor) -> Any:
    return tensor.flatten().numpy().astype(np.int32)


def _float32(tensor: torch.Tensor) -> Any:
    return tensor.detach().flatten().cpu().numpy().astype(np.float32)
