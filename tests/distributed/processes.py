"""Real processes that train together over gloo, started by one call."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from sae_lens_alloc.distributed.ranks import Ranks

# Imports SAELens once, so that a process takes no time to start.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sae_lens_alloc", "tests.distributed.processes"])

PATIENCE_SECONDS = 300


def on_ranks(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """
    Calls `function(ranks, *args)` in n new processes of one group.

    Args:
        n: Number of processes.
        function: A function of a module.
        *args: What can be pickled.

    Returns:
        What it returned, by rank.

    Raises:
        AssertionError: with the traceback, if it raised an error in a process, or a process
            ended without an answer.
    """
    with TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(n)]
        processes = [
            _CONTEXT.Process(
                target=_run, args=(rank, n, folder, pipes[rank][1], function, args)
            )
            for rank in range(n)
        ]
        for process, (_, end) in zip(processes, pipes, strict=True):
            process.start()
            end.close()
        try:
            return [_answer(rank, pipe) for rank, (pipe, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(rank: int, pipe: Any) -> Any:
    assert pipe.poll(PATIENCE_SECONDS), f"rank {rank} does not answer"
    try:
        succeeded, answer = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} ended without an answer") from None
    assert succeeded, f"rank {rank}:\n{answer}"
    return answer


def _run(
    rank: int,
    n: int,
    folder: str,
    pipe: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder, "store")), n)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        answer = True, function(Ranks(dist.group.WORLD), *args)
    except BaseException:
        answer = False, traceback.format_exc()
    # as bytes: tensors would be shared, and be gone with the process
    pipe.send_bytes(pickle.dumps(answer))
