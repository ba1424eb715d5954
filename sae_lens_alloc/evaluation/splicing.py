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
        logits, targets = _predictions(model, batch, special_token_ids, site, replace)
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
        spliced, targets = _predictions(model, batch, special_token_ids, site, replace)
        untouched, _ = _predictions(
            model, batch, special_token_ids, site, lambda _, activations: activations
        )
        losses = cross_entropy(spliced, targets, reduction="none")
        loss += losses.double().sum().item()
        divergences = kl_div(
            spliced.log_softmax(-1),
            untouched.log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        divergence += divergences.double().sum().item()
        count += len(targets)
    return loss / _some(count), divergence / count


def _some(count: int) -> int:
    if count == 0:
        raise ValueError(
            "the contexts hold no two ordinary tokens in a row, so there is no prediction to "
            "judge: give other text, or a larger context_size."
        )
    return count


def _predictions(
    model: HookedRootModule,
    tokens: torch.Tensor,
    special_token_ids: Sequence[int],
    site: Site,
    replace: Replace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The predictions that count, with the activations at a hook replaced: their logits, shape
    (n, vocabulary), and the tokens to predict, shape (n,).
    """
    ordinary = is_ordinary(tokens, special_token_ids)

    read: list[torch.Tensor] = []

    def at_ordinary(activations: torch.Tensor) -> torch.Tensor:
        # the heads of a token are one vector, as SAEs are trained on them
        return activations[ordinary.to(activations.device)].flatten(1)

    def keep(activations: torch.Tensor, hook: Any) -> None:  # noqa: ARG001
        read.append(at_ordinary(activations))

    def splice(activations: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        spliced = activations.clone()
        replacement = replace(read[-1], at_ordinary(activations)).to(activations)
        spliced[ordinary.to(activations.device)] = replacement.unflatten(
            1, activations.shape[2:]
        )
        return spliced

    logits = model.run_with_hooks(
        tokens,
        return_type="logits",
        fwd_hooks=[(site.read, keep), (site.replaced, splice)],
    )
    predicted = (ordinary[:, :-1] & ordinary[:, 1:]).to(logits.device)
    targets = tokens.to(logits.device)[:, 1:][predicted]
    return logits[:, :-1][predicted].float(), targets
