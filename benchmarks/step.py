"""
Time and memory of one training step: ours, SAELens' `batchtopk` and `topk`, and the floor.

A step is everything a trainer does with a batch: forward, backward, gradient clipping,
optimizer, firing statistics. The floor is what no method that looks at every affinity can
avoid: one dense encoder product, and one fused Adam step over all parameters. Contenders take
turns within each round, so that a slow moment of the machine hits all of them; ratios are
taken within a round.

    python benchmarks/step.py --json docs/benchmarks/step_cpu.json
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

import sae_lens_alloc
from sae_lens_alloc import (
    AllocSAETrainer,
    FeatureChoiceTrainingSAE,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)

N_BATCHES = 4


def trainer_config(args: argparse.Namespace) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=args.batch,
        lr=1e-4,
        lr_end=1e-5,
        device=args.device,
        autocast=args.autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )


def build(name: str, args: argparse.Namespace) -> Callable[[torch.Tensor], object]:
    """The function that runs one training step of a contender on a batch."""
    torch.manual_seed(0)
    size = {"d_in": args.d_in, "d_sae": args.d_sae, "device": args.device}
    if name == "floor":
        return build_floor(args)
    trainer_class, sae = {
        "mutual_choice": lambda: (
            AllocSAETrainer,
            MutualChoiceTrainingSAE(
                MutualChoiceTrainingSAEConfig(**size, k=args.k, aux_loss="none")
            ),
        ),
        "mutual_choice, aux_zipf": lambda: (
            AllocSAETrainer,
            MutualChoiceTrainingSAE(MutualChoiceTrainingSAEConfig(**size, k=args.k)),
        ),
        "mutual_choice, SAELens' trainer": lambda: (
            SAETrainer,
            MutualChoiceTrainingSAE(
                MutualChoiceTrainingSAEConfig(**size, k=args.k, aux_loss="none")
            ),
        ),
        "feature_choice": lambda: (
            AllocSAETrainer,
            FeatureChoiceTrainingSAE(
                FeatureChoiceTrainingSAEConfig(**size, k=args.k, aux_loss="none")
            ),
        ),
        "SAELens batchtopk": lambda: (
            SAETrainer,
            BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=args.k)),
        ),
        "SAELens topk": lambda: (
            SAETrainer,
            TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=args.k)),
        ),
    }[name]()
    trainer = trainer_class(
        cfg=trainer_config(args), sae=sae, data_provider=iter(()), evaluator=None
    )
    if name == "mutual_choice, aux_zipf":
        # a tenth of the features dead, as in the middle of a hard run
        n_dead = args.d_sae // 10
        trainer.n_forward_passes_since_fired[:n_dead] = float("inf")

    def step(batch: torch.Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    return step


def build_floor(args: argparse.Namespace) -> Callable[[torch.Tensor], object]:
    W_enc = torch.randn(args.d_in, args.d_sae, device=args.device)
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, device=args.device))
        for shape in (
            (args.d_in, args.d_sae),
            (args.d_sae, args.d_in),
            (args.d_sae,),
            (args.d_in,),
        )
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    out = torch.empty(args.batch, args.d_sae, device=args.device)

    def step(batch: torch.Tensor) -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.autocast):
            if args.autocast:
                _ = batch @ W_enc
            else:
                torch.mm(batch, W_enc, out=out)
        optimizer.step()

    return step


CONTENDERS = (
    "floor",
    "mutual_choice",
    "mutual_choice, aux_zipf",
    "mutual_choice, SAELens' trainer",
    "feature_choice",
    "SAELens batchtopk",
    "SAELens topk",
)


def batches(args: argparse.Namespace) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(args.batch, args.d_in, generator=generator).to(args.device)
        for _ in range(N_BATCHES)
    ]


def synchronize(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def time_all(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round's step of each contender, after `warmup` steps of each."""
    data = batches(args)
    steps = {name: build(name, args) for name in CONTENDERS}
    for name in CONTENDERS:
        for i in range(args.warmup):
            steps[name](data[i % N_BATCHES])
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for i in range(args.rounds):
        for name in CONTENDERS:
            synchronize(args)
            start = time.perf_counter()
            steps[name](data[i % N_BATCHES])
            synchronize(args)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(name: str, args: argparse.Namespace) -> int:
    """Peak bytes of four steps beyond parameters, gradients and Adam's moments."""
    n_parameters = 2 * args.d_in * args.d_sae + args.d_sae + args.d_in
    data = batches(args)
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = build(name, args)
    for batch in data:
        step(batch)
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - before - 4 * 4 * n_parameters


def peak_memory_apart(name: str) -> int:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout.splitlines()[-1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time and memory of one training step."
    )
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.k = int(args.k) if args.k == int(args.k) else args.k
    if args.memory_of:
        print(peak_memory(args.memory_of, args))
        return
    # Each in a process of its own, since a process never gives its peak back, and before this
    # process grows, since a child inherits its peak.
    memory = {name: peak_memory_apart(name) for name in CONTENDERS}
    seconds = time_all(args)
    rows: list[dict[str, Any]] = []
    for name in CONTENDERS:
        rows.append(
            {
                "contender": name,
                "seconds": statistics.median(seconds[name]),
                "seconds_min": min(seconds[name]),
                "seconds_max": max(seconds[name]),
                "times_floor": paired_ratio(seconds[name], seconds["floor"]),
                "batchtopk_over_this": paired_ratio(
                    seconds["SAELens batchtopk"], seconds[name]
                ),
                "tokens_per_second": args.batch / statistics.median(seconds[name]),
                "working_memory_bytes": memory[name],
            }
        )
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sae_lens": sae_lens.__version__,
            "sae_lens_alloc": sae_lens_alloc.__version__,
        },
        "shape": {
            name: getattr(args, name)
            for name in ("d_in", "d_sae", "k", "batch", "autocast", "rounds")
        },
        "rows": rows,
    }
    print_table(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def print_table(report: dict[str, Any]) -> None:
    shape = report["shape"]
    print(
        f"{shape['d_in']} -> {shape['d_sae']}, k {shape['k']}, B {shape['batch']}, "
        f"{report['machine']}"
    )
    print(
        "| step | seconds (min-max) | x floor | batchtopk / this | tokens/s | memory MB |\n"
        "|---|---|---|---|---|---|"
    )
    for row in report["rows"]:
        print(
            f"| {row['contender']} | {row['seconds']:.3f} "
            f"({row['seconds_min']:.3f}-{row['seconds_max']:.3f}) "
            f"| {row['times_floor']:.2f} | {row['batchtopk_over_this']:.1f} "
            f"| {row['tokens_per_second']:.0f} | {row['working_memory_bytes'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
