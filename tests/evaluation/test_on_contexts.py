"""SAEs on contexts of a text, at hooks of heads and on parts of contexts."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.evaluation.metrics import Evaluation, evaluate_sae
from sae_lens_alloc.evaluation.on_contexts import OnContexts
from sae_lens_alloc.evaluation.usage import Usage

HOOK_Z = "blocks.0.attn.hook_z"
N_HEADS, D_HEAD, LENGTH = 2, 4, 12
D_Z = N_HEADS * D_HEAD


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 8,
        "n_ctx": LENGTH,
        "d_head": D_HEAD,
    }
    return HookedTransformer(
        HookedTransformerConfig(
            **size, n_heads=N_HEADS, d_vocab=50, act_fn="relu", seed=1
        )
    )


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 50, (6, LENGTH), generator=generator)


def sae_of_heads(d_in: int, hook_name: str = HOOK_Z, seed: int = 3) -> StandardSAE:
    torch.manual_seed(seed)
    sae = StandardSAE(
        StandardSAEConfig(d_in=d_in, d_sae=24, reshape_activations="hook_z")
    )
    sae.cfg.metadata.hook_name = hook_name
    sae.turn_on_forward_pass_hook_z_reshaping()
    return sae


def on(
    model: HookedTransformer, tokens: torch.Tensor, d_in: int, **settings: Any
) -> OnContexts:
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=d_in, d_sae=24),
        hook_name=HOOK_Z,
        context_size=LENGTH,
        prepend_bos=False,
        train_batch_size_tokens=LENGTH,
        device="cpu",
        **settings,
    )
    text = Dataset.from_dict({"tokens": tokens.tolist()})
    store = ResumableActivationsStore.from_config(model, cfg, text)
    return OnContexts(store, cfg, tokens, [7])


@torch.no_grad()
def test_the_heads_of_a_token_are_one_vector(
    model: HookedTransformer, tokens: torch.Tensor
):
    """Spliced by hand: the SAE runs on the heads as SAELens shapes them."""
    sae = sae_of_heads(D_Z)

    def splice(z: torch.Tensor, hook: Any) -> torch.Tensor:
        replaced = sae(z)
        return torch.where((tokens == 7)[:, :, None, None], z, replaced)

    logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK_Z, splice)])
    counts = (tokens[:, :-1] != 7) & (tokens[:, 1:] != 7)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1][counts], tokens[:, 1:][counts]
    )
    found = evaluate_sae(sae, model, tokens, HOOK_Z, special_token_ids=[7])
    assert found.loss_with_sae == pytest.approx(losses.item(), rel=1e-5)
    assert sae.hook_z_reshaping_mode  # as it was
    sae.turn_off_forward_pass_hook_z_reshaping()
    measured = on(model, tokens, D_Z).measure(sae)
    assert isinstance(measured, Evaluation)
    assert measured.to_dict() == found.to_dict()
    z: torch.Tensor = model.run_with_cache(tokens)[1][HOOK_Z][tokens != 7].flatten(1)
    error = (sae(z) - z).double().square().sum()
    variance = (z - z.mean(0)).double().square().sum()
    assert found.explained_variance == pytest.approx(1 - (error / variance).item())


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "d_in"),
    [({"hook_head_index": 1}, D_HEAD), ({"seqpos_slice": (3, None)}, D_Z)],
)
def test_one_head_or_a_part_of_contexts_is_measured_without_the_model(
    model: HookedTransformer,
    tokens: torch.Tensor,
    settings: dict[str, Any],
    d_in: int,
):
    torch.manual_seed(4)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=24))
    on_contexts = on(model, tokens, d_in, **settings)
    found = on_contexts.measure(sae)
    assert type(found) is Usage
    assert on_contexts.snippets() == []
    z: torch.Tensor = model.run_with_cache(tokens)[1][HOOK_Z]
    x = z[:, :, 1] if d_in == D_HEAD else z[:, 3:].flatten(2)
    x = x[(tokens if d_in == D_HEAD else tokens[:, 3:]) != 7]
    assert found.n_tokens == len(x)
    acts = sae.encode(x)
    assert found.l0 == pytest.approx((acts > 0).sum(1).double().mean().item())
    error = (sae.decode(acts) - x).double().square().sum()
    variance = (x - x.mean(0)).double().square().sum()
    assert found.explained_variance == pytest.approx(1 - (error / variance).item())
