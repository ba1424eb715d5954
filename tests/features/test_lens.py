"""The logit lens against the formula in float64, of several kinds of language models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae_lens_alloc.features import lens
from sae_lens_alloc.features.lens import Unembedding, find_unembedding, logit_lens
from tests.training.conftest import D_MODEL, HOOK, MODEL

D, VOCABULARY, N_WORDS = 12, 40, 37


class Tokenizer(SimpleNamespace):
    """Of fewer words than the vocabulary is padded to."""

    def __len__(self) -> int:
        return N_WORDS


def proxy(model: Any, d: int) -> HookedProxyLM:
    """SAELens' proxy of a model, whose weights of norms are random, too."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter)
    tokenizer: Any = Tokenizer()
    return HookedProxyLM(model.eval(), tokenizer, hook_names=[])


def llama(d: int, kind: str = "Llama") -> Any:
    settings: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": d, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        **{"head_dim": 4, "tie_word_embeddings": False},
    }
    if kind == "Gemma":
        return GemmaForCausalLM(GemmaConfig(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def gpt2(d: int) -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=d, n_layer=1, n_head=1
    )
    return GPT2LMHeadModel(config)


def check(found: Unembedding | str, W_U: Any, gain: Any, is_centred: bool):
    """Compares with directions through the norm's weight, centred for LayerNorm, and W_U."""
    assert isinstance(found, Unembedding)
    W_U, gain = W_U.detach().double(), gain.detach().double()
    directions = torch.randn(5, W_U.shape[0]).double()
    centred = directions - directions.mean(1, keepdim=True)
    logits = (centred if is_centred else directions) * gain @ W_U
    expected = logits - logits.mean(1, keepdim=True)
    effects = found.effects(directions.float())
    torch.testing.assert_close(effects.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("d", [D, D + 1])
def test_of_hugging_face_models(d: int):
    torch.manual_seed(0)
    of = lambda model: find_unembedding(proxy(model, d), "model.layers.0", d)  # noqa: E731
    model = gpt2(d)
    found = of(model)
    W_U = model.lm_head.weight[:N_WORDS].T
    check(found, W_U, model.transformer.ln_f.weight, True)
    model = llama(d)
    found = of(model)
    check(found, model.lm_head.weight[:N_WORDS].T, model.model.norm.weight, False)
    model = llama(d, "Gemma")
    found = of(model)
    check(found, model.lm_head.weight[:N_WORDS].T, 1 + model.model.norm.weight, False)


def test_of_a_hooked_transformer():
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        **{"n_layers": 1, "d_model": D, "n_ctx": 8, "d_head": 4, "n_heads": 1},
        **{"d_vocab": VOCABULARY, "act_fn": "gelu", "device": "cpu"},
    }
    model: Any = HookedTransformer({**settings, "normalization_type": "LN"})
    torch.nn.init.normal_(model.ln_final.w)
    found = find_unembedding(model, "blocks.0.hook_resid_post", D)
    check(found, model.W_U, model.ln_final.w, True)
    model = HookedTransformer({**settings, "normalization_type": "RMS"})
    torch.nn.init.normal_(model.ln_final.w)
    found = find_unembedding(model, "blocks.0.hook_mlp_out", D)
    check(found, model.W_U, model.ln_final.w, False)
    model = HookedTransformer({**settings, "normalization_type": None})
    found = find_unembedding(model, "blocks.0.hook_resid_pre", D)
    check(found, model.W_U, torch.ones(D), False)


def test_of_a_bridge(demo_model: Any):
    bridge: Any = TransformerBridge.boot_transformers(MODEL, device="cpu")
    plain = demo_model.model
    found = find_unembedding(bridge, "blocks.2.hook_out", D_MODEL)
    check(found, plain.lm_head.weight.T, plain.transformer.ln_f.weight, True)


@pytest.mark.parametrize("largest_block", [2**25, 3 * VOCABULARY])
def test_the_ends_of_each_feature(monkeypatch: pytest.MonkeyPatch, largest_block: int):
    monkeypatch.setattr(lens, "LARGEST_BLOCK", largest_block)
    torch.manual_seed(0)
    unembedding = Unembedding(torch.randn(D, VOCABULARY), torch.rand(D), True)
    directions = torch.randn(7, D)
    found = logit_lens(unembedding, directions, k=3)
    effects = unembedding.effects(directions)
    for row in range(7):
        ranked = sorted(range(VOCABULARY), key=lambda i: -effects[row, i].item())
        assert found.largest[row].tolist() == ranked[:3]
        assert found.smallest[row].tolist() == ranked[:-4:-1]
        for ids, values in (
            (found.largest, found.largest_effects),
            (found.smallest, found.smallest_effects),
        ):
            assert values[row].tolist() == pytest.approx(
                effects[row, ids[row]].tolist(), abs=1e-5
            )


@pytest.mark.parametrize(
    ("hook", "d_in", "head", "why"),
    [
        (HOOK, D_MODEL + 1, None, "has 193 dimensions and the unembedding 192."),
        ("blocks.0.attn.hook_z", D_MODEL, None, "does not add to the residual stream."),
        ("transformer.h.0.ln_1", D_MODEL, None, "does not add to the residual stream."),
        (HOOK, D_MODEL, 0, "does not add to the residual stream."),
    ],
)
def test_where_there_is_none_it_says_why(
    demo_model: Any, hook: str, d_in: int, head: int | None, why: str
):
    found = find_unembedding(demo_model, hook, d_in, head)
    assert isinstance(found, str) and why in found


def test_a_model_without_unembedding_says_so():
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=D, n_layer=1, n_head=1)
    found = find_unembedding(proxy(GPT2Model(config), D), "h.0", D)
    assert isinstance(found, str) and "has no unembedding" in found
