"""A transcoder in place of an MLP: a ReLU MLP is itself a transcoder, so it changes nothing."""

import copy
from typing import Any

import pytest
import torch
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig
from torch.nn.functional import cross_entropy
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_alloc.evaluation.metrics import Evaluation, evaluate_sae

D_MODEL, D_MLP, VOCAB, BOS = 8, 20, 17, 0
MLP_IN, MLP_OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.fixture
def model() -> HookedTransformer:
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        n_ctx=12,
        d_head=4,
        d_mlp=D_MLP,
        act_fn="relu",
        d_vocab=VOCAB,
        normalization_type="LNPre",  # whose weights are folded in
        initializer_range=0.5,
        dtype=torch.float64,
    )
    return HookedTransformer(config).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(
        1, VOCAB, (7, 12), generator=torch.Generator().manual_seed(1)
    )
    tokens[:, 0] = BOS
    return tokens


@pytest.fixture
def transcoder(model: HookedTransformer) -> SkipTranscoder:
    mlp: Any = model.blocks[0].mlp
    config = SkipTranscoderConfig(
        d_in=D_MODEL,
        d_sae=D_MLP,
        d_out=D_MODEL,
        dtype="float64",
        apply_b_dec_to_input=False,
    )
    transcoder = SkipTranscoder(config)
    transcoder.load_state_dict(
        {
            "W_enc": mlp.W_in,
            "b_enc": mlp.b_in + 0.3,
            "W_dec": mlp.W_out,
            "b_dec": mlp.b_out + 0.2,
            "W_skip": torch.zeros(D_MODEL, D_MODEL, dtype=torch.float64),
        }
    )
    with torch.no_grad():
        mlp.b_in += 0.3
        mlp.b_out += 0.2
    return transcoder


def evaluate(
    transcoder: SkipTranscoder, model: HookedTransformer, tokens: torch.Tensor
) -> Evaluation:
    return evaluate_sae(
        transcoder,
        model,
        tokens,
        MLP_IN,
        special_token_ids=[BOS],
        contexts_per_batch=3,
        hook_name_out=MLP_OUT,
    )


@torch.no_grad()
def test_the_mlp_itself_explains_and_recovers_everything(
    model: HookedTransformer, tokens: torch.Tensor, transcoder: SkipTranscoder
):
    result = evaluate(transcoder, model, tokens)
    assert result.explained_variance == pytest.approx(1, abs=1e-12)
    assert result.loss_with_sae == pytest.approx(result.loss, rel=1e-6)
    assert result.loss_recovered_zero == pytest.approx(1, abs=1e-5)
    assert result.loss_recovered_mean == pytest.approx(1, abs=1e-5)
    assert result.kl_divergence == pytest.approx(0, abs=1e-6)
    _, cache = model.run_with_cache(tokens, names_filter=["blocks.0.mlp.hook_post"])
    active = cache["blocks.0.mlp.hook_post"][tokens != BOS] > 0
    assert result.l0 == pytest.approx(active.sum(1).double().mean().item())
    assert torch.equal(result.densities, active.double().mean(0))


@torch.no_grad()
def test_figures_are_those_of_a_plain_computation(
    model: HookedTransformer, tokens: torch.Tensor, transcoder: SkipTranscoder
):
    torch.manual_seed(3)
    transcoder.W_dec.mul_(0.7)
    transcoder.W_skip.normal_(std=0.2)
    result = evaluate(transcoder, model, tokens)

    _, cache = model.run_with_cache(tokens)
    ordinary = tokens != BOS
    x, y = cache[MLP_IN][ordinary], cache[MLP_OUT][ordinary]
    found = transcoder(x)
    explained = 1 - (y - found).square().sum() / (y - y.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(explained.item(), rel=1e-12)

    def loss(replacement: torch.Tensor) -> float:
        """With the block's MLP computing something else, by another copy of the model."""
        changed = copy.deepcopy(model)
        out = cache[MLP_OUT].clone()
        out[ordinary] = replacement
        changed.blocks[0].mlp.forward = lambda _: out  # type: ignore[method-assign]
        logits = changed(tokens)
        losses = [
            cross_entropy(logits[row, i].float(), tokens[row, i + 1]).item()
            for row in range(len(tokens))
            for i in range(1, tokens.shape[1] - 1)
        ]
        return sum(losses) / len(losses)

    untouched, spliced = loss(y), loss(found)
    zero, mean = loss(torch.zeros_like(y)), loss(y.mean(0).expand_as(y))
    assert result.loss == pytest.approx(untouched, rel=1e-6)
    assert result.loss_with_sae == pytest.approx(spliced, rel=1e-6)
    assert result.loss_recovered_zero == pytest.approx(
        (zero - spliced) / (zero - untouched), rel=1e-4
    )
    assert result.loss_recovered_mean == pytest.approx(
        (mean - spliced) / (mean - untouched), rel=1e-4
    )
