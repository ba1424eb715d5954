"""Snippets of held-out text, as the report shows them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae_lens_alloc.activations.contexts import held_out_contexts
from sae_lens_alloc.demo.methods import HERE
from sae_lens_alloc.evaluation.snippets import TokenTexts, take_snippets


def test_snippets_start_at_a_line_and_know_their_counts():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    text = "a = 1\n" + "value = compute(value)\n" * 20
    tokens = held_out_contexts([text], tokenizer, 60)
    (snippet,) = take_snippets(tokens, tokenizer, [0], max_tokens=40)
    assert "".join(snippet.tokens).startswith("value = compute")
    counts = torch.arange(60)[None]
    assert snippet.counts(counts) == list(range(snippet.start, 60))
    assert len(snippet.tokens) == 60 - snippet.start <= 40


def test_a_character_of_several_tokens_is_whole():
    """The tokenizer of the demo writes characters beyond its vocabulary as bytes."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    text = "a’b 日本 c😀"
    ids = tokenizer(text)["input_ids"]
    texts = TokenTexts(tokenizer).in_context(ids)
    assert len(texts) == len(ids) > len(text)
    assert "".join(texts) == text
    assert "日" in texts and "😀" in texts and "" in texts
    # by itself a byte is what the tokenizer calls it
    byte = ids[texts.index("日")]
    alone = TokenTexts(tokenizer).of_token(byte)
    assert alone == tokenizer.convert_ids_to_tokens(byte) != "日"
    # a character that is cut off
    assert "".join(TokenTexts(tokenizer).in_context(ids[:-1])).startswith("a’b 日本 c")


def test_words_keep_the_space_before_them():
    """As Llama's: the first token of a text is decoded without its space."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁the": 1, "s": 2}, "s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([1]) == "the"
    assert TokenTexts(fast).in_context([1, 2, 1]) == [" the", "s", " the"]
