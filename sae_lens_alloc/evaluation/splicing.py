"""Running a language model with the activations at one hook replaced."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformer_lens.HookedTransformer import HookedRootModule

# Takes the activations of ordinary tokens, shape (n, d), and gives their replacement.
Replace = Callable[[torch.Tensor], torch.Tensor]


def is_ordinary(tokens: torch.Tensor, special_token_ids: Sequence[int]) -> torch.Tensor:
    """Which tokens are not special, bool of the shape of `tokens`."""
    special = torch.tensor(special_token_ids, dtype=tokens.dtype, device=tokens.device)
    return ~torch.isin(tokens, special)


@torch.no_grad()
def spliced_loss(
    model: HookedRootModule,
    tokens: torch.Tensor,
    hook_name: str,
    replace: Replace,
    special_token_ids: Sequence[int],
    contexts_per_batch: int,
) -> float:
    """
    Mean next-token loss in nats with the activations at a hook replaced.

    `replace` is called once a batch, with the ordinary tokens in order. Special tokens keep
    their activation, and no loss counts whose prediction is made from a special token or is
    of one.

    Args:
        tokens: Token ids, shape (contexts, length).
    """
    total, count = 0.0, 0
    for batch in tokens.split(contexts_per_batch):
        ordinary = is_ordinary(batch, special_token_ids)

        def splice(
            activations: torch.Tensor,
            hook: Any,  # noqa: ARG001
            ordinary: torch.Tensor = ordinary,
        ) -> torch.Tensor:
            ordinary = ordinary.to(activations.device)
            spliced = activations.clone()
            spliced[ordinary] = replace(activations[ordinary]).to(activations)
            return spliced

        logits = model.run_with_hooks(
            batch, return_type="logits", fwd_hooks=[(hook_name, splice)]
        )
        predicted = (ordinary[:, :-1] & ordinary[:, 1:]).to(logits.device)
        losses = cross_entropy(
            logits[:, :-1][predicted].float(),
            batch.to(logits.device)[:, 1:][predicted],
            reduction="none",
        )
        total += losses.double().sum().item()
        count += len(losses)
    return total / count
