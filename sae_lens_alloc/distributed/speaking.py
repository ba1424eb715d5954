"""Which of several processes says what they all would say."""

import os
from collections import Counter
from hashlib import sha256

import torch.distributed as dist

# Of an error that another process has caused by ending. gloo, NCCL and the store each have their
# own words, and no type of error of their own.
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo/transport",
    "remote process exited",
    "timed out waiting",
    "watchdog",
)
ENDING = "the ending"

_store: dist.Store | None = None
_said: Counter[str] = Counter()


def speak_over(store: dist.Store) -> None:
    """Lets the processes of a launch know by a store what has been said."""
    global _store
    _store = store


def is_first_to_say(text: str) -> bool:
    """
    Whether no other process has said something as often. One that nobody else has to say is said
    by whoever has it. Processes that do not know of each other leave it to rank 0.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" and not dist.is_initialized():
        return True
    _said[text] += 1
    key = f"sae-lens-alloc/said/{sha256(text.encode()).hexdigest()}/{_said[text]}"
    if _store is not None:
        try:
            return _store.add(key, 1) == 1
        except (dist.DistError, RuntimeError):
            return True  # better twice than not at all
    rank = dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", "0")
    return int(rank) == 0 if str(rank).isdecimal() else True


def is_first_to_end() -> bool:
    """Whether no other process has said yet how the run ended: one sentence is enough."""
    return is_first_to_say(ENDING)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says no more than that another process has ended."""
    if error is None:
        return False
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        if any(words in text for words in LOST_PEER):
            return True
    return is_lost_peer(error.__cause__ or error.__context__)
