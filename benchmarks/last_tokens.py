"""
The activation at the last token of each text, of the models whose SAEs benchmarks/probes.py probes.

A text that is longer than the context loses its beginning. The texts start and end with the special
tokens that the models know, but the activation is that of the text's own last token: the SAEs were
trained without those of special tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_lens_alloc
from benchmarks import minilm

DEMO_MODEL = Path(sae_lens_alloc.__file__).parent / "demo" / "model"
DEMO_LAYER = 2
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A model up to the layer of its SAEs."""

    hook_name: str
    d_in: int
    max_tokens: int  # special ones included, as in the SAEs' training
    before: list[int]  # special tokens at the beginning
    after: list[int]  # special tokens at the end
    token_ids: Callable[[str], list[int]]  # of a text, without special ones
    states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of ids and mask


def minilm_subject() -> Subject:
    """MiniLM after its fourth layer. Its attention is not causal, so any token knows all others."""
    tokenizer, model = minilm.load_model()
    return Subject(
        hook_name=f"encoder.layer.{minilm.LAYER - 1}",
        d_in=model.config.hidden_size,
        max_tokens=minilm.MAX_TOKENS,
        before=[tokenizer.cls_token_id],
        after=[tokenizer.sep_token_id],
        token_ids=_token_ids(tokenizer),
        states=lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state,
    )


def demo_subject() -> Subject:
    """The shipped language model, which writes Python."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    whole: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model = whole.eval().transformer
    model.h = model.h[: DEMO_LAYER + 1]
    model.ln_f = torch.nn.Identity()  # it is no part of the layer's output
    return Subject(
        hook_name=f"transformer.h.{DEMO_LAYER}",
        d_in=model.config.hidden_size,
        max_tokens=model.config.n_positions,
        before=[tokenizer.bos_token_id],
        after=[],
        token_ids=_token_ids(tokenizer),
        states=lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state,
    )


SUBJECTS = {"minilm": minilm_subject, "demo": demo_subject}


def _token_ids(tokenizer: Any) -> Callable[[str], list[int]]:
    def of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return of


def with_special_tokens(subject: Subject, text: str) -> list[int]:
    """The last tokens of a text, as many as the context takes, between the special ones."""
    room = subject.max_tokens - len(subject.before) - len(subject.after)
    return [*subject.before, *subject.token_ids(text)[-room:], *subject.after]


@torch.inference_mode()
def last_token_activations(subject: Subject, texts: Sequence[str]) -> torch.Tensor:
    """The activation at the last token of each text, of shape (n, d_in)."""
    pieces = [with_special_tokens(subject, text) for text in texts]
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))  # to pad little
    found: list[torch.Tensor] = []
    for start in range(0, len(order), BATCH):
        batch = [torch.tensor(pieces[i]) for i in order[start : start + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(piece) for piece in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        last = lengths - 1 - len(subject.after)
        states = subject.states(ids, mask)
        found.append(states[torch.arange(len(batch)), last])
    return torch.cat(found)[torch.tensor(order).argsort()]
