"""Selection whose candidates bfloat16 products choose, against float32 products of all pairs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.ops import mutual_choice_selection
from sae_lens_alloc.ops import pair_keys as keys_module
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_and_count
from sae_lens_alloc.ops.encoder_tensors import EncoderTensors
from sae_lens_alloc.ops.mutual_choice_selection import key_encoder, select_by_keys
from sae_lens_alloc.ops.pair_keys import pair_keys
from sae_lens_alloc.ops.sparse import sampled_products
from sae_lens_alloc.ops.triton_prefilter import PrefilterKeyEncoder
from tests.helpers import affinities_of, assert_is_selection, exact_tensors

pytestmark = pytest.mark.slow

Tensors = tuple[Tensor, ...]

# the interpreter takes its time for every pair
N_TOKENS, N_FEATURES = 10, 70
CAPACITY = N_TOKENS * N_FEATURES
TINY, HUGE = 1e-42, 3.4e38


@pytest.fixture(autouse=True)
def prefilter(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_device.type in ("cpu", "cuda")
    monkeypatch.setenv(BACKEND_VARIABLE, "triton_prefilter")


def float32_affinities(tensors: EncoderTensors) -> Tensor:
    """Those that decide: one dot product for each pair, shape (B, F)."""
    n_tokens, n_features = tensors.shape
    tokens = torch.arange(n_tokens).repeat_interleave(n_features)
    features = torch.arange(n_features).repeat(n_tokens)
    products = sampled_products(
        tokens, features, tensors.x, tensors.W_enc.T.contiguous()
    )
    affinities = products.view(n_tokens, n_features) + tensors.b_enc
    return affinities if tensors.scale is None else affinities * tensors.scale


def random_tensors(
    n_tokens: int = N_TOKENS, n_features: int = N_FEATURES, d_in: int = 24
) -> Tensors:
    return (
        torch.randn(n_tokens, d_in),
        torch.randn(d_in, n_features),
        torch.randn(n_features),
        torch.rand(n_features) + 0.5,
    )


def of_many_sizes() -> Tensors:
    x, W_enc, b_enc, scale = random_tensors()
    return (
        x * 10.0 ** torch.randint(-12, 12, (N_TOKENS, 1)),
        W_enc * 10.0 ** torch.randint(-12, 12, (N_FEATURES,)),
        b_enc * 10.0 ** torch.randint(-12, 12, (N_FEATURES,)),
        scale * 10.0 ** torch.randint(-6, 6, (N_FEATURES,)),
    )


def that_cancel() -> Tensors:
    """Terms of 1e4 whose sum is about 1: bfloat16 sees noise of 100."""
    x, W_enc, b_enc, scale = random_tensors()
    x[:, 0], x[:, 1] = 1e2, -1e2
    W_enc[0], W_enc[1] = 1e2 + torch.rand(N_FEATURES), 1e2 + torch.rand(N_FEATURES)
    b_enc[::2] -= 1e4
    W_enc[0, ::2] += 1e2
    return x, W_enc, b_enc, scale


def with_zeros() -> Tensors:
    x, W_enc, b_enc, scale = random_tensors()
    x[::3], W_enc[:, ::4], b_enc[::5] = 0.0, 0.0, 0.0
    return x, W_enc, b_enc, scale


def subnormal() -> Tensors:
    x, W_enc, b_enc, scale = random_tensors()
    x[::2], W_enc[:, ::2], b_enc[::3] = x[::2] * TINY, W_enc[:, ::2] * TINY, TINY
    return x, W_enc * 1e3, b_enc, scale


def about_to_overflow() -> Tensors:
    """Numbers that bfloat16 takes for infinite, and products that float32 does."""
    x, W_enc, b_enc, scale = random_tensors()
    x[0, 0], x[1, :], W_enc[3, 5], W_enc[2, 7] = HUGE, 1e25, HUGE, -HUGE
    W_enc[:, 9] = 1e25
    # infinity times 0 is no number, where float32 has the bias
    x[0, 1:], x[:, 3], W_enc[0, ::2] = 0.0, 0.0, 0.0
    return x, W_enc, b_enc, scale


def rounded_the_same_way() -> Tensors:
    """All halfway between two bfloat16 numbers, and rounded down: the error is the largest."""
    halfway = 1 + 2.0**-8
    x = halfway * 2.0 ** torch.randint(-3, 3, (N_TOKENS, 1)).expand(N_TOKENS, 24)
    W_enc = halfway * 2.0 ** torch.randint(-3, 3, (N_FEATURES,)).expand(24, N_FEATURES)
    return x.clone(), W_enc.clone(), torch.zeros(N_FEATURES), torch.ones(N_FEATURES)


def tied() -> Tensors:
    return exact_tensors(N_TOKENS, N_FEATURES)


STATES = [
    random_tensors,
    of_many_sizes,
    that_cancel,
    with_zeros,
    subnormal,
    about_to_overflow,
    rounded_the_same_way,
    tied,
]


def guesses_for(affinities: Tensor) -> list[Tensor]:
    """Affinities themselves, from large to small, and what none or all reach."""
    positive = affinities[(affinities > 0) & affinities.isfinite()].sort().values
    places = [-1, -10, len(positive) // 2, len(positive) // 10, 0]
    return [*positive[places], torch.tensor(1e-45), torch.tensor(3e38)]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("make", STATES)
@pytest.mark.parametrize("with_scale", [True, False])
def test_all_that_reach_a_guess_by_float32_products_are_found_and_counted(
    with_scale: bool, make: Callable[[], Tensors]
):
    torch.manual_seed(0)
    x, W_enc, b_enc, scale = make()
    encoder = PrefilterKeyEncoder(x, W_enc, b_enc, scale if with_scale else None)
    affinities = float32_affinities(encoder)
    positive = (affinities > 0).flatten().nonzero().squeeze(1)
    all_keys = pair_keys(affinities.flatten()[positive], positive)
    for i, guess in enumerate(guesses_for(affinities)):
        # one of each feature's affinities, what all exceed, and what none does
        thresholds = affinities[
            torch.randint(0, N_TOKENS, (N_FEATURES,)), torch.arange(N_FEATURES)
        ]
        thresholds = thresholds.clone()
        thresholds[::7], thresholds[1::7] = -1.0, float("inf")
        counts = i % 2 == 0
        found = encoder.collect_guess(guess, CAPACITY, thresholds if counts else None)
        expected = all_keys[affinities.flatten()[positive] >= guess]
        assert found.is_complete
        assert found.n_reached == len(expected)
        keys = found.keys[found.keys > 0]
        assert torch.equal(keys.sort().values, expected.sort().values)
        exceeds = (affinities > 0) & (affinities > thresholds)
        assert (found.above is not None) == counts
        if found.above is not None:
            assert torch.equal(found.above, exceeds.sum(0))


def test_few_pairs_are_candidates_where_the_numbers_are_ordinary():
    torch.manual_seed(1)
    x, W_enc, b_enc, scale = random_tensors(20, 640, 128)
    encoder = PrefilterKeyEncoder(x, W_enc, b_enc, scale)
    affinities = affinities_of(x, W_enc, b_enc, scale)
    cut = affinities.flatten().topk(200).values[-1]
    _, count, _ = encoder._candidates(cut, 1000, None)
    # the bound is 1% of the product of the norms, about 0.1 of a standard deviation
    assert 200 <= count < 300


@pytest.mark.parametrize("make", STATES)
def test_the_selection_is_that_of_float32_products(make: Callable[[], Tensors]):
    torch.manual_seed(2)
    x, W_enc, b_enc, scale = make()
    # an affinity that is not finite has no place in a selection
    x, W_enc = x.where(x.abs() < 1e20, 1.0), W_enc.where(W_enc.abs() < 1e20, 1.0)
    encoder = PrefilterKeyEncoder(x, W_enc, b_enc, scale)
    affinities = float32_affinities(encoder)
    assert affinities.isfinite().all()
    thresholds = 2 * torch.rand(N_FEATURES)
    expected = select_mutual_choice(affinities, 40)
    cut = expected.values.min()
    # among the candidates, and where these are too few
    for guess in (0.9 * cut, cut):
        pairs, above = select_by_keys(encoder, 40, guess, thresholds)
        assert_is_selection(pairs, expected)
        assert above is not None
        exceeds = (affinities > 0) & (affinities > thresholds)
        assert torch.equal(above, exceeds.sum(0))


GUESSES = [None, 0.0, 1e-6, 0.5, 0.9, 1.0, 1.5, 1e6, float("inf"), float("nan")]


@pytest.mark.parametrize("group_bits", [32, 9])
@pytest.mark.parametrize("budget", [1, 60, 5000])
def test_the_selection_is_exact_for_any_guess(
    budget: int, group_bits: int, monkeypatch: pytest.MonkeyPatch
):
    # most guesses find too few candidates or too many, and 9 bits hold 32 features
    monkeypatch.setattr(mutual_choice_selection, "CAPACITY_FACTOR", 2)
    monkeypatch.setattr(mutual_choice_selection, "MIN_CAPACITY", 1)
    monkeypatch.setattr(keys_module, "GROUP_BITS", group_bits)
    torch.manual_seed(3)
    tensors = exact_tensors(N_TOKENS, N_FEATURES)
    affinities = affinities_of(*tensors)
    thresholds = torch.randint(0, 7, (N_FEATURES,)) / 2.0
    expected = select_mutual_choice(affinities, budget)
    smallest = expected.values.min().item()
    for share in GUESSES:
        guess = None if share is None else torch.tensor(share * smallest)
        encoder = PrefilterKeyEncoder(*tensors)
        pairs, above = select_by_keys(encoder, budget, guess, thresholds)
        assert_is_selection(pairs, expected)
        assert above is not None
        assert torch.equal(above, (affinities.clamp(min=0) > thresholds).sum(0))


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch):
    x, W_enc, b_enc, scale = exact_tensors(5, 30)

    def kind(x: Tensor, W_enc: Tensor) -> str:
        return type(key_encoder(W_enc, b_enc, scale, x)).__name__

    assert kind(x, W_enc) == "PrefilterKeyEncoder"
    assert kind(x.bfloat16(), W_enc.bfloat16()) == "TritonKeyEncoder"
    with torch.autocast(x.device.type, torch.bfloat16):
        assert kind(x, W_enc) == "TritonKeyEncoder"
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert kind(x, W_enc) == "TritonKeyEncoder"
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    assert kind(x, W_enc) == "TritonKeyEncoder"


def test_mutual_choice_by_the_prefilter_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(4)
    x, W_enc, b_enc, scale = exact_tensors(N_TOKENS, N_FEATURES)
    encoder, thresholds = Encoder(W_enc, b_enc, scale), torch.full((N_FEATURES,), 1.5)
    arguments = (encoder, x, 60, torch.tensor(5.0), thresholds)
    pairs, above = encode_and_count(*arguments)
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    expected, expected_above = encode_and_count(*arguments)
    assert_is_selection(pairs, expected)
    assert above is not None and expected_above is not None
    assert torch.equal(above, expected_above)
