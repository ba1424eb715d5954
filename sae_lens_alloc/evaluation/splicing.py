"""A language model that runs with the activations at one hook replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc.progress import shown

# From the activations of ordinary tokens where they are read, shape (n, d_in), and where they are
# replaced, shape (n, d_out), to the replacement.
Replace = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Site:
    """
    The hooks of an SAE, which reads activations where it replaces them, or of a transcoder.

    Args:
        read: Hook whose activations are encoded.
        replaced: Hook whose activations are replaced by the reconstruction, after `read` or the
            same.
    """

    read: str
    replaced: str


def is_ordinary(tokens: torch.Tensor, special_token_ids: Sequence[int]) -> torch.Tensor:
    """Which tokens are not special, bool of the shape of `tokens`."""
    special = torch.tensor(special_token_ids, dtype=tokens.dtype, device=tokens.device)
    return ~torch.isin(tokens, special)


@torch.no_grad()
def spliced_loss(
    model: HookedRootModule,
    tokens: torch.Tensor,
    site: Site,
    replace: Replace,
    special_token_ids: Sequence[int],
    contexts_per_batch: int,
) -> float:
    """
    Mean next-token loss in nats with the activations at a hook replaced.

    Special tokens keep their activations. A prediction counts only if it is made from an
    ordinary token and is of an ordinary token.

    Args:
        model: The language model.
        tokens: Token ids, shape (contexts, length).
        site: Where activations are read and replaced.
        replace: Called once a batch, with the activations of its ordinary tokens in order.
        special_token_ids: Ids of the special tokens.
        contexts_per_batch: Contexts to run at once.

    Raises:
        ValueError: if no prediction counts.
    """
    total, count = 0.0, 0
    for batch in shown(tokens.split(contexts_per_batch), "running the model"):
        ordinary = is_ordinary(batch, special_token_ids)
        logits, targets = predictions(model, batch, ordinary, site, replace)
        losses = cross_entropy(logits, targets, reduction="none")
        total += losses.double().sum().item()
        count += len(targets)
    return total / _some(count)


@torch.no_grad()
def loss_and_divergence(
    model: HookedRootModule,
    tokens: torch.Tensor,
    site: Site,
    replace: Replace,
    special_token_ids: Sequence[int],
    contexts_per_batch: int,
) -> tuple[float, float]:
    """
    `spliced_loss`, and the mean divergence KL(untouched || replaced) in nats. It is taken
    between the next-token distributions of the model as it is and with the activations
    replaced.
    """
    loss, divergence, count = 0.0, 0.0, 0
    for batch in shown(tokens.split(contexts_per_batch), "running the model"):
        ordinary = is_ordinary(batch, special_token_ids)
        spliced, targets = predictions(model, batch, ordinary, site, replace)
        untouched, _ = predictions(
            model, batch, ordinary, site, lambda _, activations: activations
        )
        losses = cross_entropy(spliced, targets, reduction="none")
        loss += losses.double().sum().item()
        divergence += divergences(spliced, untouched).double().sum().item()
        count += len(targets)
    return loss / _some(count), divergence / count


def divergences(spliced: torch.Tensor, untouched: torch.Tensor) -> torch.Tensor:
    """KL(untouched || spliced) in nats of each of n predictions, given logits of shape (n, vocabulary)."""
    return kl_div(
        spliced.log_softmax(-1),
        untouched.log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)


def _some(count: int) -> int:
    if count == 0:
        raise ValueError(
            "the contexts hold no two ordinary tokens in a row, so there is no prediction to "
            "judge: give other text, or a larger context_size."
        )
    return count


def predictions(
    model: HookedRootModule,
    tokens: torch.Tensor,
    ordinary: torch.Tensor,
    site: Site,
    replace: Replace,
    positions: slice = slice(None),
    **model_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The predictions that count, with the activations at a hook replaced: their logits, shape
    (n, vocabulary), and the tokens to predict, shape (n,). Gradients reach the replacement.

    Args:
        model: The language model.
        tokens: Token ids, shape (contexts, length).
        ordinary: Which of them are ordinary, bool of the same shape.
        site: Where activations are read and replaced.
        replace: Called once, with the activations of the ordinary tokens in order.
        positions: Positions of a context that are replaced. A prediction from another does not
            count.
        model_kwargs: What else the model is given.
    """
    replaced = torch.zeros_like(ordinary)
    replaced[:, positions] = ordinary[:, positions]
    read: list[torch.Tensor] = []

    def at_replaced(activations: torch.Tensor) -> torch.Tensor:
        # the heads of a token are one vector, as SAEs are trained on them
        return activations[replaced.to(activations.device)].flatten(1)

    def keep(activations: torch.Tensor, hook: Any) -> None:  # noqa: ARG001
        read.append(at_replaced(activations))

    def splice(activations: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        spliced = activations.clone()
        replacement = replace(read[-1], at_replaced(activations)).to(activations)
        spliced[replaced.to(activations.device)] = replacement.unflatten(
            1, activations.shape[2:]
        )
        return spliced

    logits = model.run_with_hooks(
        tokens,
        return_type="logits",
        fwd_hooks=[(site.read, keep), (site.replaced, splice)],
        **model_kwargs,
    )
    predicted = (replaced[:, :-1] & ordinary[:, 1:]).to(logits.device)
    targets = tokens.to(logits.device)[:, 1:][predicted]
    return logits[:, :-1][predicted].float(), targets
