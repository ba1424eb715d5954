"""Parts of the evaluated text, to show the number of active features of each token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no character.
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
# Bytes of a character, each of which may be a token.
LONGEST_CHARACTER = 4


class TokenTexts:
    """
    The text of tokens as it stands in a text: with the space before a word, which some
    tokenizers leave out where nothing comes before.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        self._start = len(self._decode([]))
        self._known: dict[int, tuple[str, bool]] = {}

    def of_token(self, token_id: int) -> str:
        """One token. A part of a character is given as the tokenizer writes it."""
        return self._look_up(token_id)[0]

    def in_context(self, token_ids: Sequence[int]) -> list[str]:
        """
        Each token of a context. A character of several tokens is the text of the first of them,
        and that of the others is empty.
        """
        texts = [self.of_token(token_id) for token_id in token_ids]
        start = 0
        while start < len(texts):
            stop = start + 1
            if self._look_up(token_ids[start])[1]:
                for end in range(stop, min(start + LONGEST_CHARACTER, len(texts)) + 1):
                    joined = self._decode(token_ids[start:end])[self._start :]
                    if NO_CHARACTER not in joined:
                        texts[start:end] = [joined, *[""] * (end - start - 1)]
                        stop = end
                        break
            start = stop
        return texts

    def _look_up(self, token_id: int) -> tuple[str, bool]:
        """The text of a token, and whether it is a part of a character."""
        if token_id not in self._known:
            text = self._decode([token_id])[self._start :]
            is_part = NO_CHARACTER in text
            if is_part:
                text = str(self._tokenizer.convert_ids_to_tokens(token_id))
            self._known[token_id] = text, is_part
        return self._known[token_id]

    def _decode(self, token_ids: Sequence[int]) -> str:
        ids = [*self._before, *token_ids]
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


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
    texts_of = TokenTexts(tokenizer)
    return [_take(tokens, texts_of, context, max_tokens) for context in contexts]


def _take(
    tokens: torch.Tensor, texts_of: TokenTexts, context: int, max_tokens: int
) -> Snippet:
    start = max(tokens.shape[1] - max_tokens, 1)
    texts = texts_of.in_context(tokens[context, start:].tolist())
    line_ends = (
        i + 1 for i, text in enumerate(texts[: max_tokens // 4]) if "\n" in text
    )
    skipped = next(line_ends, 0)
    return Snippet(context, start + skipped, tuple(texts[skipped:]))
