"""One training step of each architecture: gradients of a backend against the plain reference."""

import os
from dataclasses import replace
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput

from benchmarks.gpu.agreement import distance
from benchmarks.shape import Shape
from sae_lens_alloc import (
    FeatureChoiceTrainingSAE,
    FeatureChoiceTrainingSAEConfig,
    MatryoshkaMutualChoiceTrainingSAE,
    MatryoshkaMutualChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE

N_STEPS = 2
# Float32 sums in another order, over two steps of training.
LARGEST_DISTANCE = 1e-3


def check_gradients(backend: str, shape: Shape, device: str) -> dict[str, Any]:
    """
    Trains each architecture for two steps, a tenth of the features flagged, and compares the
    gradients of all weights with those of the reference.

    Returns:
        How many gradients there were, and how far those are off that disagree.
    """
    torch.set_float32_matmul_precision("highest")
    n_cases, wrong = 0, {}
    for name in architectures(shape, device):
        expected = _gradients(name, "reference", shape, device)
        actual = _gradients(name, backend, shape, device)
        for weight, gradient in expected.items():
            n_cases += 1
            off = distance(actual[weight], gradient)
            if not off <= LARGEST_DISTANCE:
                wrong[f"{name}, {weight}"] = f"off by {off:.1e} of its norm"
    return {"n_cases": n_cases, "wrong": wrong}


def architectures(shape: Shape, device: str) -> dict[str, Any]:
    """Classes and configs by name, each phase of the recipe by itself."""
    size: dict[str, Any] = {
        "d_in": shape.d_in,
        "d_sae": shape.d_sae,
        "k": shape.k,
        "device": device,
    }
    mutual = MutualChoiceTrainingSAEConfig(**size, feature_choice_steps=0)
    nested = MatryoshkaMutualChoiceTrainingSAEConfig(
        **size,
        feature_choice_steps=0,
        matryoshka_widths=[shape.d_sae // 4, shape.d_sae],
    )
    first_phase = replace(
        mutual,
        feature_choice_steps=N_STEPS,
        k_start=2.0 * shape.k,
        k_decay_steps=N_STEPS,
    )
    return {
        "mutual_choice": (MutualChoiceTrainingSAE, mutual),
        "mutual_choice, first quarter": (MutualChoiceTrainingSAE, first_phase),
        "matryoshka_mutual_choice": (MatryoshkaMutualChoiceTrainingSAE, nested),
        "feature_choice": (
            FeatureChoiceTrainingSAE,
            FeatureChoiceTrainingSAEConfig(**size),
        ),
    }


def _gradients(
    name: str, backend: str, shape: Shape, device: str
) -> dict[str, torch.Tensor]:
    """Gradients of the last of some steps of plain gradient descent."""
    os.environ[BACKEND_VARIABLE] = backend
    torch.manual_seed(0)
    sae_class, cfg = architectures(shape, device)[name]
    sae = sae_class(cfg).train()
    dead = torch.arange(shape.d_sae, device=device) < shape.n_dead
    gradients: dict[str, torch.Tensor] = {}
    for step in range(N_STEPS):
        x = torch.randn(shape.batch, shape.d_in, device=device)
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                dead_neuron_mask=dead,
                coefficients={},
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        sae.zero_grad()
        output.loss.backward()
        gradients = {
            weight: parameter.grad.clone()
            for weight, parameter in sae.named_parameters()
            if parameter.grad is not None
        }
        with torch.no_grad():
            for weight, gradient in gradients.items():
                sae.get_parameter(weight).sub_(1e-3 * gradient)
    return gradients
