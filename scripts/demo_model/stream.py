"""Token streams laid out the way SAELens feeds them to a model."""

import torch
from transformers import PreTrainedTokenizerFast


def tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, bos: int
) -> torch.Tensor:
    """All texts as one stream of token ids, with a BOS token between two texts."""
    ids = tokenizer.backend_tokenizer.encode_batch(texts)
    stream = [token for text in ids for token in (bos, *text.ids)]
    return torch.tensor(stream[1:])


def with_bos(body: torch.Tensor, bos: int) -> torch.Tensor:
    """Put BOS in front of every row."""
    return torch.cat([torch.full((len(body), 1), bos), body], dim=1)


def contexts(stream: torch.Tensor, context: int, bos: int) -> list[torch.Tensor]:
    """The whole stream in order, as contexts with BOS first; the last may be shorter."""
    return [with_bos(body[None], bos)[0] for body in stream.split(context - 1)]


def random_crops(
    stream: torch.Tensor, rows: int, context: int, bos: int, generator: torch.Generator
) -> torch.Tensor:
    """A batch of contexts with BOS first, from random places of the stream."""
    starts = torch.randint(len(stream) - context + 2, (rows, 1), generator=generator)
    return with_bos(stream[starts + torch.arange(context - 1)], bos)
