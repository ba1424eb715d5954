"""The store yields SAELens' batches, and goes on with them after it was saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Array2D, Dataset, Features
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.store import ResumableActivationsStore
from tests.training.conftest import D_MODEL, HOOK, lm_config

SAE = MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)
CONTEXT, PROMPTS = 64, 8  # as in lm_config


def store(
    demo_model: HookedRootModule, text: Dataset, **overrides: Any
) -> ActivationsStore:
    return ActivationsStore.from_config(demo_model, lm_config(SAE, **overrides), text)


def made(
    demo_model: HookedRootModule, text: Dataset, **overrides: Any
) -> ResumableActivationsStore:
    return ResumableActivationsStore.from_config(
        demo_model, lm_config(SAE, **overrides), text
    )


def resumable(
    demo_model: HookedRootModule, text: Dataset, **overrides: Any
) -> ResumableActivationsStore:
    """A store that holds out one batch of contexts, as the runner makes it."""
    ours = made(demo_model, text, **overrides)
    ours.hold_out(n_tokens=1)
    return ours


def contexts(source: ActivationsStore, n: int) -> list[list[int]]:
    return [row for _ in range(n) for row in source.get_batch_tokens(1).tolist()]


def test_held_out_contexts_are_served_in_no_epoch(
    demo_model: HookedRootModule, demo_text: Dataset
):
    text = demo_text.select(range(10))
    plain = store(demo_model, text)
    epoch: list[list[int]] = [row.tolist() for row in plain.iterable_sequences]
    assert len(epoch) > 2 * PROMPTS
    rest = epoch[PROMPTS:]
    ours = made(demo_model, text)
    held_out = ours.hold_out(n_tokens=PROMPTS * CONTEXT - 1)
    assert contexts(ours, 3 * len(rest)) == 3 * rest

    expected = plain.get_activations(torch.tensor(epoch[:PROMPTS]))
    ordinary = torch.tensor(epoch[:PROMPTS]) != demo_model.tokenizer.bos_token_id  # type: ignore
    assert torch.equal(held_out, expected[ordinary])


def test_evaluation_contexts_come_next_and_are_served_in_no_epoch_either(
    demo_model: HookedRootModule, demo_text: Dataset
):
    text = demo_text.select(range(10))
    plain = store(demo_model, text)
    epoch: list[list[int]] = [row.tolist() for row in plain.iterable_sequences]
    ours = made(demo_model, text)
    ours.hold_out(n_tokens=1)
    evaluation = ours.hold_out_contexts(PROMPTS + 3)
    assert evaluation.tolist() == epoch[PROMPTS : 2 * PROMPTS + 3]
    rest = epoch[2 * PROMPTS + 3 :]
    assert contexts(ours, 3 * len(rest)) == 3 * rest


def test_looking_whether_there_is_enough_text_reads_nothing(
    demo_model: HookedRootModule, demo_text: Dataset
):
    text = demo_text.select(range(3))
    # 3 documents make 38 contexts of 64 tokens, and a step takes 256 tokens
    n_contexts = len(list(store(demo_model, text).iterable_sequences))
    enough = (n_contexts - 4) * CONTEXT
    ours = made(demo_model, text)
    ours.require_text(enough)
    assert ours.n_dataset_processed == ours.n_contexts_read == 0
    expected = contexts(store(demo_model, text), n_contexts)
    assert contexts(ours, n_contexts) == expected

    ours = made(demo_model, text)
    with pytest.raises(
        ValueError,
        match=f"has {n_contexts * CONTEXT:,} tokens in contexts of 64, but "
        f"{enough + 1 + 256:,} are needed: {enough + 1:,} to be held out and 256",
    ):
        ours.require_text(enough + 1)


def test_held_out_activations_are_never_none(
    demo_model: HookedRootModule, demo_text: Dataset
):
    # the first 20 contexts of an otherwise ordinary text hold special tokens only
    bos = demo_model.tokenizer.bos_token_id  # type: ignore
    rows = contexts(store(demo_model, demo_text), 60)
    tokens = Dataset.from_dict({"tokens": 20 * [CONTEXT * [bos]] + rows})
    ours = made(demo_model, tokens)
    held_out = ours.hold_out(n_tokens=1)
    assert ours.n_held_out_contexts == 24  # of which the last 4 are ordinary
    ordinary = [token for row in rows[:4] for token in row if token != bos]
    assert len(held_out) == len(ordinary)
    nothing = Dataset.from_dict({"tokens": 20 * [CONTEXT * [bos]]})
    with pytest.raises(ValueError, match="or only special ones"):
        made(demo_model, nothing).hold_out(n_tokens=1)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_pass_without_a_token_ends_the_waiting(
    prefetch: bool, demo_model: HookedRootModule
):
    bos = demo_model.tokenizer.bos_token_id  # type: ignore
    text = Dataset.from_dict({"tokens": 20 * [CONTEXT * [bos]]})
    batches: Any = made(demo_model, text)
    if prefetch:
        batches = PrefetchingIterator(batches)
    with pytest.raises(ValueError, match="pass over dataset_path .* brought no token"):
        next(batches)


def test_fewer_contexts_than_a_batch_of_the_model_are_served_over_and_over(
    demo_model: HookedRootModule, demo_text: Dataset
):
    rows = contexts(store(demo_model, demo_text), 3)  # and 8 make a batch
    few = Dataset.from_dict({"tokens": rows})
    ours = made(demo_model, few)
    assert [len(next(ours)) for _ in range(10)] == 10 * [256]


@pytest.mark.parametrize("excluded", [True, False])
def test_contexts_of_nothing_but_bos_are_refused(
    excluded: bool, demo_model: HookedRootModule, demo_text: Dataset
):
    overrides: dict[str, Any] = {
        "context_size": 1,
        "n_batches_in_buffer": 256,
        "exclude_special_tokens": excluded,
    }
    with pytest.raises(ValueError, match="no room for a token of the text"):
        made(demo_model, demo_text, **overrides).require_text(1)
    ours = made(demo_model, demo_text, prepend_bos=False, **overrides)
    ours.require_text(1)
    assert len(next(ours)) == 256


@pytest.mark.parametrize("n_before", range(8))
def test_loaded_store_that_has_read_on_goes_back(
    n_before: int, demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    """As in a fine-tuning, which reads 1 batch before it is resumed, here of an epoch of 3."""
    text = Dataset.from_dict(
        {"tokens": contexts(store(demo_model, demo_text), 4 * PROMPTS)}
    )
    overrides: dict[str, Any] = {"n_batches_in_buffer": PROMPTS}
    first = resumable(demo_model, text, **overrides)
    torch.manual_seed(0)
    for _ in range(n_before):
        next(first)
    first.save_to_checkpoint(tmp_path)
    drawn = torch.get_rng_state()
    expected = [next(first) for _ in range(10)]

    second = resumable(demo_model, text, **overrides)
    next(second)
    second.load_from_checkpoint(tmp_path)
    torch.set_rng_state(drawn)
    assert all(torch.equal(next(second), batch) for batch in expected)


# 10 documents make 104 contexts, hence an epoch of about 23 batches
@pytest.mark.parametrize("n_before", [0, 3, 25])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"activations_mixing_fraction": 0.0}, {"disable_concat_sequences": True}],
)
def test_loaded_store_goes_on_with_the_next_batch(
    n_before: int,
    overrides: dict[str, Any],
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
):
    text = demo_text.select(
        range(20 if overrides.get("disable_concat_sequences") else 10)
    )
    first = resumable(demo_model, text, **overrides)
    torch.manual_seed(0)
    for _ in range(n_before):
        next(first)
    first.save_to_checkpoint(tmp_path)
    drawn = torch.get_rng_state()
    expected = [next(first) for _ in range(10)]

    second = resumable(demo_model, text, **overrides)
    second.load_from_checkpoint(tmp_path)
    torch.set_rng_state(drawn)
    assert all(torch.equal(next(second), batch) for batch in expected)
    assert second.n_dataset_processed == first.n_dataset_processed


def test_checkpoint_of_a_longer_dataset_is_refused(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    first = resumable(demo_model, demo_text)
    for _ in range(20):
        next(first)
    first.save_to_checkpoint(tmp_path)
    second = resumable(demo_model, demo_text.select(range(5)))
    with pytest.raises(ValueError, match="ends after 59 contexts, .* another dataset"):
        second.load_from_checkpoint(tmp_path)


def test_cached_activations_are_held_out_and_resumed(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, CONTEXT, D_MODEL, generator=generator)
    Dataset.from_dict(
        {HOOK: rows.numpy()}, Features({HOOK: Array2D((CONTEXT, D_MODEL), "float32")})
    ).save_to_disk(tmp_path / "cache")
    overrides: dict[str, Any] = {
        "use_cached_activations": True,
        "cached_activations_path": str(tmp_path / "cache"),
        "activations_mixing_fraction": 0.0,
    }
    first = made(demo_model, demo_text, **overrides)
    held_out = first.hold_out(n_tokens=1)
    assert torch.equal(held_out, rows[:PROMPTS].flatten(0, 1))
    # two epochs of what is left, in order
    served = torch.cat([next(first) for _ in range(2 * 8)])
    assert torch.equal(served, rows[PROMPTS:].flatten(0, 1).repeat(2, 1))

    first.save_to_checkpoint(tmp_path)
    expected = [next(first) for _ in range(10)]
    second = resumable(demo_model, demo_text, **overrides)
    second.load_from_checkpoint(tmp_path)
    assert all(torch.equal(next(second), batch) for batch in expected)


def test_contexts_are_held_out_of_cached_activations_by_their_tokens(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    rows = torch.zeros(40, CONTEXT, D_MODEL)
    ids = torch.arange(40 * CONTEXT).view(40, CONTEXT)
    shape = Array2D((CONTEXT, D_MODEL), "float32")
    overrides: dict[str, Any] = {
        "use_cached_activations": True,
        "exclude_special_tokens": False,
    }
    for with_tokens in (True, False):
        overrides["cached_activations_path"] = str(tmp_path / f"cache {with_tokens}")
        columns = {HOOK: rows.numpy()}
        if with_tokens:
            columns["token_ids"] = ids.numpy()
        cache = Dataset.from_dict(columns).cast_column(HOOK, shape)
        cache.save_to_disk(overrides["cached_activations_path"])
        ours = made(demo_model, demo_text, **overrides)
        ours.require_text(36 * CONTEXT)
        with pytest.raises(ValueError, match="2,560 tokens .* 2,561 are needed"):
            ours.require_text(36 * CONTEXT + 1)
        ours.hold_out(n_tokens=1)
        if with_tokens:
            taken = ours.hold_out_contexts(5)
            assert torch.equal(taken, ids[PROMPTS : PROMPTS + 5])
            assert ours.cached_activation_dataset is not None
            assert len(ours.cached_activation_dataset) == 40 - PROMPTS - 5
        else:
            with pytest.raises(ValueError, match="stored without their tokens"):
                ours.hold_out_contexts(5)
