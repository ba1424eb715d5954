"""Each rank reads its own part of the text, and all train on all of it."""

from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Array2D, Dataset, Features
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_alloc import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.gathered import (
    GatheredBatches,
    gathered_rows,
    take_activations,
)
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.run_activations import open_activations
from tests.distributed.processes import on_ranks
from tests.training.conftest import (
    D_MODEL,
    HOOK,
    lm_config,
    load_demo_model,
    short_documents,
)

N_RANKS, CONTEXT, PROMPTS = 3, 16, 4
SAE = MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)


def config(**overrides: Any) -> Any:
    settings = {
        "context_size": CONTEXT,
        "store_batch_size_prompts": PROMPTS,
        "n_batches_in_buffer": 24,
        "train_batch_size_tokens": 96,
        "training_tokens": 960,
        **overrides,
    }
    return lm_config(SAE, **settings)


def numbered_rows(n: int) -> Dataset:
    """Tokenized contexts, no two of them alike."""
    rows = (torch.arange(n * CONTEXT) % 900 + 50).view(n, CONTEXT)
    rows[:, 0] = torch.arange(n) + 1000
    return Dataset.from_dict({"input_ids": rows.tolist()})


def texts() -> dict[str, Any]:
    text = short_documents(13)
    return {
        "on disk": text,
        "streamed by files": text.to_iterable_dataset(num_shards=6),
        "streamed by rows": text.to_iterable_dataset(num_shards=4),
        "tokenized": numbered_rows(50),
        "tokenized and streamed": numbered_rows(50).to_iterable_dataset(),
    }


def epoch(store: Any) -> list[tuple[int, ...]]:
    found = [tuple(row.tolist()) for row in store.iterable_sequences]
    store.begin_epoch()
    return found


def read_parts(ranks: Ranks, model: Any) -> dict[str, Any]:
    """By text: all contexts of this rank, those that it served, and what was held out."""
    found: dict[str, Any] = {}
    for name, text in texts().items():
        cfg = config()
        stock = ActivationsStore.from_config(model, cfg, text)
        part = ResumableActivationsStore.in_place_of(stock, cfg, ranks)
        opened = open_activations(stock, cfg, ranks, n_evaluation_contexts=5)
        assert isinstance(opened.store, ResumableActivationsStore)
        found[name] = {
            "part": epoch(part),
            "served": [epoch(opened.store), epoch(opened.store)],
            "held_out": opened.held_out,
            "evaluation": [tuple(r) for r in opened.evaluation_contexts.tolist()],
            "batch": opened.store.train_batch_size_tokens,
        }
    return found


def cached_rows(n: int) -> Dataset:
    """Stored activations, of which each context holds one number."""
    shape = (n, CONTEXT, D_MODEL)
    values = torch.arange(n).float()[:, None, None].expand(shape)
    features = Features({HOOK: Array2D(shape=(CONTEXT, D_MODEL), dtype="float32")})
    return Dataset.from_dict({HOOK: values.numpy()}, features=features)


def read_stored(ranks: Ranks, model: Any, folder: str) -> list[list[float]]:
    """The numbers of the contexts that a rank serves in two epochs."""
    cfg = config(use_cached_activations=True, cached_activations_path=folder)
    stock = ActivationsStore.from_config(model, cfg, short_documents(13))
    store = ResumableActivationsStore.in_place_of(stock, cfg, ranks)
    store.hold_out(1)
    epochs: list[list[float]] = [[], []]
    for served in epochs:
        while True:
            try:
                batch = store.get_filtered_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                break
            served += batch[:, 0].unique().tolist()
    return epochs


def read_uneven(ranks: Ranks, model: Any) -> list[torch.Tensor]:
    """20 batches of parts of 33, 33 and 32 contexts, through which a rank goes in 6 batches."""
    cfg = config(activations_mixing_fraction=0.0, exclude_special_tokens=False)
    stock = ActivationsStore.from_config(model, cfg, numbered_rows(98))
    store = ResumableActivationsStore.in_place_of(stock, cfg, ranks)
    batches = GatheredBatches(store, ranks, "cpu")
    found = [next(batches) for _ in range(20)]
    return [*found, take_activations(batches, 100, "cpu")]


def refused(ranks: Ranks, model: Any) -> list[str]:
    """What is said of texts that are too short for all or for one."""
    said: list[str] = []
    for n_rows, n_held_out in ((2, 0), (27, 40)):
        cfg = config(dataset_path="short")
        stock = ActivationsStore.from_config(model, cfg, numbered_rows(n_rows))
        with pytest.raises(ValueError) as error:
            open_activations(stock, cfg, ranks, n_held_out)
        said.append(str(error.value))
    return said


def read(ranks: Ranks, folder: str) -> dict[str, Any]:
    model = load_demo_model()
    own = torch.full((ranks.rank, 2), ranks.rank)
    return {
        "parts": read_parts(ranks, model),
        "stored": read_stored(ranks, model, folder),
        "uneven": read_uneven(ranks, model),
        "refused": refused(ranks, model),
        "rows": gathered_rows(own, ranks, "cpu"),
        "no rows": gathered_rows(own[:0], ranks, "cpu"),
    }


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("stored"))
    cached_rows(50).save_to_disk(folder)
    return on_ranks(N_RANKS, read, folder)


@pytest.mark.parametrize("name", list(texts()))
def test_no_context_is_served_twice_and_none_that_is_held_out(
    by_rank: list[dict[str, Any]], name: str
):
    found = [rank["parts"][name] for rank in by_rank]
    everything = Counter(sum((part["part"] for part in found), []))
    served = sum((part["served"][0] for part in found), [])
    assert everything >= Counter(served)
    for part in found:
        # 10 tokens are to be held out, 4 by each rank, which is one batch of 4 contexts; of 5
        # contexts to be set aside each has 2
        assert part["served"] == 2 * [part["part"][PROMPTS + 2 :]]
        assert part["batch"] == 96 // N_RANKS
        assert part["evaluation"] == sum(
            (other["part"][PROMPTS : PROMPTS + 2] for other in found), []
        )
        assert torch.equal(part["held_out"], found[0]["held_out"])
    if name.startswith("tokenized"):
        rows = numbered_rows(50)["input_ids"]
        assert everything == Counter(tuple(row) for row in rows)
        # no special token is in them
        assert len(found[0]["held_out"]) == N_RANKS * PROMPTS * CONTEXT


def test_held_out_activations_are_those_of_the_first_contexts_of_all_ranks(
    by_rank: list[dict[str, Any]], demo_model: Any
):
    store = ActivationsStore.from_config(demo_model, config(), numbered_rows(50))
    parts = [rank["parts"]["tokenized"] for rank in by_rank]
    expected = [
        store.get_activations(torch.tensor(part["part"][:PROMPTS])).flatten(0, 1)
        for part in parts
    ]
    torch.testing.assert_close(parts[0]["held_out"], torch.cat(expected))


def test_stored_activations_are_shared_by_rows(by_rank: list[dict[str, Any]]):
    # parts of 17, 17 and 16 rows, of which 4 are held out and whole batches of 4 are served
    expected = [range(4, 16), range(21, 33), range(38, 50)]
    for rank, rows in zip(by_rank, expected, strict=True):
        assert rank["stored"] == 2 * [[float(i) for i in rows]]


def test_a_part_that_ends_earlier_begins_anew_and_nobody_waits(
    by_rank: list[dict[str, Any]],
):
    first, *others = (rank["uneven"] for rank in by_rank)
    assert [len(batch) for batch in first] == [96] * 20 + [N_RANKS * 64]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_text_that_is_too_short_for_one_rank_is_one_sentence_on_all(
    by_rank: list[dict[str, Any]],
):
    for rank in by_rank:
        assert rank["refused"] == [
            "dataset_path 'short' has too few rows for 3 processes, of which each reads its own: "
            "give more text, or start fewer processes.",
            "the part of dataset_path 'short' of rank 0 has 144 tokens in contexts of 16, but "
            "320 are needed: 288 to be held out and 32 for a training step: give more text, or a "
            "smaller store_batch_size_prompts, train_batch_size_tokens or training_tokens.",
        ]


def test_ranks_gather_rows_of_which_each_has_another_number(
    by_rank: list[dict[str, Any]],
):
    for rank in by_rank:
        assert rank["rows"].tolist() == [[1, 1], [2, 2], [2, 2]]
        assert rank["no rows"].shape == (0, 2)
