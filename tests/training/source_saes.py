"""SAEs to be converted, with random weights, and what they compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    make_sae,
    statistics,
)

D_IN, D_SAE, K = 8, 32, 3
RANKING = ("topk", "batchtopk", "matryoshka_batchtopk")
# architecture, whether a training SAE, whether it ranks by decoder norm (None: it does not rank)
SOURCES = [
    *[(name, True, rescale) for name in RANKING for rescale in (True, False)],
    *[("topk", False, rescale) for rescale in (True, False)],
    *[
        (name, training, None)
        for name in ("jumprelu", "standard", "gated")
        for training in (True, False)
    ],
    *[(name, True, rescale) for name in ARCHITECTURES for rescale in (True, False)],
    *[(f"{name}_aux_zipf", True, True) for name in RANKING],
    *[(f"{name}_aux_zipf", True, None) for name in ("jumprelu", "standard", "gated")],
]
VARIANT = ("name", "training", "rescale")
EACH_SOURCE = pytest.mark.parametrize(VARIANT, SOURCES)
EACH_SOURCE_WITH_THRESHOLDS = pytest.mark.parametrize(
    VARIANT, [source for source in SOURCES if not source[0].startswith("topk")]
)


def make_source(
    name: str, training: bool = True, rescale: bool | None = None, **settings: Any
) -> SAE[Any]:
    """An SAE with random weights, decoder norms between 0.3 and 3, and random thresholds."""
    if rescale is not None:
        settings["rescale_acts_by_decoder_norm"] = rescale
    if name in ARCHITECTURES:
        sae = make_sae(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, **settings})
        statistics(sae).threshold.copy_(0.1 + torch.rand(D_SAE))
        return sae
    base = name.removesuffix("_aux_zipf")
    if base in RANKING:
        settings.setdefault("k", K)
    if base == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [8, D_SAE]
    registry: dict[str, Any] = (
        SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    )
    sae_class, config_class = registry[name]
    sae = sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, **settings}))
    weights = make_sae(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            if parameter_name in ("W_enc", "W_dec", "b_dec"):
                parameter.copy_(weights.get_parameter(parameter_name))
            else:  # biases, and thresholds of both signs
                parameter.copy_(0.3 * torch.randn(sae.cfg.d_sae, generator=generator))
        if base == "jumprelu" and training:
            sae.threshold.clamp_(min=0.0)  # as each of its training steps does
        if "topk_threshold" in dict(sae.named_buffers()):
            sae.topk_threshold.fill_(0.8)
    return sae


def affinities_of(source: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    """Pre-activations as the source's own hook shows them, times the norm where it ranks so."""
    seen: list[torch.Tensor] = []

    def take(pre_acts: torch.Tensor, hook: Any) -> None:
        seen.append(pre_acts)

    with torch.no_grad():
        source.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", take)])
    if getattr(source.cfg, "rescale_acts_by_decoder_norm", False):
        return seen[0] * source.W_dec.norm(dim=1)
    return seen[0]


def reconstruct(
    sae: AllocationTrainingSAE[Any], x: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The SAE's reconstruction from the pairs of a mask, in the sparse currency."""

    def select(encoder: Any, inputs: torch.Tensor) -> SparseActivations:
        rows, features = mask.nonzero(as_tuple=True)
        values = encoder.affinities(inputs)[rows, features]
        return SparseActivations(rows, features, values, (len(x), D_SAE))

    return sae.autoencode_selected(x, select)[1]


def explained_variance(sae_out: torch.Tensor, x: torch.Tensor) -> float:
    residual = (sae_out.double() - x.double()).pow(2).sum()
    return 1 - (residual / (x.double() - x.double().mean(0)).pow(2).sum()).item()


def by_thresholds(source: SAE[Any], folder: Path) -> SAE[Any]:
    """What the source is at inference: of batchtopk, the JumpReLU SAE that SAELens saves."""
    if not isinstance(source, BatchTopKTrainingSAE):
        return source.eval()
    source.save_inference_model(folder)
    return SAE.load_from_disk(folder)
