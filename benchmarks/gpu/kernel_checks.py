"""Every kernel against plain formulas in float64, on the card and at odd shapes too."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.agreement import disagreement, distance, wrong_counts
from benchmarks.gpu.inputs import EncoderInputs, exact_inputs, random_inputs
from benchmarks.shape import Shape
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.encode_select import encode_and_count, encode_feature_choice
from sae_lens_alloc.ops.sparse import (
    sampled_products,
    sparse_times_dense,
    sparse_times_dense_transposed,
)
from sae_lens_alloc.ops.topk_selection import FeatureSubset, encode_topk


@dataclass(frozen=True)
class Setting:
    """
    Args:
        shape: Sizes of the tensors.
        dtype: Dtype of weights and inputs.
        backend: Backend that is checked.
        device: Where.
    """

    shape: Shape
    dtype: torch.dtype
    backend: str
    device: str

    def tolerance(self, inputs: EncoderInputs) -> float:
        """How far affinities may be off."""
        # torch's products of low precision are rounded to it, Triton's kernels keep float32
        is_triton = self.backend.startswith("triton")
        return inputs.tolerance(torch.float32 if is_triton else self.dtype)

    def inputs(self) -> Iterator[tuple[str, EncoderInputs]]:
        """What affinities come from, by name."""
        torch.manual_seed(0)
        yield "real numbers", random_inputs(self.shape, self.dtype, self.device)
        yield "ties", exact_inputs(self.shape, self.dtype, self.device)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums in float32 are off by less.
FLOAT32_DISTANCE = 1e-5
# What is wrong with each case by its name, None where nothing is.
Cases = Iterator[tuple[str, Callable[[], str | None]]]


def check_kernels(
    kernel: str,
    backend: str,
    dtype: torch.dtype,
    shapes: tuple[Shape, ...],
    device: str,
) -> dict[str, Any]:
    """
    Compares one kernel of a backend with its reference.

    Returns:
        How many cases there were, and what was wrong with those that disagree or raise.
    """
    os.environ[BACKEND_VARIABLE] = backend
    torch.set_float32_matmul_precision("highest")
    n_cases, wrong = 0, {}
    for shape in shapes:
        for name, check in KERNELS[kernel](Setting(shape, dtype, backend, device)):
            n_cases += 1
            try:
                complaint = check()
            except Exception as error:
                first_line = (str(error).strip() or "no message").splitlines()[0]
                complaint = f"{type(error).__name__}: {first_line}"
            if complaint is not None:
                size = f"{shape.batch} x {shape.d_in} to {shape.d_sae}"
                wrong[f"{name}, {size}"] = complaint
    return {"n_cases": n_cases, "wrong": wrong}


def products(setting: Setting) -> Cases:
    """Products of pairs in float32 with dense matrices of a dtype."""
    shape, device = setting.shape, setting.device
    generator = torch.Generator(device).manual_seed(1)
    n_pairs = shape.k * shape.batch
    positions = torch.randint(
        shape.batch * shape.d_sae, (n_pairs,), generator=generator, device=device
    )
    positions = positions.unique()
    rows, columns = positions // shape.d_sae, positions % shape.d_sae
    values = torch.randn(len(rows), generator=generator, device=device)
    matrix = torch.zeros(
        shape.batch, shape.d_sae, dtype=torch.float64, device=device
    ).index_put_((rows, columns), values.double())
    dense = torch.randn(shape.d_sae, shape.d_in, generator=generator, device=device)
    left = torch.randn(shape.batch, shape.d_in, generator=generator, device=device)
    dense = dense.to(setting.dtype)
    arguments = (rows, columns, values, shape.batch, dense)

    def too_far(actual: torch.Tensor, expected: torch.Tensor) -> str | None:
        off = distance(actual, expected)
        return None if off <= FLOAT32_DISTANCE else f"off by {off:.1e} of its norm"

    yield (
        "sparse_times_dense",
        lambda: too_far(sparse_times_dense(*arguments), matrix @ dense.double()),
    )
    yield (
        "sparse_times_dense_transposed",
        lambda: too_far(
            sparse_times_dense_transposed(*arguments), (matrix @ dense.double()).T
        ),
    )
    yield (
        "sampled_products",
        lambda: too_far(
            sampled_products(rows, columns, left, dense),
            (left.double() @ dense.double().T)[rows, columns],
        ),
    )


def mutual_choice(setting: Setting) -> Cases:
    """The budget's pairs and the counts above thresholds, whatever the guess of the cut is."""
    shape, device = setting.shape, setting.device
    for kind, inputs in setting.inputs():
        affinities, tolerance = inputs.affinities, setting.tolerance(inputs)
        budget = shape.k * shape.batch
        largest = affinities.flatten().topk(budget).values
        cut = largest[-1].clamp(min=1e-3).float()
        guesses = {"none": None, "good": cut, "high": 3 * cut, "low": cut / 100}
        thresholds = cut * (0.5 + torch.rand(shape.d_sae, device=device))

        def check(
            guess: torch.Tensor | None,
            inputs: EncoderInputs = inputs,
            tolerance: float = tolerance,
            thresholds: torch.Tensor = thresholds,
        ) -> str | None:
            pairs, counts = encode_and_count(
                inputs.encoder, inputs.x, budget, guess, thresholds
            )
            assert counts is not None
            numbers = torch.tensor([budget], device=device)
            return disagreement(
                pairs, inputs.affinities, numbers, "batch", tolerance
            ) or wrong_counts(counts, inputs.affinities, thresholds, tolerance)

        for name, guess in guesses.items():
            yield f"{kind}, guess {name}", lambda guess=guess, check=check: check(guess)


def feature_choice(setting: Setting) -> Cases:
    """Each feature's quota, demand and count above its threshold, whatever its bound is."""
    shape, device = setting.shape, setting.device
    for kind, inputs in setting.inputs():
        affinities, tolerance = inputs.affinities, setting.tolerance(inputs)
        mean_quota = max(1, shape.k * shape.batch // shape.d_sae)
        quotas = torch.randint(0, 2 * mean_quota + 1, (shape.d_sae,), device=device)
        quotas.clamp_(max=shape.batch)
        ordered = affinities.sort(dim=0, descending=True).values
        own_cuts = ordered.gather(0, (quotas - 1).clamp(min=0)[None])[0].float()
        own_cuts = own_cuts.clamp(min=1e-3)
        cut = own_cuts.median()
        thresholds = own_cuts * (0.5 + torch.rand_like(own_cuts))
        bounds = {
            "none": torch.zeros_like(own_cuts),
            "good": 0.9 * own_cuts,
            "high": 2 * own_cuts,
            "low": own_cuts / 100,
        }

        def check(
            bound: torch.Tensor,
            inputs: EncoderInputs = inputs,
            tolerance: float = tolerance,
            quotas: torch.Tensor = quotas,
            thresholds: torch.Tensor = thresholds,
            cut: torch.Tensor = cut,
        ) -> str | None:
            selection = encode_feature_choice(
                inputs.encoder,
                inputs.x,
                quotas,
                thresholds,
                cut,
                bound,
                int(quotas.sum()),
            )
            affinities = inputs.affinities
            return (
                disagreement(selection.pairs, affinities, quotas, "feature", tolerance)
                or wrong_counts(selection.demand, affinities, cut, tolerance)
                or wrong_counts(selection.above, affinities, thresholds, tolerance)
            )

        for name, bound in bounds.items():
            yield f"{kind}, bound {name}", lambda bound=bound, check=check: check(bound)


def auxiliary(setting: Setting) -> Cases:
    """Each token's largest affinities of the flagged features, negative ones too."""
    shape, device = setting.shape, setting.device
    for kind, inputs in setting.inputs():
        tolerance = setting.tolerance(inputs)
        if not setting.backend.startswith("triton"):
            tolerance = max(tolerance, 1e-9)  # equal ones in any order
        for share, k_aux in ((0.1, shape.k), (0.1, shape.d_in // 2), (1.0, shape.k)):
            flagged = torch.rand(shape.d_sae, device=device) < share
            flagged[0] = True

            def check(
                inputs: EncoderInputs = inputs,
                tolerance: float = tolerance,
                flagged: torch.Tensor = flagged,
                k_aux: int = k_aux,
            ) -> str | None:
                features = FeatureSubset(flagged)
                pairs = encode_topk(inputs.encoder, inputs.x, features, k_aux)
                numbers = torch.full((shape.batch,), k_aux, device=device)
                return disagreement(
                    pairs,
                    inputs.affinities.where(flagged, -torch.inf),
                    numbers.clamp(max=int(flagged.sum())),
                    "token",
                    tolerance,
                    only_positive=False,
                )

            yield f"{kind}, {k_aux} of {share:.0%}", check


KERNELS: dict[str, Callable[[Setting], Cases]] = {
    "products": products,
    "mutual_choice": mutual_choice,
    "feature_choice": feature_choice,
    "auxiliary": auxiliary,
}
