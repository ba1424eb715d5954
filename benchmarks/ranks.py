"""
Two processes of one thread each that share the features of an SAE, against one process of two
threads: seconds of a training step and memory, in turn.

    python -m benchmarks ranks docs/results/ranks_cpu.json
"""

import argparse
import itertools
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainingSAE

from benchmarks.measure import N_BATCHES
from benchmarks.own_process import in_own_process
from benchmarks.results import describe_machine, installed_versions, write_results
from benchmarks.shape import Shape
from benchmarks.subject import Machine
from benchmarks.subjects import mutual_choice_config, our_trainer_config
from sae_lens_alloc.distributed.cost import Step, bytes_per_step
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.saes.sharding import new_shard
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from sae_lens_alloc.training.trainer import AllocSAETrainer

SHAPE = Shape(d_sae=65536)
WARM_UP_STEPS, TIMED_STEPS, ROUNDS = 3, 6, 3


def steps_of_rank(
    rank: int, n_ranks: int, n_threads: int, folder: str, shape: Shape
) -> dict[str, Any]:
    """Seconds of each timed step of a rank, and the memory that its training has taken."""
    torch.set_num_threads(n_threads)
    before = _peak_bytes()
    ranks = Ranks()
    if n_ranks > 1:
        store = dist.FileStore(str(Path(folder, "store")), n_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
        ranks = Ranks(dist.group.WORLD)
    machine = Machine()
    torch.manual_seed(0)
    cfg, training = (
        mutual_choice_config(shape, machine),
        our_trainer_config(shape, machine),
    )
    if ranks.is_alone:
        sae = TrainingSAE.from_dict(cfg.to_dict())
        trainer: AllocSAETrainer[Any, Any] = AllocSAETrainer(training, sae, iter(()))
    else:
        shard = new_shard(cfg, FeatureShard(shape.d_sae, ranks))
        trainer = ShardedSAETrainer(training, shard, iter(()))
    generator = torch.Generator().manual_seed(1)
    data = itertools.cycle(
        torch.randn(N_BATCHES, shape.batch, shape.d_in, generator=generator)
    )
    seconds: list[float] = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        # each rank has a part of the batch, and all of them need it
        part = next(data).chunk(n_ranks)[rank]
        start = time.perf_counter()
        trainer.step(ranks.gather(part))
        trainer.n_training_steps += 1
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[WARM_UP_STEPS:], "bytes": _peak_bytes() - before}


def measured(n_ranks: int, n_threads: int, shape: Shape) -> list[dict[str, Any]]:
    """What each of some processes has measured, which have run side by side."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(n_ranks) as pool:
        return list(
            pool.map(
                lambda rank: in_own_process(
                    steps_of_rank, rank, n_ranks, n_threads, folder, shape
                ),
                range(n_ranks),
            )
        )


def main(arguments: list[str]) -> None:
    """Measures and writes the figures to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ranks")
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args(arguments).output
    rounds = [(measured(1, 2, SHAPE), measured(2, 1, SHAPE)) for _ in range(ROUNDS)]
    alone, together = (_summary([found[i] for found in rounds]) for i in (0, 1))
    content = {
        "shape": asdict(SHAPE),
        "machine": describe_machine("cpu"),
        "versions": installed_versions(("torch", "sae-lens")),
        "one_process": alone,
        "two_processes": together,
        "bytes_sent_per_step": bytes_per_step(
            Step(SHAPE.batch, SHAPE.d_in, SHAPE.d_sae), 2
        ),
        "time_ratio": together["median_seconds"] / alone["median_seconds"],
        "memory_ratio": together["bytes_each"] / alone["bytes_each"],
    }
    write_results(output, content)
    print(
        f"{content['time_ratio']:.2f} x the time, {content['memory_ratio']:.2f} x the memory each"
    )


def _summary(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Steps by the first process, which all others take with it, and the most memory of one."""
    seconds = [step for by_rank in rounds for step in by_rank[0]["seconds"]]
    return {
        "seconds": seconds,
        "median_seconds": median(seconds),
        "bytes_each": max(found["bytes"] for by_rank in rounds for found in by_rank),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
