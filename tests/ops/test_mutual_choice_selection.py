"""Selection by keys against dense brute force, by torch's reference and by Triton's kernels."""

from collections.abc import Callable

import pytest
import torch

from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.ops import mutual_choice_selection
from sae_lens_alloc.ops import pair_keys as keys_module
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_mutual_choice
from sae_lens_alloc.ops.mutual_choice_keys import N_DIGITS, SHIFTS, KeyEncoder
from sae_lens_alloc.ops.mutual_choice_selection import (
    key_encoder,
    select_by_keys,
)
from sae_lens_alloc.ops.pair_keys import (
    LEAST_KEY,
    MAX_POSITIONS,
    feature_groups,
    padded_pairs,
    pair_keys,
    pairs_of_keys,
)
from tests.helpers import affinities_of, assert_is_selection, exact_tensors
from tests.ops.reference import ReferenceKeyEncoder

MakeKeyEncoder = Callable[..., KeyEncoder]


@pytest.fixture(params=["reference", "triton"])
def make_key_encoder(request: pytest.FixtureRequest) -> MakeKeyEncoder:
    if request.param == "reference":
        return ReferenceKeyEncoder
    request.getfixturevalue("triton_device")
    from sae_lens_alloc.ops.triton_mutual_choice import TritonKeyEncoder

    return TritonKeyEncoder


@pytest.fixture
def small_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the budget, so that most guesses overflow."""
    monkeypatch.setattr(mutual_choice_selection, "CAPACITY_FACTOR", 2)
    monkeypatch.setattr(mutual_choice_selection, "MIN_CAPACITY", 1)


# -- Keys


def test_keys_by_hand():
    # 1.0 is 0x3f800000
    keys = pair_keys(
        torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 5, MAX_POSITIONS - 1])
    )
    assert keys.tolist() == [
        0x3F800000_FFFFFFFF,
        0x3F800000_FFFFFFFA,
        0x40000000_00000000,
    ]


def test_keys_order_by_affinity_and_then_from_the_first_position_on():
    affinities = [1e-45, 1e-38, 0.5, 0.5, 1.0, 1.0000001, 3e38, float("inf")]
    positions = [0, MAX_POSITIONS - 1, 9, 8, 3, 2, 1, 0]
    keys = pair_keys(torch.tensor(affinities), torch.tensor(positions))
    assert (keys.diff() > 0).all()
    assert keys[0] >= LEAST_KEY


def test_pairs_of_keys_are_those_that_made_them_and_padding_comes_last():
    # of 3 tokens and 5 features: (2, 4), (0, 3), padding, (1, 0)
    keys = pair_keys(torch.tensor([2.0, 0.25, 7.0]), torch.tensor([14, 3, 5]))
    keys = torch.cat([keys[:2], torch.zeros(1, dtype=torch.int64), keys[2:]])
    pairs = pairs_of_keys([keys], [slice(0, 5)], (3, 5), 4)
    assert pairs.places.token_indices.tolist() == [0, 1, 2, 2]
    assert pairs.places.feature_indices.tolist() == [3, 0, 4, 4]
    assert pairs.places.values.tolist() == [0.25, 7.0, 2.0, 0.0]
    assert pairs.real is not None
    assert pairs.real.tolist() == [True, True, True, False]


# -- Collecting and counting


# 150 tokens and 200 features end within a tile of 128 x 64
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [True, False])
def test_collect_gives_the_keys_that_reach_the_bound(
    with_scale: bool, dtype: torch.dtype, make_key_encoder: MakeKeyEncoder
):
    torch.manual_seed(0)
    x, W_enc, b_enc, scale = exact_tensors(150, 200, dtype)
    encoder = make_key_encoder(x, W_enc, b_enc, scale if with_scale else None)
    affinities = affinities_of(x, W_enc, b_enc, encoder.scale).flatten()
    positions = affinities.nonzero().squeeze(1)
    positions = positions[affinities[positions] > 0]
    all_keys = pair_keys(affinities[positions], positions).sort().values
    middle = all_keys[len(all_keys) // 2]
    for bound in (torch.full_like(middle, LEAST_KEY), middle, all_keys[-1] + 1):
        expected = all_keys[all_keys >= bound]
        found = encoder.collect(bound, bound < 0, 30000)
        assert (found.n_reached, found.is_complete) == (len(expected), True)
        assert torch.equal(found.keys[: len(expected)].sort().values, expected)
        assert found.keys[len(expected) :].count_nonzero() == 0


def test_collect_counts_what_does_not_fit(make_key_encoder: MakeKeyEncoder):
    torch.manual_seed(1)
    tensors = exact_tensors(150, 200)
    affinities = affinities_of(*tensors)
    bound = torch.full((), LEAST_KEY, dtype=torch.int64, device=affinities.device)
    found = make_key_encoder(*tensors).collect(bound, bound < 0, 70)
    assert found.n_reached == (affinities > 0).sum()
    assert not found.is_complete
    keys = found.keys
    assert keys.shape == (70,)
    # those that were stored are among the pairs, each once
    pairs = pairs_of_keys([keys], [slice(0, 200)], (150, 200), 70)
    assert len(keys.unique()) == 70
    values = affinities[pairs.places.token_indices, pairs.places.feature_indices]
    assert torch.equal(values, pairs.places.values)


def test_nothing_is_collected_or_counted_where_the_work_is_done(
    make_key_encoder: MakeKeyEncoder,
):
    encoder = make_key_encoder(*exact_tensors(20, 30))
    bound = torch.zeros((), dtype=torch.int64, device=encoder.x.device)
    found = encoder.collect(bound, bound == 0, 70, torch.zeros(30))
    assert found.above is not None
    assert (found.n_reached, found.above.count_nonzero()) == (0, 0)
    assert encoder.histogram(bound, 48, bound == 0).count_nonzero() == 0


def test_histograms_count_the_digits_below_a_prefix(make_key_encoder: MakeKeyEncoder):
    torch.manual_seed(2)
    tensors = exact_tensors(150, 200)
    encoder = make_key_encoder(*tensors)
    affinities = affinities_of(*tensors).flatten()
    positions = (affinities > 0).nonzero().squeeze(1)
    keys = pair_keys(affinities[positions], positions)
    prefix = torch.zeros_like(keys[0])
    for shift in SHIFTS:
        counts = encoder.histogram(prefix, shift, prefix < 0)
        same = (
            keys[keys >> (shift + 16) == prefix >> (shift + 16)] if shift < 48 else keys
        )
        expected = torch.bincount((same >> shift) % N_DIGITS, minlength=N_DIGITS)
        assert torch.equal(counts, expected)
        prefix = prefix | (counts.argmax() << shift)


@pytest.mark.parametrize("n_tokens", [10, 70_000])
def test_padded_pairs_are_in_row_order_whatever_bits_positions_need(n_tokens: int):
    """Of 32,768 features, 70,000 tokens have more positions than 31 bits hold."""
    torch.manual_seed(5)
    shape = (n_tokens, 32_768)
    positions = torch.randint(shape[0] * shape[1], (50,)).unique()
    positions[-1] = shape[0] * shape[1] - 1
    positions = positions[torch.randperm(len(positions))]
    values, real = torch.rand(len(positions)), torch.rand(len(positions)) < 0.7
    pairs = padded_pairs(positions, values, real, shape)
    n_real = int(real.sum())
    assert pairs.real.tolist() == [True] * n_real + [False] * (len(real) - n_real)
    order = positions[real].argsort()
    places = pairs.places
    assert places.token_indices.dtype == places.feature_indices.dtype == torch.int64
    found = places.token_indices * shape[1] + places.feature_indices
    assert torch.equal(found[:n_real], positions[real][order])
    assert torch.equal(places.values[:n_real], values[real][order])
    # padding repeats the last position
    assert set(found[n_real:].tolist()) == {shape[0] * shape[1] - 1}
    assert places.values[n_real:].count_nonzero() == 0


# -- The lower bound


def found_digit(
    encoder: KeyEncoder,
    counts: torch.Tensor,
    bound: int,
    rank: int,
    done: bool,
    shift: int,
    spare: int,
) -> tuple[int, int, bool]:
    device = encoder.x.device
    where = torch.tensor(bound, device=device)
    which, is_good = (
        torch.tensor(rank, device=device),
        torch.tensor(done, device=device),
    )
    encoder.find_digit(counts.to(device), where, which, is_good, shift, spare)
    return int(where), int(which), bool(is_good)


def test_digits_by_hand(make_key_encoder: MakeKeyEncoder):
    encoder = make_key_encoder(*exact_tensors(2, 3))
    counts = torch.zeros(N_DIGITS, dtype=torch.int64)
    counts[[7, 5, 2]] = torch.tensor([3, 4, 10])
    # the 6th largest is the 3rd in bucket 5, where one more key than wanted is
    for spare, is_good in ((1, True), (0, False)):
        found = found_digit(encoder, counts, 0, 6, False, 48, spare)
        assert found == (5 << 48, 3, is_good)
    # there is no 18th: everything is wanted
    bound, _, done = found_digit(encoder, counts, 0, 18, False, 48, 0)
    assert (bound, done) == (0, True)
    # what is done stays
    found = found_digit(encoder, counts, 9 << 48, 2, True, 32, 0)
    assert found == (9 << 48, 2, True)


def test_digits_wherever_they_are(make_key_encoder: MakeKeyEncoder):
    """Whatever the blocks of digits are that a kernel looks at together."""
    torch.manual_seed(4)
    encoder = make_key_encoder(*exact_tensors(2, 3))
    for _ in range(20):
        digits = torch.randint(N_DIGITS, (40,)).repeat_interleave(
            torch.randint(1, 6, (40,))
        )
        digits = digits.sort(descending=True).values
        counts = torch.bincount(digits, minlength=N_DIGITS)
        rank = int(torch.randint(1, len(digits) + 1, ()))
        digit = int(digits[rank - 1])
        within = rank - int((digits > digit).sum())
        bound, found, done = found_digit(encoder, counts, 5 << 48, rank, False, 32, 2)
        assert (bound, found) == (5 << 48 | digit << 32, within)
        assert done == (int(counts[digit]) - within <= 2)


# -- The selection


GUESSES = [None, 0.0, 1e-6, 0.5, 0.9, 1.0, 1.5, 1e6, float("inf"), float("nan")]


@pytest.mark.usefixtures("small_capacity")
@pytest.mark.parametrize("budget", [1, 7, 60, 500, 5000])
def test_the_selection_is_exact_for_any_guess(
    budget: int, make_key_encoder: MakeKeyEncoder
):
    torch.manual_seed(3)
    tensors = exact_tensors(20, 150)
    encoder = make_key_encoder(*tensors)
    expected = select_mutual_choice(affinities_of(*tensors), budget)
    # of 3000 affinities, fewer than 5000 and many ties are positive
    assert len(expected.values) == budget or budget == 5000
    smallest = expected.values.min().item()
    for share in GUESSES:
        guess = None if share is None else torch.tensor(share * smallest)
        if guess is not None:
            guess = guess.to(encoder.x.device)
        selection = select_by_keys(encoder, budget, guess)[0]
        assert len(selection.places.values) == min(budget, 3000)
        assert_is_selection(selection, expected)


@pytest.mark.usefixtures("small_capacity")
@pytest.mark.parametrize("n_positive", [0, 1, 13])
def test_too_few_positive_affinities_leave_padding(
    n_positive: int, make_key_encoder: MakeKeyEncoder
):
    torch.manual_seed(4)
    x = torch.eye(20)
    W_enc = -torch.rand(20, 40)
    flat = W_enc.view(-1)
    flat[torch.randperm(800)[:n_positive]] = 1.0
    encoder = make_key_encoder(x, W_enc, torch.zeros(40), None)
    expected = select_mutual_choice(W_enc, 30)
    assert len(expected.values) == n_positive
    for guess in (None, 0.5, 1.0, 2.0):
        guess = None if guess is None else torch.tensor(guess).to(x.device)
        selection = select_by_keys(encoder, 30, guess)[0]
        assert len(selection.places.values) == 30
        assert_is_selection(selection, expected)


@pytest.mark.usefixtures("small_capacity")
def test_equal_affinities_that_overflow_every_buffer_go_in_row_order(
    make_key_encoder: MakeKeyEncoder,
):
    # 9000 ties, of which the buffer holds 200: only the last digits tell them apart
    x, W_enc = torch.ones(60, 1), torch.ones(1, 150)
    encoder = make_key_encoder(x, W_enc, torch.zeros(150), None)
    for guess in (None, torch.ones((), device=x.device)):
        selection = select_by_keys(encoder, 100, guess)[0]
        assert selection.places.token_indices.tolist() == [0] * 100
        assert selection.places.feature_indices.tolist() == list(range(100))
        assert selection.places.values.tolist() == [1.0] * 100


@pytest.mark.usefixtures("small_capacity")
def test_the_selection_follows_data_that_shift(make_key_encoder: MakeKeyEncoder):
    torch.manual_seed(5)
    W_enc, b_enc = torch.randn(8, 200), torch.randn(200)
    guess = None
    # batches of other sizes and scales, one of zeros alone
    for n_tokens, size in [(30, 1), (30, 1), (9, 100), (40, 1e-3), (30, 0), (30, 1)]:
        x = size * torch.randn(n_tokens, 8)
        selection = select_by_keys(
            make_key_encoder(x, W_enc, b_enc, None), 5 * n_tokens, guess
        )[0]
        expected = select_mutual_choice(x @ W_enc + b_enc, 5 * n_tokens)
        assert torch.equal(selection.places.token_indices, expected.token_indices)
        assert torch.equal(selection.places.feature_indices, expected.feature_indices)
        assert torch.allclose(selection.places.values, expected.values, rtol=1e-4)
        guess = 0.9 * selection.smallest_value()


def test_the_selection_is_the_same_bit_for_bit_twice_and_for_any_guess(
    make_key_encoder: MakeKeyEncoder,
):
    torch.manual_seed(6)
    tensors = (torch.randn(140, 40), torch.randn(40, 300), torch.randn(300), None)
    first = select_by_keys(make_key_encoder(*tensors), 600, None)[0]
    for share in (0.0, 0.9, 1.0, 1.1):
        guess = share * first.smallest_value()
        again = select_by_keys(make_key_encoder(*tensors), 600, guess)[0]
        assert torch.equal(first.places.token_indices, again.places.token_indices)
        assert torch.equal(first.places.feature_indices, again.places.feature_indices)
        assert torch.equal(first.places.values, again.places.values)


def test_what_exceeds_its_threshold_is_counted_in_the_same_pass(
    make_key_encoder: MakeKeyEncoder,
):
    torch.manual_seed(7)
    tensors = exact_tensors(150, 200)
    affinities = affinities_of(*tensors)
    thresholds = torch.randint(0, 7, (200,)) / 2.0
    thresholds[:2] = torch.tensor([float("inf"), 0.0])
    expected = ((affinities > thresholds) & (affinities > 0)).sum(0)
    # a good guess, one that collects nothing and one that overflows: counted once
    for guess in (None, torch.tensor(3.0), torch.tensor(1e6), torch.tensor(0.0)):
        pairs, above = select_by_keys(make_key_encoder(*tensors), 60, guess, thresholds)
        assert above is not None and torch.equal(above, expected)
        assert_is_selection(pairs, select_mutual_choice(affinities, 60))


# -- More positions than a key holds


def test_feature_groups_by_hand():
    assert feature_groups(4096, 2**20) == [slice(0, 2**20)]
    # 13 bits of tokens leave 19 for the features
    assert feature_groups(4097, 2**20) == [slice(0, 2**19), slice(2**19, 2**20)]
    assert feature_groups(2**14, 2**18 + 1) == [
        slice(0, 2**18),
        slice(2**18, 2**18 + 1),
    ]
    assert feature_groups(1, 3) == [slice(0, 3)]


@pytest.mark.usefixtures("small_capacity")
@pytest.mark.parametrize("budget", [1, 7, 60, 500, 5000])
def test_the_selection_over_groups_is_that_of_one(
    budget: int, make_key_encoder: MakeKeyEncoder, monkeypatch: pytest.MonkeyPatch
):
    # 5 bits of tokens leave 6: groups of 64, 64 and 22 features
    monkeypatch.setattr(keys_module, "GROUP_BITS", 11)
    assert len(feature_groups(20, 150)) == 3
    torch.manual_seed(8)
    tensors = exact_tensors(20, 150)
    affinities = affinities_of(*tensors)
    thresholds = torch.randint(0, 7, (150,)) / 2.0
    expected = select_mutual_choice(affinities, budget)
    smallest = expected.values.min().item()
    for share in GUESSES:
        guess = None if share is None else torch.tensor(share * smallest)
        selection, above = select_by_keys(
            make_key_encoder(*tensors), budget, guess, thresholds
        )
        assert len(selection.places.values) == min(budget, 3000)
        assert_is_selection(selection, expected)
        assert above is not None
        assert torch.equal(above, (affinities.clamp(min=0) > thresholds).sum(0))


def test_equal_affinities_of_several_groups_go_in_row_order(
    make_key_encoder: MakeKeyEncoder, monkeypatch: pytest.MonkeyPatch
):
    # 5 groups of 32 features, of which the selection takes all on the first 2 tokens
    monkeypatch.setattr(keys_module, "GROUP_BITS", 11)
    encoder = make_key_encoder(
        torch.ones(60, 1), torch.ones(1, 160), torch.zeros(160), None
    )
    for guess in (None, torch.tensor(1.0), torch.tensor(2.0)):
        places = select_by_keys(encoder, 330, guess)[0].places
        positions = places.token_indices * 160 + places.feature_indices
        assert positions.tolist() == list(range(330))


# -- Where it is used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutual_choice_by_triton_is_mutual_choice_by_torch(
    dtype: torch.dtype, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(7)
    x, W_enc, b_enc, scale = exact_tensors(20, 150, dtype)
    encoder = Encoder(W_enc, b_enc, scale)
    cut = torch.ones((), device=triton_device)
    actual = encode_mutual_choice(encoder, x, 60, cut)
    monkeypatch.setenv("SAE_LENS_ALLOC_BACKEND", "torch")
    expected = encode_mutual_choice(encoder, x, 60, cut)
    assert expected.real is None
    assert_is_selection(actual, expected)


@pytest.mark.usefixtures("triton_device")
def test_tensors_that_keys_cannot_hold_take_the_other_way():
    x, W_enc, b_enc, scale = (t.double() for t in exact_tensors(5, 30))
    assert key_encoder(W_enc, b_enc, scale, x) is None
    pairs = encode_mutual_choice(Encoder(W_enc, b_enc, scale), x, 20, None)
    assert pairs.places.values.dtype == torch.float64
    assert pairs.real is None
