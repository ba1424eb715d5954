"""Snippets of held-out text, as the report shows them."""

import torch
from transformers import AutoTokenizer

from sae_lens_alloc.activations.contexts import held_out_contexts
from sae_lens_alloc.demo.methods import HERE
from sae_lens_alloc.evaluation.snippets import take_snippets


def test_snippets_start_at_a_line_and_know_their_counts():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    text = "a = 1\n" + "value = compute(value)\n" * 20
    tokens = held_out_contexts([text], tokenizer, 60)
    (snippet,) = take_snippets(tokens, tokenizer, [0], max_tokens=40)
    assert "".join(snippet.tokens).startswith("value = compute")
    counts = torch.arange(60)[None]
    assert snippet.counts(counts) == list(range(snippet.start, 60))
    assert len(snippet.tokens) == 60 - snippet.start <= 40
