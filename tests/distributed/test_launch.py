"""From the environment of a process to the ranks of a training, or to one sentence."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sae_lens_alloc.distributed import launch, speaking
from sae_lens_alloc.distributed.agreement import failing_together, require_same
from sae_lens_alloc.distributed.launch import (
    device_of_rank,
    on_device,
    require_own_gpus,
    training_ranks,
)
from sae_lens_alloc.distributed.meeting import meet
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.speaking import is_first_to_say, is_lost_peer
from tests.distributed.processes import on_ranks


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what torchrun would, of a rank 1 of 2 that no other process is there for."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(launch, "START_SECONDS", 1)

    def set_all(**variables: str | None) -> None:
        settings = {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            **variables,
        }
        for key, value in settings.items():
            if value is None:
                monkeypatch.delenv(key, raising=False)
            else:
                monkeypatch.setenv(key, value)

    return set_all


def test_one_process_touches_nothing(environment: Callable[..., None]):
    for size in (None, "1"):
        environment(WORLD_SIZE=size, RANK="0", MASTER_ADDR=None)
        assert training_ranks() is ALONE
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"MASTER_ADDR": None},
            "MASTER_ADDR is missing: start with torchrun, which sets it.",
        ),
        (
            {"MASTER_PORT": None},
            "MASTER_PORT is missing: start with torchrun, which sets it.",
        ),
        (
            {"MASTER_PORT": "http"},
            "MASTER_PORT must be a whole number, got 'http': start with torchrun, which sets it.",
        ),
        ({"RANK": None}, "RANK is missing: start with torchrun, which sets it."),
        (
            {"RANK": "2"},
            "RANK is 2, but WORLD_SIZE is 2: ranks count from 0 to 1.",
        ),
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE must be a whole number, got 'two': start with torchrun, which sets it.",
        ),
    ],
)
def test_a_variable_that_is_wrong_is_one_sentence(
    environment: Callable[..., None], variables: dict[str, Any], sentence: str
):
    environment(**variables)
    with pytest.raises(ValueError) as error:
        training_ranks()
    assert str(error.value) == sentence
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "variables",
    [{}, {"RANK": "0"}, {"MASTER_ADDR": "no-such-host.invalid"}, {"MASTER_PORT": "0"}],
    ids=["nobody there", "no other comes", "no such host", "no port"],
)
def test_processes_that_do_not_meet_are_one_sentence(
    environment: Callable[..., None], variables: dict[str, Any]
):
    environment(**variables)
    with pytest.raises(ValueError) as error:
        training_ranks()
    said = str(error.value)
    assert f"rank {variables.get('RANK', 1)} of 2 has not met the others at" in said
    assert "\n" not in said
    assert not dist.is_initialized()


def met(store: dist.Store, *ranks: tuple[int, int], launch: str = "") -> list[str]:
    """What comes of processes, each of a (rank, world size), that meet by a store."""

    def one(rank: int, world_size: int) -> str:
        try:
            ours = meet(store, rank, world_size, timedelta(seconds=1), launch)
        except ValueError as error:
            return str(error)
        ours.add("met", 1)
        return "met"

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, *zip(*ranks, strict=True)))


def test_processes_meet_again_by_a_store_of_before():
    store = dist.HashStore()
    for _ in range(3):
        assert met(store, (2, 3), (0, 3), (1, 3)) == ["met"] * 3
    # of an attempt that ended before all were there
    store.set("sae-lens-alloc//name/1", "of a process that has ended")
    assert met(store, (2, 3), (0, 3), (1, 3)) == ["met"] * 3


def test_two_launches_with_one_store_do_not_meet():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(met, store, (0, 2), (1, 2), launch="other")
        assert met(store, (1, 2), (0, 2), launch="one") == ["met"] * 2
        assert other.result() == ["met"] * 2


def test_each_rank_comes_once_and_counts_as_many():
    missing = "WORLD_SIZE is 3, but after 1 s there is no process with RANK"
    start = "start as many processes as WORLD_SIZE says."
    assert met(dist.HashStore(), (0, 3)) == [f"{missing} 1, 2: {start}"]
    assert met(dist.HashStore(), (0, 3), (2, 3)) == [f"{missing} 1: {start}"] * 2
    unanswered = (
        "rank 0 has not answered rank 1 within 1 s: start WORLD_SIZE (2) processes, each with "
        "another RANK."
    )
    assert met(dist.HashStore(), (1, 2)) == [unanswered]
    twice = "two processes have RANK 1: give each of the 2 another one."
    found = met(dist.HashStore(), (0, 2), (1, 2), (1, 2))
    assert found.count("met") == 2
    # whichever rank 0 has answered, and whether it has answered the other one, too
    assert {*found} - {"met"} < {twice, unanswered}
    assert met(dist.HashStore(), (0, 2), (1, 3))[0] == (
        "WORLD_SIZE is 2 for rank 0, but 3 for rank 1: give all processes the same."
    )


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device_of_rank("cpu", 0) == "cpu"
    assert device_of_rank("cuda", 8) == "cuda:2"
    assert device_of_rank("cuda:0", 3) == "cuda:2"
    assert device_of_rank("cuda", 1) == "cuda:0"  # the only one that it is shown
    with pytest.raises(ValueError, match="LOCAL_RANK is 2, but this machine shows 2"):
        device_of_rank("cuda", 2)
    require_own_gpus([("one", "a"), ("one", "b"), ("other", "a")])
    with pytest.raises(ValueError, match="ranks 0 and 2 are on one GPU of one: start"):
        require_own_gpus([("one", "a"), ("one", "b"), ("one", "a")])


def agree(ranks: Ranks) -> dict[str, Any]:
    """What ranks find out together."""
    found: dict[str, Any] = {
        "same ranks": training_ranks().group is ranks.group,
        "gloo": on_device(ranks, "cpu") is ranks,
        "said": [is_first_to_say("a"), is_first_to_say("a")],
    }
    store = dist.FileStore(found_store(ranks), ranks.size)
    speaking.speak_over(store)
    own = f"of rank {ranks.rank}"
    found["own"] = is_first_to_say(own)
    found["shared"] = ranks.objects(is_first_to_say("b"))
    found["again"] = ranks.objects(is_first_to_say("b"))
    for name, failing in {"one": {1}, "all": {0, 1, 2}, "none": set()}.items():
        try:
            with failing_together(ranks):
                if ranks.rank in failing:
                    raise OSError(own)
            found[name] = "fine"
        except (OSError, ValueError) as error:
            found[name] = str(error)
    settings = {"lr": 1e-3, "sae.k": 4 if ranks.rank < 2 else 5}
    require_same("", {"lr": 1e-3}, ranks)
    with pytest.raises(ValueError) as differing:
        require_same("the setting ", settings, ranks)
    found["differ"] = str(differing.value)
    return found


def found_store(ranks: Ranks) -> str:
    from tempfile import mkdtemp

    return f"{ranks.objects(mkdtemp())[0]}/store"


def test_ranks_speak_once_and_fail_together():
    by_rank = on_ranks(3, agree)
    for rank, found in enumerate(by_rank):
        assert found["same ranks"] and found["gloo"]
        # rank 0 speaks where they do not know of each other
        assert found["said"] == [rank == 0] * 2
        assert found["own"]
        assert sum(found["shared"]) == sum(found["again"]) == 1
        assert found["one"] == "of rank 1"
        assert found["all"] == "of rank 0"
        assert found["none"] == "fine"
        assert found["differ"] == (
            "the processes differ in the setting sae.k: rank 0 has 4, and rank 2 has 5: start "
            "them all with the same."
        )


def lose_a_peer(ranks: Ranks) -> bool:
    if ranks.rank == 1:
        return True
    try:
        while True:
            ranks.sum(torch.ones(1))
    except RuntimeError as error:
        return is_lost_peer(error) and is_lost_peer(_caused_by(error))


def _caused_by(error: Exception) -> Exception:
    try:
        raise ValueError("something else") from error
    except ValueError as other:
        return other


def test_a_lost_peer_is_told_from_other_errors():
    assert on_ranks(2, lose_a_peer) == [True, True]
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(OSError("Connection refused"))  # of a dataset, perhaps
