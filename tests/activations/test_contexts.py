"""Held-out contexts are laid out as those of the training, and tokens that end are counted."""

import pytest
import torch
from transformers import AutoTokenizer

from sae_lens_alloc.activations.contexts import held_out_contexts
from sae_lens_alloc.activations.on_text import take_tokens
from sae_lens_alloc.demo.methods import HERE


def test_batches_that_end_say_how_many_there_were():
    batches = [torch.ones(4, 2), torch.zeros(4, 2)]
    assert torch.equal(take_tokens(iter(batches), 5), torch.cat(batches))
    with pytest.raises(ValueError, match="of 9 tokens are wanted, .* end after 8"):
        take_tokens(iter(batches), 9)


def test_contexts_are_laid_out_as_in_training():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    texts = ["import os\n", "", "def f(x):\n    return x + 1\n"]
    bos = tokenizer.bos_token_id
    first, second = (tokenizer(text)["input_ids"] for text in (texts[0], texts[2]))
    # BOS opens every context and stands between two texts
    stream = [bos, *first, bos, *second]
    contexts = held_out_contexts(texts, tokenizer, 6)
    assert contexts[0].tolist() == stream[:6]
    assert contexts[1].tolist() == [bos, *stream[6:11]]
    assert contexts.shape[1] == 6


def test_few_contexts_are_spread_over_all():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    texts = [f"x = {i}\n" * 5 for i in range(40)]
    all_contexts = held_out_contexts(texts, tokenizer, 8)
    few = held_out_contexts(texts, tokenizer, 8, 3)
    last = len(all_contexts) - 1
    assert torch.equal(few, all_contexts[[0, last // 2, last]])
