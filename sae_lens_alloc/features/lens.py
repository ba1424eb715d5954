"""The logit lens: which next tokens a direction of the residual stream makes more likely."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens.HookedTransformer import HookedRootModule

# What Hugging Face's models call their final norm, seen from their `base_model`.
FINAL_NORMS = (
    *("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "ln_out"),
    *("decoder.final_layer_norm", "decoder.norm", "language_model.norm"),
)
# Parts of the names of hooks that do not add to the residual stream.
INNER_PARTS = frozenset(
    (
        *("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k"),
        *("hook_pre", "hook_pre_linear", "hook_post", "hook_mid", "hook_normalized"),
        *("ln1", "ln2", "ln_1", "ln_2", "input_layernorm", "pre_feedforward_layernorm"),
        *(
            "q",
            "k",
            "v",
            "qkv",
            "q_proj",
            "k_proj",
            "v_proj",
            "c_attn",
            "query_key_value",
        ),
        *(
            "in",
            "gate",
            "c_fc",
            "up_proj",
            "gate_proj",
            "act",
            "act_fn",
            "dense_h_to_4h",
        ),
    )
)
# Elements of a block of logits.
LARGEST_BLOCK = 2**25


@dataclass(frozen=True, eq=False)
class Unembedding:
    """
    How directions of the residual stream become logits.

    Args:
        weight: Shape (d_model, vocabulary).
        gain: Weight of the final norm, shape (d_model,).
        is_centred: Whether the norm takes the mean away, as LayerNorm does.
    """

    weight: torch.Tensor
    gain: torch.Tensor
    is_centred: bool

    def effects(self, directions: torch.Tensor) -> torch.Tensor:
        """
        What directions of shape (n, d_model) add to the logits, before the final norm divides by
        the size of the residual stream. Shape (n, vocabulary). The mean over the vocabulary is
        taken away, as it changes no probability.
        """
        directions = directions.to(self.weight)
        if self.is_centred:
            directions = directions - directions.mean(1, keepdim=True)
        logits = (directions * self.gain.to(self.weight)) @ self.weight
        return logits.float() - logits.float().mean(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """
    The tokens that n features promote most and suppress most.

    Args:
        largest: Token ids, the most promoted one first, int64 of shape (n, k).
        largest_effects: What a unit of activation adds to their logits, shape (n, k).
        smallest: Token ids, the most suppressed one first, int64 of shape (n, k).
        smallest_effects: What a unit of activation adds to their logits, shape (n, k).
    """

    largest: torch.Tensor
    largest_effects: torch.Tensor
    smallest: torch.Tensor
    smallest_effects: torch.Tensor


@torch.no_grad()
def logit_lens(
    unembedding: Unembedding, directions: torch.Tensor, k: int = 10
) -> LogitLens:
    """
    The lens of some features, a block of them at a time.

    Args:
        unembedding: That of the language model.
        directions: What a unit of activation adds to the residual stream, shape (n, d_model).
        k: Tokens to keep at each end.
    """
    vocabulary = unembedding.weight.shape[1]
    k = min(k, vocabulary)
    found: list[tuple[torch.Tensor, ...]] = []
    for block in directions.split(max(1, LARGEST_BLOCK // vocabulary)):
        effects = unembedding.effects(block.to(unembedding.weight.device))
        largest, smallest = effects.topk(k), effects.topk(k, largest=False)
        ends = (largest.indices, largest.values, smallest.indices, smallest.values)
        found.append(tuple(end.cpu() for end in ends))
    return LogitLens(*map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def find_unembedding(
    model: HookedRootModule, hook_name: str, d_in: int, head: int | None = None
) -> Unembedding | str:
    """
    The unembedding of a language model, if an SAE's decoder writes to where it reads from.

    Args:
        model: A HookedTransformer, a TransformerBridge, or SAELens' proxy of a Hugging Face model.
        hook_name: The SAE's hook.
        d_in: Width of the SAE.
        head: The attention head that the SAE is of, if any.

    Returns:
        The unembedding, or in one sentence why there is no lens.
    """
    if head is not None or INNER_PARTS.intersection(hook_name.split(".")):
        return f"There is no logit lens, as {hook_name} does not add to the residual stream."
    if isinstance(model, HookedProxyLM):
        weight, norm = _of_hugging_face(model)
    else:
        weight, norm = getattr(model, "W_U", None), getattr(model, "ln_final", None)
    if weight is None:
        return "There is no logit lens, as the language model has no unembedding."
    if weight.shape[0] != d_in:
        return (
            f"There is no logit lens, as the SAE has {d_in} dimensions and the unembedding "
            f"{weight.shape[0]}."
        )
    gain, is_centred = torch.ones(d_in), False
    if norm is not None:
        gain, is_centred = norm_as_linear(norm, weight)
    return Unembedding(weight.detach(), gain, is_centred)


def norm_as_linear(norm: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """
    The weight of a LayerNorm or RMSNorm, under whatever name and in whatever form, as Gemma's
    1 + weight, and whether it takes the mean away. Found by what it does to two inputs.

    Args:
        norm: The norm.
        like: A tensor of shape (d, ...) with the device and dtype of the norm.
    """
    d = like.shape[0]
    ones = like.new_ones(1, 1, d)
    if (gain := _odd_part(norm, ones)).abs().max() > 1e-3:
        return gain, False
    # as large as it is small, with a mean of 0
    probe = torch.where(torch.arange(d) % 2 == 0, 1.0, -1.0)
    if d % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    probe = probe.to(like)
    size = probe.square().mean().sqrt()
    return _odd_part(norm, probe[None, None]) / probe * size, True


def _odd_part(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Half of what differs between x and -x, where a bias falls away, shape (d,)."""
    return ((norm(x) - norm(-x)) / 2)[0, 0]


def _of_hugging_face(
    model: HookedProxyLM,
) -> tuple[torch.Tensor | None, nn.Module | None]:
    language_model: Any = model.model
    head = language_model.get_output_embeddings()
    if head is None:
        return None, None
    # some vocabularies are padded beyond the tokens that there are
    weight = head.weight.T[:, : len(model.tokenizer)]
    for name in FINAL_NORMS:
        try:
            return weight, language_model.base_model.get_submodule(name)
        except AttributeError:
            continue
    return weight, None
