"""What features do on text, against the language model and `encode` on the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE

from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.features import activity
from sae_lens_alloc.features.activity import measure_activity
from tests.features.conftest import LENGTH, N_FEATURES, make_readable_sae
from tests.training.conftest import D_MODEL, HOOK, load_demo_model


def encoded(sae: SAE[Any], model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Activations of all tokens, one context at a time, none of BOS."""
    bos = model.tokenizer.bos_token_id
    rows = [
        sae.encode(model.run_with_cache(context[None])[1][HOOK][0])
        for context in tokens
    ]
    return torch.cat(rows) * (tokens.flatten() != bos)[:, None]


def test_pairs_are_those_of_the_text(demo_model: Any):
    sae = make_readable_sae()
    # 9 contexts and a part of one, in two batches
    found = measure_activity(sae, demo_model, text_of_sae(sae), 9 * LENGTH + 1)
    bos = demo_model.tokenizer.bos_token_id
    assert found.tokens.shape == (10, LENGTH)
    assert (found.tokens[:, 0] == bos).all()
    assert torch.equal(found.ordinary, found.tokens != bos)
    assert found.n_tokens == int((found.tokens != bos).sum())
    assert found.pairs.shape == (10 * LENGTH, N_FEATURES)
    expected = encoded(sae, demo_model, found.tokens).detach()
    assert (expected > 0).any(0).sum() > N_FEATURES // 2
    dense = found.pairs.to_dense()
    torch.testing.assert_close(dense, expected, atol=1e-3, rtol=1e-3)
    some = torch.tensor([80, 3, 7])
    torch.testing.assert_close(found.of_features(some).to_dense(), dense[:, some])


def test_positions_that_training_left_out_are_not_shown(demo_model: Any):
    sae = make_readable_sae()
    sae.cfg.metadata.seqpos_slice = [5, 60]
    found = measure_activity(sae, demo_model, text_of_sae(sae), 100)
    assert found.tokens.shape == (2, 55)
    sae.cfg.metadata.seqpos_slice = None
    whole = measure_activity(sae, demo_model, text_of_sae(sae), 128)
    assert torch.equal(found.tokens, whole.tokens[:, 5:60])
    expected = whole.pairs.to_dense().view(2, LENGTH, -1)[:, 5:60]
    torch.testing.assert_close(
        found.pairs.to_dense().view(2, 55, -1), expected, atol=1e-3, rtol=1e-3
    )


def test_a_text_that_ends_before_is_taken_as_it_is(tmp_path: Path, demo_model: Any):
    sae = make_readable_sae()
    Dataset.from_dict({"text": ["x = 1\n" * 60]}).save_to_disk(tmp_path / "text")
    text = text_of_sae(sae, dataset_path=str(tmp_path / "text"))
    found = measure_activity(sae, demo_model, text, 10_000)
    assert 1 <= len(found.tokens) < 10
    Dataset.from_dict({"text": ["x = 1\n"]}).save_to_disk(tmp_path / "short")
    text = text_of_sae(sae, dataset_path=str(tmp_path / "short"))
    with pytest.raises(ValueError, match="has not one context of 64 tokens: give more"):
        measure_activity(sae, demo_model, text, 10_000)


def test_too_many_active_features_are_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    sae = make_readable_sae()
    sae.threshold.data.zero_()  # about half of the features on every token
    monkeypatch.setattr(activity, "LARGEST_N_PAIRS", 10_000)
    with pytest.raises(ValueError, match=r"activates about \d+ features per") as caught:
        measure_activity(sae, load_demo_model(), text_of_sae(sae), 2048)
    wanted = int(str(caught.value).split("--tokens ")[1].split()[0])
    assert 50 < wanted < 300


def test_activations_of_abstopk_are_without_sign(demo_model: Any):
    registered: Any = SAE_CLASS_REGISTRY["abstopk"]
    sae_class, config_class = registered
    metadata = make_readable_sae().cfg.metadata
    sae = sae_class(config_class(d_in=D_MODEL, d_sae=20, k=4, metadata=metadata))
    found = measure_activity(sae, demo_model, text_of_sae(sae), LENGTH)
    expected = encoded(sae, demo_model, found.tokens).detach()
    assert (expected < 0).any()
    torch.testing.assert_close(
        found.pairs.to_dense(), expected.abs(), atol=1e-3, rtol=1e-3
    )
