"""SAEs in the form of sparsify and dictionary_learning, read by their own loaders."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

from sae_lens_alloc.sharing.other_forms import (
    save_for_dictionary_learning,
    save_for_sparsify,
)
from tests.cli.commands import invoke
from tests.helpers import one_thread
from tests.training.source_saes import D_IN, D_SAE, by_thresholds, make_source

__all__ = ["one_thread"]

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}


def tokens() -> torch.Tensor:
    return torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))


def outputs(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as affinities, which do not depend on the norms of the decoder, and x'."""
    activations = sae.encode(x).to_dense()
    assert 1 < (activations > 0).sum(1).float().mean() < D_SAE
    return activations, sae(x)


@pytest.mark.parametrize(
    ("name", "training", "rescale"),
    [
        ("mutual_choice", True, True),
        ("batchtopk", True, True),
        ("jumprelu", False, None),
        ("standard", False, None),
        ("gated", False, None),
        ("topk", False, True),
        ("topk", False, False),
    ],
)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@torch.no_grad()
def test_dictionary_learning_computes_the_same(
    tmp_path: Path,
    name: str,
    training: bool,
    rescale: bool | None,
    apply_b_dec_to_input: bool,
):
    utils: Any = pytest.importorskip("dictionary_learning.utils")
    source: Any = make_source(
        name, training, rescale, apply_b_dec_to_input=apply_b_dec_to_input
    )
    sae = by_thresholds(source, tmp_path / "a") if name == "batchtopk" else source
    if name == "mutual_choice":
        source.save_inference_model(tmp_path / "a")
        sae = SAE.load_from_disk(tmp_path / "a")
    (tmp_path / "theirs").mkdir()
    save_for_dictionary_learning(sae, tmp_path / "theirs")
    theirs, config = utils.load_dictionary(str(tmp_path / "theirs"), "cpu")
    x = tokens()
    activations, reconstruction = outputs(sae, x)
    found, activations_found = theirs(x, output_features=True)
    torch.testing.assert_close(activations_found, activations, **TOLERANCE)
    torch.testing.assert_close(found, reconstruction, **TOLERANCE)
    assert config["trainer"]["dict_size"] == D_SAE


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@torch.no_grad()
def test_sparsify_computes_the_same(
    tmp_path: Path,
    rescale: bool,
    apply_b_dec_to_input: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(os.environ, "SPARSIFY_DISABLE_TRITON", "1")
    pytest.importorskip("sparsify")
    sparsify: Any = import_module("sparsify")
    sae = make_source("topk", False, rescale, apply_b_dec_to_input=apply_b_dec_to_input)
    save_for_sparsify(sae, tmp_path)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    x = tokens()
    activations, reconstruction = outputs(sae, x)
    found = theirs(x)
    dense = torch.zeros(len(x), D_SAE)
    dense.scatter_(1, found.latent_indices.long(), found.latent_acts)
    torch.testing.assert_close(dense, activations, **TOLERANCE)
    torch.testing.assert_close(found.sae_out, reconstruction, **TOLERANCE)


def test_what_they_cannot_hold_is_one_sentence(tmp_path: Path):
    jumprelu = make_source("jumprelu", False)
    with pytest.raises(ValueError, match="TopK SAEs alone.*hold a jumprelu SAE"):
        save_for_sparsify(jumprelu, tmp_path)
    normalized = StandardSAE(
        StandardSAEConfig(d_in=4, d_sae=8, normalize_activations="layer_norm")
    )
    with pytest.raises(ValueError, match="changes its input by layer_norm when"):
        save_for_dictionary_learning(normalized, tmp_path)
    transcoder = JumpReLUTranscoder(
        JumpReLUTranscoderConfig(d_in=4, d_sae=8, d_out=4, apply_b_dec_to_input=False)
    )
    with pytest.raises(ValueError, match="architecture is jumprelu_transcoder"):
        save_for_dictionary_learning(transcoder, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_push_writes_one_folder_or_one_for_each(tmp_path: Path):
    for name in ("a", "b"):
        make_source("topk", False, True).save_model(tmp_path / "all" / name)
    one, several = tmp_path / "one", tmp_path / "several"
    sae = str(tmp_path / "all" / "a")
    result = invoke("push", sae, "--to-dictionary-learning", str(one))
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in one.iterdir()} == {"ae.pt", "config.json"}
    result = invoke("push", str(tmp_path / "all"), "--to-sparsify", str(several))
    assert result.exit_code == 0, result.stderr
    files = {path.relative_to(several).as_posix() for path in several.rglob("*.*")}
    assert files == {
        f"{sae}/{name}" for sae in "ab" for name in ("cfg.json", "sae.safetensors")
    }
    # what is there stays
    result = invoke("push", sae, "--to-sparsify", str(one))
    assert result.exit_code == 1
    assert "is not empty: give --overwrite" in result.stderr
