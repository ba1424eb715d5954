"""Architectures with aux_zipf_loss, made of others: what is made, and what is refused."""

import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens import AbsTopKTrainingSAE, TopKTrainingSAE
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_training_class,
)
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE

from sae_lens_alloc import MutualChoiceTrainingSAE, with_aux_zipf
from sae_lens_alloc.saes import with_aux_zipf as with_aux_zipf_module
from tests.saes.conftest import gradients, tokens, training_step
from tests.saes.test_aux_zipf import BASES, LOSS, dead_mask, make, settings

ADDED = {
    "aux_loss_coefficient",
    "aux_loss_decay_start",
    "k_aux",
    "underuse_fraction",
    "density_window_tokens",
}


@pytest.mark.parametrize("base", BASES)
def test_import_registers_the_architecture(base: str):
    base_class, base_config = get_sae_training_class(base)
    sae_class, config_class = get_sae_training_class(f"{base}_aux_zipf")
    assert issubclass(sae_class, base_class)
    assert issubclass(config_class, base_config)
    assert config_class.architecture() == f"{base}_aux_zipf"
    fields, base_fields = (
        {f.name for f in dataclasses.fields(c)} for c in (config_class, base_config)
    )
    assert fields == base_fields | ADDED
    assert with_aux_zipf(base_class) is sae_class
    assert with_aux_zipf(base_class).config_class is config_class
    # as they go to another process
    cfg = config_class.from_dict(settings(base))
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    for made in (sae_class, config_class):
        assert pickle.loads(pickle.dumps(made)) is made


def test_a_class_that_was_never_made_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoAuxZipfTrainingSAE"):
        _ = with_aux_zipf_module.NoAuxZipfTrainingSAE


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "topk",
            "with_aux_zipf takes a training SAE class of SAELens, such as "
            "BatchTopKTrainingSAE, got 'topk'.",
        ),
        (
            torch.nn.Linear,
            "with_aux_zipf takes a training SAE class of SAELens, such as "
            "BatchTopKTrainingSAE, got <class 'torch.nn.modules.linear.Linear'>.",
        ),
        (
            get_sae_training_class("topk_aux_zipf")[0],
            "TopKAuxZipfTrainingSAE has aux_zipf_loss already.",
        ),
        (
            MutualChoiceTrainingSAE,
            "MutualChoiceTrainingSAE has aux_zipf_loss already: give its config "
            'aux_loss="aux_zipf".',
        ),
        (
            type("Mine", (TopKTrainingSAE,), {}),
            "Mine is not registered with SAELens, so its config class is not known: call "
            "sae_lens.register_sae_training_class first.",
        ),
    ],
)
def test_what_cannot_have_the_loss_is_refused_in_one_sentence(
    argument: Any, sentence: str
):
    before = dict(SAE_TRAINING_CLASS_REGISTRY)
    with pytest.raises(ValueError) as error:
        with_aux_zipf(argument)
    assert str(error.value) == sentence
    assert before == SAE_TRAINING_CLASS_REGISTRY


@pytest.fixture
def registries_as_before() -> Iterator[None]:
    """Takes out again what with_aux_zipf registers, which other tests would find."""
    registries: list[Any] = [SAE_TRAINING_CLASS_REGISTRY, SAE_CLASS_REGISTRY]
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.usefixtures("registries_as_before")
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_architecture_without_an_encoder_bias_is_refused():
    sae_class = with_aux_zipf(MatchingPursuitTrainingSAE)
    with pytest.raises(ValueError) as error:
        sae_class(sae_class.config_class(d_in=8, d_sae=32))
    assert str(error.value) == (
        "matching_pursuit_aux_zipf cannot be trained: aux_zipf_loss needs an encoder "
        "x W_enc + b_enc, and MatchingPursuitAuxZipfTrainingSAE has no b_enc."
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"use_matryoshka_aux_loss": True},
            "use_matryoshka_aux_loss has no effect on matryoshka_batchtopk_aux_zipf, where "
            "aux_zipf_loss takes the place of SAELens' auxiliary loss: leave it out.",
        ),
        ({"k_aux": 33}, "k_aux must be in [1, d_sae = 32] or None, got 33."),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(
    overrides: dict[str, Any], sentence: str
):
    with pytest.raises(ValueError) as error:
        make("matryoshka_batchtopk", **overrides)
    assert str(error.value) == sentence


@pytest.mark.usefixtures("registries_as_before")
def test_features_that_fire_in_both_directions_are_picked_by_their_signed_affinity():
    sae_class = with_aux_zipf(AbsTopKTrainingSAE)
    sae = sae_class(sae_class.config_class(**settings("abstopk", k_aux=1)))
    with torch.no_grad():
        for weight in (sae.W_enc, sae.get_parameter("b_enc"), sae.b_dec):
            weight.zero_()
        sae.get_parameter("b_enc")[[4, 9]] = torch.tensor([-5.0, 1.0]).double()
    x = tokens(5, 8, dtype=torch.float64)
    output = training_step(sae, x, 0, dead_mask())
    grads = gradients(sae, output.losses[LOSS])
    assert grads["W_dec"].any(dim=1).nonzero().flatten().tolist() == [9]
