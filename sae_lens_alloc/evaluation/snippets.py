"""Parts of the evaluated text, to show the number of active features of each token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no character.
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Snippet:
    """
    Consecutive tokens of one evaluated context.

    Args:
        context: Row among the evaluated contexts.
        start: Position of the first token in the context.
        tokens: Text of each token.
    """

    context: int
    start: int
    tokens: tuple[str, ...]

    def counts(self, features_per_token: torch.Tensor) -> list[int]:
        """
        Number of active features of each token of the snippet, -1 at special tokens.

        Args:
            features_per_token: Counts of every evaluated token, shape (contexts, length).
        """
        stop = self.start + len(self.tokens)
        return features_per_token[self.context, self.start : stop].tolist()


def take_snippets(
    tokens: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Iterable[int],
    max_tokens: int = 160,
) -> list[Snippet]:
    """
    Takes one snippet from the end of each of some contexts, where the model has the most text
    to go by. A snippet starts at the start of a line if there is one.

    Args:
        tokens: Evaluated token ids, shape (contexts, length).
        tokenizer: Tokenizer of the model.
        contexts: Rows of `tokens`.
        max_tokens: Length of a snippet, in tokens.
    """
    return [_take(tokens, tokenizer, context, max_tokens) for context in contexts]


def token_texts(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]
) -> list[str]:
    """
    The text of each token within a text, with the space before a word, which some tokenizers
    leave out where nothing comes before. A token that is a part of a character only is given as
    the tokenizer writes it.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    n = len(_decode(tokenizer, before))
    texts = [_decode(tokenizer, [*before, token])[n:] for token in token_ids]
    return [
        str(tokenizer.convert_ids_to_tokens(token)) if NO_CHARACTER in text else text
        for token, text in zip(token_ids, texts, strict=True)
    ]


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    return str(text)


def _take(
    tokens: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int,
) -> Snippet:
    start = max(tokens.shape[1] - max_tokens, 1)
    texts = token_texts(tokenizer, tokens[context, start:].tolist())
    line_ends = (
        i + 1 for i, text in enumerate(texts[: max_tokens // 4]) if "\n" in text
    )
    skipped = next(line_ends, 0)
    return Snippet(context, start + skipped, tuple(texts[skipped:]))
