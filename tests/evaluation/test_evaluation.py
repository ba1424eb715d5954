"""Evaluation of saved SAEs against plain float64 computations on a tiny model."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_alloc.evaluation.baseline import measure_baseline
from sae_lens_alloc.evaluation.metrics import evaluate_sae
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage

HOOK = "transformer.h.0"
D_IN, D_SAE, VOCAB, BOS = 8, 24, 20, 0


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=12,
        n_embd=D_IN,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture
def model(gpt2: GPT2LMHeadModel) -> HookedProxyLM:
    tokenizer: Any = SimpleNamespace(bos_token_id=BOS)
    return HookedProxyLM(gpt2, tokenizer, hook_names=[HOOK])


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (7, 12), generator=generator)
    tokens[:, 0] = BOS
    tokens[2, 5] = BOS  # between two texts
    return tokens


@pytest.fixture
def sae() -> JumpReLUSAE:
    torch.manual_seed(2)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64"))
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.4)
        sae.threshold.fill_(0.6)
        sae.b_enc[:2] = -100.0  # dead
    return sae


def activations_of(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """Activations at the hook, shape (contexts, length, d_in)."""
    return gpt2(tokens, output_hidden_states=True).hidden_states[1].detach()


def spliced_loss(
    gpt2: GPT2LMHeadModel,
    tokens: torch.Tensor,
    replace: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Loss with every activation replaced one by one, BOS left alone."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for row, column in (tokens != BOS).nonzero().tolist():
            hidden[row, column] = replace(hidden[row, column])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = gpt2.transformer.h[0].register_forward_hook(hook)
    try:
        logits = gpt2(tokens).logits.detach()
    finally:
        handle.remove()
    losses = [
        cross_entropy(logits[row, i], tokens[row, i + 1]).item()
        for row in range(len(tokens))
        for i in range(tokens.shape[1] - 1)
        if tokens[row, i] != BOS and tokens[row, i + 1] != BOS
    ]
    return sum(losses) / len(losses)


@torch.no_grad()
def test_figures_are_those_of_a_plain_computation(
    gpt2: GPT2LMHeadModel,
    model: HookedProxyLM,
    tokens: torch.Tensor,
    sae: JumpReLUSAE,
):
    hidden = activations_of(gpt2, tokens)
    x = hidden[tokens != BOS]
    pre = x @ sae.W_enc + sae.b_enc
    if sae.cfg.apply_b_dec_to_input:
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = torch.where(pre > sae.threshold, pre, 0.0)
    reconstruction = acts @ sae.W_dec + sae.b_dec
    counts = (acts > 0).sum(1)
    mean = x.mean(0)

    result = evaluate_sae(sae, model, tokens, HOOK, contexts_per_batch=3)

    ev = 1 - (x - reconstruction).square().sum() / (x - mean).square().sum()
    assert result.explained_variance == pytest.approx(ev.item(), rel=1e-12)
    loss = spliced_loss(gpt2, tokens, lambda a: a)
    zero = spliced_loss(gpt2, tokens, torch.zeros_like)
    ablated = spliced_loss(gpt2, tokens, lambda _: mean)
    spliced = spliced_loss(gpt2, tokens, lambda a: sae.decode(sae.encode(a)))
    # SAELens' wrapper and ours take logits to float32 before the loss
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.loss_with_sae == pytest.approx(spliced, rel=1e-6)
    assert result.loss_recovered_zero == pytest.approx(
        (zero - spliced) / (zero - loss), rel=1e-5
    )
    assert result.loss_recovered_mean == pytest.approx(
        (ablated - spliced) / (ablated - loss), rel=1e-5
    )
    assert result.n_tokens == 7 * 12 - 7 - 1
    assert result.l0 == pytest.approx(counts.double().mean().item())
    assert torch.equal(result.densities, (acts > 0).double().mean(0))
    assert result.dead_features == int((acts.sum(0) == 0).sum()) >= 2
    assert result.rare_features == result.dead_features
    assert (result.features_per_token == -1).nonzero().tolist() == (
        tokens == BOS
    ).nonzero().tolist()
    assert result.features_per_token[tokens != BOS].tolist() == counts.tolist()
    assert result.l0_histogram.tolist() == [
        int((counts == n).sum()) for n in range(int(counts.max()) + 1)
    ]


def test_the_figures_do_not_depend_on_the_batch(
    model: HookedProxyLM, tokens: torch.Tensor, sae: JumpReLUSAE
):
    one = evaluate_sae(sae, model, tokens, HOOK, contexts_per_batch=1)
    all_at_once = evaluate_sae(sae, model, tokens, HOOK, contexts_per_batch=100)
    first, second = one.to_dict(), all_at_once.to_dict()
    assert first.pop("l0_histogram") == second.pop("l0_histogram")
    assert first == pytest.approx(second, rel=1e-6)
    assert torch.equal(one.features_per_token, all_at_once.features_per_token)
    assert torch.equal(one.densities, all_at_once.densities)


@torch.no_grad()
def test_a_perfect_sae_recovers_everything(
    model: HookedProxyLM, tokens: torch.Tensor, sae: JumpReLUSAE
):
    """Features +x and -x rebuild any x."""
    identity = torch.eye(D_IN, dtype=torch.float64)
    sae.W_enc.zero_()
    sae.W_enc[:, : 2 * D_IN] = torch.cat([identity, -identity], dim=1)
    sae.W_dec.copy_(sae.W_enc.T)
    for parameter in (sae.b_enc, sae.b_dec, sae.threshold):
        parameter.zero_()
    result = evaluate_sae(sae, model, tokens, HOOK)
    assert result.explained_variance == pytest.approx(1.0, abs=1e-12)
    assert result.loss_recovered_zero == pytest.approx(1.0, abs=1e-6)
    assert result.loss_recovered_mean == pytest.approx(1.0, abs=1e-6)
    assert result.kl_divergence == pytest.approx(0.0, abs=1e-6)
    assert result.l0 == D_IN


@torch.no_grad()
def test_kl_divergence_is_that_of_a_plain_computation(
    gpt2: GPT2LMHeadModel,
    model: HookedProxyLM,
    tokens: torch.Tensor,
    sae: JumpReLUSAE,
):
    """Mean over tokens and next tokens that are not BOS of sum_v p_v (log p_v - log q_v)."""
    hidden = activations_of(gpt2, tokens)
    spliced = torch.where(
        (tokens == BOS)[..., None], hidden, sae.decode(sae.encode(hidden))
    )

    def log_probabilities(activations: torch.Tensor) -> torch.Tensor:
        after = gpt2.transformer.h[1](activations)
        after = after[0] if isinstance(after, tuple) else after
        return gpt2.lm_head(gpt2.transformer.ln_f(after)).log_softmax(-1)

    log_p, log_q = log_probabilities(hidden), log_probabilities(spliced)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
    counted = (tokens[:, :-1] != BOS) & (tokens[:, 1:] != BOS)
    result = evaluate_sae(sae, model, tokens, HOOK, contexts_per_batch=3)
    assert result.kl_divergence == pytest.approx(
        divergences[counted].mean().item(), rel=1e-5
    )
    assert result.kl_divergence > 0.01


@torch.no_grad()
def test_an_sae_that_gives_the_mean_recovers_nothing(
    gpt2: GPT2LMHeadModel,
    model: HookedProxyLM,
    tokens: torch.Tensor,
    sae: JumpReLUSAE,
):
    sae.b_dec.copy_(activations_of(gpt2, tokens)[tokens != BOS].mean(0))
    sae.threshold.fill_(1e9)
    result = evaluate_sae(sae, model, tokens, HOOK)
    assert result.explained_variance == pytest.approx(0.0, abs=1e-12)
    assert result.loss_recovered_mean == pytest.approx(0.0, abs=1e-6)
    assert result.l0 == 0
    assert result.top_1_percent_share == 0


def test_what_is_special_can_be_told(
    model: HookedProxyLM, tokens: torch.Tensor, sae: JumpReLUSAE
):
    everything = evaluate_sae(sae, model, tokens, HOOK, special_token_ids=[])
    assert everything.n_tokens == tokens.numel()
    without_7 = evaluate_sae(sae, model, tokens, HOOK, special_token_ids=[BOS, 7])
    assert without_7.n_tokens == int(((tokens != BOS) & (tokens != 7)).sum())


def test_contexts_of_special_tokens_only_are_an_error(model: HookedProxyLM):
    tokens = torch.tensor([[1, 2, 1], [2, 3, 1]])
    with pytest.raises(ValueError, match="no two ordinary tokens in a row"):
        measure_baseline(model, tokens, HOOK, special_token_ids=[1, 2])


def test_a_baseline_can_be_shared(
    model: HookedProxyLM, tokens: torch.Tensor, sae: JumpReLUSAE
):
    baseline = measure_baseline(model, tokens, HOOK, [BOS])
    shared = evaluate_sae(sae, model, tokens, HOOK, baseline)
    assert shared.to_dict() == evaluate_sae(sae, model, tokens, HOOK).to_dict()


@torch.no_grad()
def test_a_hook_without_influence_is_an_error(
    gpt2: GPT2LMHeadModel, model: HookedProxyLM, tokens: torch.Tensor
):
    gpt2.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="leaves the model's loss as it is"):
        measure_baseline(model, tokens, HOOK, [BOS])


def test_the_share_of_the_hungriest_tokens():
    """Of 150 tokens the top 1% are ceil(1.5) = 2: (9 + 4) of 148 + 13 pairs."""
    counts = torch.ones(10, 15, dtype=torch.long)
    counts[3, 4], counts[7, 0] = 9, 4
    usage = Usage(
        explained_variance=0.0, features_per_token=counts, densities=torch.zeros(4)
    )
    assert usage.top_1_percent_share == pytest.approx(13 / 161)


def test_rare_features_include_dead_ones():
    densities = torch.tensor([0.0, 0.00009, 0.0001, 0.5], dtype=torch.float64)
    usage = Usage(
        explained_variance=0.0, features_per_token=torch.ones(1), densities=densities
    )
    assert (usage.dead_features, usage.rare_features) == (1, 2)
    assert usage.features_rarer_than(1e-5) == 1


@torch.no_grad()
def test_usage_on_activations_is_that_in_the_model(
    gpt2: GPT2LMHeadModel,
    model: HookedProxyLM,
    tokens: torch.Tensor,
    sae: JumpReLUSAE,
):
    activations = activations_of(gpt2, tokens)[tokens != BOS]
    usage = measure_usage(as_user(sae), activations, batch_size=10)
    in_model = evaluate_sae(sae, model, tokens, HOOK)
    assert usage.explained_variance == pytest.approx(in_model.explained_variance)
    assert torch.equal(usage.features_per_token, in_model.l0_counts)
    assert torch.equal(usage.densities, in_model.densities)


def test_figures_can_be_written_as_json(
    model: HookedProxyLM, tokens: torch.Tensor, sae: JumpReLUSAE
):
    figures = evaluate_sae(sae, model, tokens, HOOK).to_dict()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert sum(figures["l0_histogram"]) == figures["n_tokens"]
