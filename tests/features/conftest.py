"""Random pairs, and the page of an SAE with random weights of the shipped language model."""

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.features.measure import measure_features
from sae_lens_alloc.features.page import FeaturePage
from tests.helpers import one_thread
from tests.training.conftest import (
    CORPUS,
    D_MODEL,
    HOOK,
    MODEL,
    MODEL_CLASS,
    demo_model,
)

__all__ = ["demo_model", "one_thread"]


def random_dense(n_tokens: int, n_features: int, share: float) -> torch.Tensor:
    """Activations of which a share is active, with ties; the last feature is dead."""
    values = torch.randint(1, 9, (n_tokens, n_features)) / 4
    active = torch.rand(n_tokens, n_features) < share
    active[:, -1] = False
    return values * active


def pairs_of(dense: torch.Tensor) -> SparseActivations:
    tokens, features = dense.nonzero(as_tuple=True)
    shape = (dense.shape[0], dense.shape[1])
    return SparseActivations(tokens, features, dense[tokens, features], shape)


N_FEATURES, LENGTH, N_TOKENS = 150, 64, 2048
# features that are never active
DEAD = (7, 149)


def make_readable_sae(hook_name: str = HOOK) -> JumpReLUSAE:
    """An SAE with random weights that says what it is of."""
    torch.manual_seed(0)
    metadata = SAEMetadata(
        model_name=MODEL,
        model_class_name=MODEL_CLASS,
        hook_name=hook_name,
        dataset_path=CORPUS,
        context_size=LENGTH,
        prepend_bos=True,
    )
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, metadata=metadata)
    )
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_()
        sae.b_enc.zero_()
        sae.threshold.copy_(torch.linspace(8, 24, N_FEATURES))
        sae.threshold[list(DEAD)] = torch.inf
    return sae


@pytest.fixture(scope="session")
def page() -> FeaturePage:
    sae = make_readable_sae()
    text = text_of_sae(sae)
    return measure_features(sae, text, N_TOKENS, torch.arange(N_FEATURES), "an <SAE>")
