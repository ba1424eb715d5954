"""Helpers of the SAE tests: tiny SAEs, training steps, and the dense formulas they must equal."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from tests.helpers import one_thread

__all__ = ["one_thread"]

ARCHITECTURES = ("mutual_choice", "feature_choice")
LN_EPS = 1e-5  # SAELens' layer_norm
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_sae(
    architecture: str = "mutual_choice",
    seed: int = 0,
    b_enc: float | None = None,
    **overrides: Any,
) -> AllocationTrainingSAE[Any]:
    """
    SAE with random weights: decoder norms between 0.3 and 3, so that forgetting them shows,
    and an encoder that is not the decoder's transpose.

    Args:
        architecture: One of this package's.
        seed: Seed of the weights and of the quota remainders.
        b_enc: Encoder bias of every feature; random and small by default.
        overrides: Config fields; 8 inputs, 32 features, k 3, no auxiliary loss, no margin and
            no Feature Choice before Mutual Choice otherwise.
    """
    settings: dict[str, Any] = {
        "d_in": 8,
        "d_sae": 32,
        "k": 3,
        "aux_loss": "none",
        "selection_margin": 0.0,
        **({"feature_choice_steps": 0} if "mutual_choice" in architecture else {}),
        **overrides,
    }
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the quota remainders
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    sae = sae_class(config_class(**settings))
    assert isinstance(sae, AllocationTrainingSAE)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    norms = torch.logspace(-0.5, 0.5, d_sae, dtype=torch.float64)
    directions = normal(d_sae, d_in)
    directions /= directions.norm(dim=1, keepdim=True)
    set_weights(
        sae,
        W_dec=directions[torch.randperm(d_sae, generator=generator)] * norms[:, None],
        W_enc=normal(d_in, d_sae) / d_in**0.5,
        b_enc=0.1 * normal(d_sae) if b_enc is None else torch.full((d_sae,), b_enc),
        b_dec=0.1 * normal(d_in),
    )
    return sae


def set_weights(sae: TrainingSAE[Any], **weights: torch.Tensor) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            getattr(sae, name).copy_(value)


def weights_of(sae: TrainingSAE[Any]) -> dict[str, torch.Tensor]:
    return {name: getattr(sae, name).detach() for name in WEIGHTS}


def tokens(
    *shape: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Random activations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def training_step(
    sae: TrainingSAE[Any],
    x: torch.Tensor,
    step: int = 0,
    dead: torch.Tensor | None = None,
) -> TrainStepOutput:
    """One forward pass of training, as SAELens' trainer calls it, all coefficients 1."""
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=dict.fromkeys(sae.get_coefficients(), 1.0),
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
        )
    )


def gradients(sae: TrainingSAE[Any], loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all weights, zeros where there is none."""
    sae.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in sae.named_parameters()
    }


def statistics(sae: TrainingSAE[Any]) -> AllocationStatistics:
    """Thresholds, densities and quota remainders."""
    assert isinstance(sae, AllocationTrainingSAE)
    return sae.allocation


def state_of(sae: TrainingSAE[Any]) -> dict[str, torch.Tensor]:
    """A copy of the weights and of all statistics."""
    return copy.deepcopy(dict(sae.state_dict()))


def changed(before: dict[str, torch.Tensor], sae: TrainingSAE[Any]) -> set[str]:
    """Names of the weights and statistics that are not bit for bit as before."""
    after = sae.state_dict()
    assert set(after) == set(before)
    return {
        name
        for name, value in before.items()
        if value.dtype != after[name].dtype or not torch.equal(value, after[name])
    }


def active_mask(output: TrainStepOutput) -> torch.Tensor:
    """Boolean matrix of shape (B, F) of the pairs that a training step selected."""
    acts = output.feature_acts
    return (acts.to_dense() if acts.is_sparse else acts).reshape(
        -1, acts.shape[-1]
    ) != 0


def mutual_mask(affinities: torch.Tensor, budget: int) -> torch.Tensor:
    """By brute force: the `budget` largest positive entries of a matrix."""
    mask = torch.zeros_like(affinities, dtype=torch.bool)
    pairs = [
        (-value, token, feature)
        for token, row in enumerate(affinities.tolist())
        for feature, value in enumerate(row)
        if value > 0
    ]
    for _, token, feature in sorted(pairs)[:budget]:
        mask[token, feature] = True
    return mask


def selection_gradient(
    affinities: torch.Tensor,
    budget: int,
    n_margin: int,
    error: Callable[[torch.Tensor], float],
) -> torch.Tensor:
    """
    Gradient by way of who is selected, with respect to the affinities, shape (B, F): each
    pair of the margin is put in, and what that changes the error by is compared with the mean
    over the margin.

    Args:
        affinities: Affinities of shape (B, F).
        budget: Number of active pairs.
        n_margin: Pairs of the margin below the cut.
        error: The error with a mask of active pairs, bool of shape (B, F).
    """
    mask = mutual_mask(affinities, budget)
    margin = mutual_mask(affinities, budget + n_margin)
    margin &= ~mask
    assert margin.sum() == n_margin
    gradient = torch.zeros_like(affinities)
    for token, feature in margin.nonzero().tolist():
        inside = mask.clone()
        inside[token, feature] = True
        gradient[token, feature] = error(inside) - error(mask)
    gradient[margin] -= gradient[margin].mean()
    return gradient / (affinities[margin].max() - affinities[margin].min())


def feature_mask(affinities: torch.Tensor, quotas: list[int]) -> torch.Tensor:
    """By brute force: the `quotas[j]` largest positive entries of each column j."""
    mask = torch.zeros_like(affinities, dtype=torch.bool)
    for feature, quota in enumerate(quotas):
        column = affinities[:, feature].tolist()
        positive = [token for token, value in enumerate(column) if value > 0]
        for token in sorted(positive, key=lambda token: -column[token])[:quota]:
            mask[token, feature] = True
    return mask


def top_k_mask(affinities: torch.Tensor, features: list[int], k: int) -> torch.Tensor:
    """By brute force: for each row its k largest entries within `features`, of any sign."""
    mask = torch.zeros_like(affinities, dtype=torch.bool)
    for token, row in enumerate(affinities.tolist()):
        for feature in sorted(features, key=lambda feature: -row[feature])[:k]:
            mask[token, feature] = True
    return mask


@dataclass
class DenseStep:
    """What the dense formulas give; all tensors float64, tokens flattened to (B, ...)."""

    affinities: torch.Tensor
    sae_out: torch.Tensor
    mse_loss: torch.Tensor
    aux_loss: torch.Tensor
    grads: dict[str, torch.Tensor]


class DenseSAE:
    """
    The SAE by SAELens' dense formulas in float64 and plain autograd, with a given mask:

    - affinities a = (x' W_enc + b_enc) * ||W_dec||, with x' the normalized input less b_dec
    - reconstruction x^ = out_norm((mask * a) / ||W_dec|| W_dec + b_dec)
    - mse = mean over tokens of ||x^ - x||^2
    - aux = coefficient * mean ||out_scale * (aux_mask * a) / ||W_dec|| W_dec - sg(x - x^)||^2

    As in SAELens' own, the gradient runs through the decoder norms.
    """

    def __init__(self, sae: AllocationTrainingSAE[Any]) -> None:
        self.cfg = sae.cfg
        self.weights = {
            name: value.double().clone().requires_grad_()
            for name, value in weights_of(sae).items()
        }

    def affinities(self, x: torch.Tensor) -> torch.Tensor:
        sae_in, _, _ = self._normalized(x)
        if self.cfg.apply_b_dec_to_input:
            sae_in = sae_in - self.weights["b_dec"]
        affinities = sae_in @ self.weights["W_enc"] + self.weights["b_enc"]
        if self.cfg.rescale_acts_by_decoder_norm:
            affinities = affinities * self.weights["W_dec"].norm(dim=1)
        return affinities

    def step(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        aux_mask: torch.Tensor | None = None,
        aux_coefficient: float = 0.0,
    ) -> DenseStep:
        flat = x.double().reshape(-1, self.cfg.d_in)
        affinities = self.affinities(flat)
        _, mean, std = self._normalized(flat)
        recons = self._decode(affinities * mask) + self.weights["b_dec"]
        sae_out = recons * std + mean
        mse_loss = (sae_out - flat).pow(2).sum(1).mean()
        aux_loss = torch.zeros((), dtype=torch.float64)
        if aux_mask is not None:
            residual = (flat - sae_out).detach()
            # std is the linear part of the output normalization, and has no bias
            aux_recons = self._decode(affinities * aux_mask) * std
            aux_loss = aux_coefficient * (aux_recons - residual).pow(2).sum(1).mean()
        names = list(self.weights)
        grads = torch.autograd.grad(
            mse_loss + aux_loss, [self.weights[name] for name in names]
        )
        return DenseStep(
            affinities=affinities.detach(),
            sae_out=sae_out.detach(),
            mse_loss=mse_loss.detach(),
            aux_loss=aux_loss.detach(),
            grads=dict(zip(names, grads, strict=True)),
        )

    def _decode(self, acts: torch.Tensor) -> torch.Tensor:
        if self.cfg.rescale_acts_by_decoder_norm:
            acts = acts / self.weights["W_dec"].norm(dim=1)
        return acts @ self.weights["W_dec"]

    def _normalized(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The encoder's input, and what the output is shifted and scaled by."""
        x = x.double()
        if self.cfg.normalize_activations != "layer_norm":
            return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (std + LN_EPS), mean, std


def assert_grads_equal(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    rtol: float = 1e-9,
    atol: float = 1e-12,
) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value.to(actual[name].dtype),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )
