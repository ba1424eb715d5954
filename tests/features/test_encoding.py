"""The pairs of every architecture of SAELens, against its own `encode`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_alloc.features import encoding
from sae_lens_alloc.features.encoding import encode_pairs
from sae_lens_alloc.features.figures import decoder_directions
from sae_lens_alloc.features.loading import load_readable_sae
from tests.training.source_saes import D_IN, D_SAE, K, make_source

ARCHITECTURES = ("topk", "jumprelu", "standard", "gated", "abstopk", "matching_pursuit")


def make_inference_sae(name: str) -> SAE[Any]:
    """With random weights."""
    if name in ("topk", "jumprelu", "standard", "gated"):
        return make_source(name, training=False)
    sae_class, config_class = SAE_CLASS_REGISTRY[name]
    settings: dict[str, Any] = {"k": K} if name == "abstopk" else {}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **settings))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pairs_are_those_of_encode(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    sae = make_inference_sae(name)
    x = torch.randn(50, D_IN)
    expected = sae.encode(x).to_dense().detach()
    assert 0 < (expected != 0).double().mean() < 1
    # several parts, the last one shorter
    monkeypatch.setattr(encoding, "LARGEST_DENSE", 7 * D_SAE)
    pairs = encode_pairs(sae, x)
    assert pairs.shape == (50, D_SAE)
    keys = pairs.token_indices * D_SAE + pairs.feature_indices
    assert (keys.diff() > 0).all()
    torch.testing.assert_close(pairs.to_dense(), expected)


@pytest.mark.parametrize("rescale", [True, False])
def test_directions_are_what_a_unit_of_activation_decodes_to(rescale: bool):
    torch.manual_seed(0)
    sae = make_source("topk", training=False, rescale=rescale)
    decoded = sae.decode(torch.eye(D_SAE)) - sae.decode(torch.zeros(1, D_SAE))
    torch.testing.assert_close(decoder_directions(sae), decoded.detach())


@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("name", ["batchtopk", "gated", "mutual_choice"])
def test_a_checkpoint_is_read_as_the_sae_it_would_be_saved_as(
    name: str, factor: float | None, tmp_path: Path
):
    """Also of a run whose activations were multiplied by a factor."""
    torch.manual_seed(0)
    trained: Any = make_source(name)
    if name == "batchtopk":
        trained.topk_threshold.fill_(0.5)
    trained.save_model(tmp_path / "checkpoint")
    if factor is not None:
        scaler = tmp_path / "checkpoint" / ACTIVATION_SCALER_CFG_FILENAME
        scaler.write_text(json.dumps({"scaling_factor": factor}))
        trained.fold_activation_norm_scaling_factor(factor)
    trained.save_inference_model(tmp_path / "saved")
    read = load_readable_sae(str(tmp_path / "checkpoint"))
    saved = SAE.load_from_disk(tmp_path / "saved")
    assert read.cfg.architecture() == saved.cfg.architecture()
    x = torch.randn(20, D_IN)
    torch.testing.assert_close(
        encode_pairs(read, x).to_dense(), saved.encode(x).to_dense().detach()
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "transcoder",
            "reads one place of the model and writes to another: give an SAE.",
        ),
        ("temporal", "encodes a whole context at a time: give an SAE."),
    ],
)
def test_what_has_no_features_of_a_token_is_refused(
    name: str, why: str, tmp_path: Path
):
    sae_class, config_class = SAE_CLASS_REGISTRY[name]
    settings: dict[str, Any] = (
        {"d_out": D_IN, "apply_b_dec_to_input": False}
        if name == "transcoder"
        else {"n_heads": 1, "bottleneck_factor": 1}
    )
    sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **settings)).save_model(tmp_path)
    with pytest.raises(ValueError, match=name) as caught:
        load_readable_sae(str(tmp_path))
    assert why in str(caught.value)


TRANSCODERS = [name for name in SAE_TRAINING_CLASS_REGISTRY if "transcoder" in name]


@pytest.mark.parametrize("name", TRANSCODERS)
def test_checkpoints_of_transcoders_are_refused(name: str, tmp_path: Path):
    registered: Any = SAE_TRAINING_CLASS_REGISTRY[name]
    sae_class, config_class = registered
    settings: dict[str, Any] = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE, "k": K}
    sae_class(config_class(**settings, apply_b_dec_to_input=False)).save_model(tmp_path)
    with pytest.raises(ValueError, match="which reads one place of the model and"):
        load_readable_sae(str(tmp_path))
