"""What the demo model is worth, measured on the held-out files."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from scripts.demo_model.recipe import Recipe
from scripts.demo_model.stream import contexts
from scripts.demo_model.train import token_losses

ROWS = 8
Edit = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # (activation, tokens) -> activation


def batches(items: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Stack equally long contexts; a shorter last one comes alone."""
    whole = [item for item in items if len(item) == len(items[0])]
    yield from torch.stack(whole).split(ROWS)
    yield from (item[None] for item in items[len(whole) :])


@contextmanager
def edited(
    module: torch.nn.Module, edit: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Pass a module's output through `edit` while the context lasts."""

    def hook(
        _module: torch.nn.Module, _args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        return edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def residuals(
    model: GPT2LMHeadModel, items: list[torch.Tensor], bos: int
) -> dict[str, torch.Tensor]:
    """Residual vectors [tokens, width] after the embedding and after each block, without BOS."""
    modules: dict[str, torch.nn.Module] = {"embedding": model.transformer.drop}
    modules |= {f"h.{i}": block for i, block in enumerate(model.transformer.h)}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    for tokens in batches(items):
        with ExitStack() as stack:
            for name, module in modules.items():

                def keep(output: torch.Tensor, name: str = name) -> torch.Tensor:
                    kept[name].append(output[tokens != bos])  # noqa: B023
                    return output

                stack.enter_context(edited(module, keep))
            model(tokens, use_cache=False)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def effective_rank(vectors: torch.Tensor) -> float:
    """Participation ratio of the covariance's eigenvalues."""
    covariance = torch.cov(vectors.double().T)
    return (covariance.trace() ** 2 / covariance.square().sum()).item()


def shape_of(vectors: torch.Tensor) -> dict[str, float]:
    """Effective rank, norms and the largest shares of variance."""
    norms = vectors.norm(dim=1)
    variance = vectors.var(dim=0)
    principal = torch.linalg.eigvalsh(torch.cov(vectors.double().T))
    return {
        "effective_rank": effective_rank(vectors),
        "norm_median": norms.median().item(),
        "norm_p99": norms.quantile(0.99).item(),
        "norm_max": norms.max().item(),
        "mean_norm": vectors.mean(0).norm().item(),
        "top_dimension_share": (variance.max() / variance.sum()).item(),
        "top_component_share": (principal[-1] / principal.sum()).item(),
    }


@torch.no_grad()
def loss(
    model: GPT2LMHeadModel,
    items: list[torch.Tensor],
    bos: int,
    hook: str = "",
    edit: Edit | None = None,
) -> float:
    """Mean next-token loss in nats without BOS targets, with a module's output edited if asked."""
    total, count = 0.0, 0
    for tokens in batches(items):
        with ExitStack() as stack:
            if edit is not None:

                def apply(output: torch.Tensor) -> torch.Tensor:
                    return torch.where(
                        (tokens == bos)[..., None], output, edit(output, tokens)
                    )  # noqa: B023

                stack.enter_context(edited(model.get_submodule(hook), apply))
            total += token_losses(
                model(tokens, use_cache=False).logits, tokens, bos
            ).item()
        count += int((tokens[:, 1:] != bos).sum())
    return total / count


def ngram_losses(
    train: torch.Tensor,
    items: list[torch.Tensor],
    vocab: int,
    bos: int,
    strength: float = 5.0,
) -> dict[str, float]:
    """Unigram (add one) and bigram (backed off to the unigram) losses on the same targets."""
    train = torch.cat([torch.tensor([bos]), train])
    singles = torch.bincount(train[train != bos], minlength=vocab).double() + 1
    unigram = singles / singles.sum()
    pairs = torch.bincount(train[:-1] * vocab + train[1:], minlength=vocab**2).view(
        vocab, vocab
    )
    pairs[:, bos] = 0
    before = torch.cat([item[:-1] for item in items])
    after = torch.cat([item[1:] for item in items])
    before, after = before[after != bos], after[after != bos]
    bigram = (pairs[before, after] + strength * unigram[after]) / (
        pairs.sum(1)[before] + strength
    )
    return {
        "unigram_loss": -unigram[after].log().mean().item(),
        "bigram_loss": -bigram.log().mean().item(),
    }


def measure(
    model: GPT2LMHeadModel,
    train: torch.Tensor,
    held_out: torch.Tensor,
    held_out_bytes: int,
    recipe: Recipe,
    bos: int,
) -> dict[str, object]:
    """Every figure of the model card."""
    items = contexts(held_out, recipe.context, bos)
    streams = residuals(model, items, bos)
    mean = streams[f"h.{recipe.hook_block}"].mean(0)
    nats = loss(model, items, bos)
    targets = int(held_out.ne(bos).sum())
    return {
        "held_out_loss": nats,
        "bits_per_byte": nats * targets / math.log(2) / held_out_bytes,
        "held_out_tokens": targets,
        "hook": recipe.hook,
        "zero_ablation_loss": loss(
            model, items, bos, recipe.hook, lambda output, _: torch.zeros_like(output)
        ),
        "mean_ablation_loss": loss(
            model, items, bos, recipe.hook, lambda output, _: mean.expand_as(output)
        ),
        **ngram_losses(train, items, recipe.vocab_size, bos),
        "residual_stream": {
            name: shape_of(vectors) for name, vectors in streams.items()
        },
    }
