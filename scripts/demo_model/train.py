"""Training of the demo model."""

import logging
import time

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from scripts.demo_model.muon import Muon
from scripts.demo_model.recipe import Recipe
from scripts.demo_model.stream import random_crops

log = logging.getLogger(__name__)


def build_model(recipe: Recipe, bos: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights and no dropout."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one fused kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=recipe.init_std,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=bos,
    )
    model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wte.weight, std=recipe.embedding_std)
    return model


def token_losses(logits: torch.Tensor, tokens: torch.Tensor, bos: int) -> torch.Tensor:
    """Summed next-token loss of some contexts; BOS as a target counts nothing.

    Where a document ends is the corpus's arbitrary cut, so there is nothing to learn in it.
    """
    return cross_entropy(
        logits[:, :-1].flatten(0, 1),
        tokens[:, 1:].flatten(),
        ignore_index=bos,
        reduction="sum",
    )


def optimisers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    hidden = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    tables = [model.transformer.wpe.weight, model.lm_head.weight]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [
            {
                "params": [model.transformer.wte.weight],
                "lr": recipe.embedding_lr,
                "weight_decay": recipe.adam_weight_decay,
            },
            {"params": tables, "weight_decay": recipe.adam_weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.adam_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [Muon(hidden, recipe.muon_lr, recipe.muon_weight_decay), adam]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a constant rate, then linear to zero."""
    left = 1 - (step + 1) / recipe.steps
    return min((step + 1) / recipe.warm_up_steps, left / recipe.decay, 1.0)


def train(
    model: GPT2LMHeadModel, stream: torch.Tensor, recipe: Recipe, bos: int
) -> float:
    """Train the model in place; returns the minutes it took."""
    generator = torch.Generator().manual_seed(recipe.seed)
    opts = optimisers(model, recipe)
    schedules = [
        LambdaLR(opt, lambda step: learning_rate_factor(step, recipe)) for opt in opts
    ]
    start = time.monotonic()
    for step in range(recipe.steps):
        batch = random_crops(stream, recipe.batch, recipe.context, bos, generator)
        targets = (batch[:, 1:] != bos).sum()
        total = 0.0
        for rows in batch.split(recipe.micro_batch):
            loss = (
                token_losses(model(rows, use_cache=False).logits, rows, bos) / targets
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            opt.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            minutes = (time.monotonic() - start) / 60
            log.info(
                "step %d of %d, loss %.3f, %.1f min", step, recipe.steps, total, minutes
            )
    return (time.monotonic() - start) / 60
