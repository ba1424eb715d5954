"""The tables of docs/distributed.md: what ranks send, and what a step would cost on many GPUs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import by_setting, fastest_of_ours, title
from benchmarks.shape import Shape
from benchmarks.tables import seconds
from sae_lens_alloc.distributed.cost import Step, bytes_per_step, messages

TWO_PROCESSES = Path(__file__).parent / "results" / "ranks_cpu.json"

N_TOKENS, K = 8192, 64
SIZES = (
    (768, 2**15),
    (768, 2**17),
    (2304, 2**18),
    (4096, 2**20),
    (8192, 2**22),
    (8192, 2**24),
)
NUMBERS_OF_RANKS = (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Rates:
    """
    What a GPU does in a second. None of these was measured: they are shares of what the data
    sheet of an H100 SXM states.

    Args:
        products: Floating-point operations of the encoder product (TF32: 494e12).
        memory: Bytes read or written (3.35e12).
        within_node: Bytes sent to other GPUs of the node (450e9).
        between_nodes: Bytes sent around the ring where it leaves a node, by the network cards of
            all its GPUs together (eight of 400 Gbit/s, 400e9). With one such card in a node it is
            an eighth.
        capacity: Bytes of memory (80e9), a part of which the language model needs.
    """

    products: float = 0.6 * 494e12
    memory: float = 0.8 * 3.35e12
    within_node: float = 0.7 * 450e9
    between_nodes: float = 0.7 * 400e9
    capacity: float = 80e9


def step_seconds(step: Step, n_ranks: int, rates: Rates) -> tuple[float, float]:
    """
    Seconds of a step, and those of them in which ranks send; without the language model, and
    as if nothing ran at the same time.
    """
    n_own = -(-step.n_features // n_ranks)
    products = 2 * step.n_tokens * step.d_in * n_own / rates.products
    # Adam reads weight, gradient and two moments, and writes all but the gradient; the
    # gradient is written before, and the encoder's is transposed
    optimizer = 2 * step.d_in * n_own * 4 * (7 + 2) / rates.memory
    link = rates.within_node if n_ranks <= GPUS_PER_NODE else rates.between_nodes
    sending = bytes_per_step(step, n_ranks) / link if n_ranks > 1 else 0.0
    return products + optimizer + sending, sending


def bytes_per_rank(step: Step, n_ranks: int) -> float:
    """Weights, gradients, Adam's moments, and the encoder's gradient once more."""
    return 2 * step.d_in * -(-step.n_features // n_ranks) * 4 * 4.5


def messages_table() -> str:
    """What a rank of eight sends in a step of the first of the sizes."""
    d_in, n_features = SIZES[1]
    step = Step(N_TOKENS, d_in, n_features, k_aux=K)
    rows = [
        f"{N_TOKENS:,} tokens, {d_in} -> {n_features:,} features, k_aux {K}, 8 ranks, "
        "Mutual Choice:\n",
        "| message | kind | bytes of a rank | sent by each rank |",
        "|---|---|---|---|",
    ]
    for message in messages(step, 8):
        rows.append(
            f"| {message.what} | {message.kind} | {message.n_bytes:,} "
            f"| {message.sent(8):,.0f} |"
        )
    rows.append(f"| together | | | {bytes_per_step(step, 8):,.0f} |")
    return "\n".join(rows)


def costs_table(rates: Rates | None = None) -> str:
    """Milliseconds of a step, of which sending, and GB a rank, by size and number of ranks."""
    rates = rates or Rates()
    rows = [
        f"Computed for {N_TOKENS:,} tokens a step and k {K}: milliseconds, the share of them in "
        "which ranks send, and GB a rank. A dash stands where a GPU of 80 GB is too small.\n",
        "| d_in | features | "
        + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in NUMBERS_OF_RANKS)
        + " |",
        "|---" * (2 + len(NUMBERS_OF_RANKS)) + "|",
    ]
    for d_in, n_features in SIZES:
        step = Step(N_TOKENS, d_in, n_features)
        cells = [_cell(step, n, rates) for n in NUMBERS_OF_RANKS]
        rows.append(f"| {d_in:,} | {n_features:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(step: Step, n_ranks: int, rates: Rates) -> str:
    gigabytes = bytes_per_rank(step, n_ranks) / 1e9
    if gigabytes > rates.capacity / 1e9:
        return "-"
    seconds, sending = step_seconds(step, n_ranks, rates)
    size = f"{gigabytes:.2g}" if gigabytes < 10 else f"{gigabytes:.0f}"
    return f"{1e3 * seconds:.3g} ms, {sending / seconds:.0%}, {size} GB"


def measured_beside_computed(report: dict[str, Any]) -> str:
    """What a step on one GPU took, beside what the table would say of it; from a campaign."""
    said: dict[Shape, str] = {}
    # computed for TF32; another precision stands where that was not measured
    for (shape, precision), rows in sorted(
        by_setting(report).items(), key=lambda item: item[0][1] != "TF32"
    ):
        row = fastest_of_ours(rows)
        if row is None or shape.aux or shape in said:
            continue
        computed, _ = step_seconds(
            Step(shape.batch, shape.d_in, shape.d_sae), 1, Rates()
        )
        graph = " with a CUDA graph" if row["cuda_graph"] else ""
        said[shape] = (
            f"{1e3 * seconds(row):.1f} ms in {precision}{graph} and not {1e3 * computed:.1f} ms "
            f"at {title(shape)} with {shape.batch:,} tokens"
        )
    return (
        "This counts the encoder's product, Adam and what is sent, and nothing else of a step. "
        f"Measured on one {report['card']['name']}, a step takes {'; '.join(said.values())}. So "
        "read the milliseconds as what a step takes at least."
    )


def two_processes_table() -> str:
    """Two processes against one on a CPU, from what `python -m benchmarks ranks` measured."""
    report = json.loads(TWO_PROCESSES.read_text())
    shape = report["shape"]
    rows = [
        f"{shape['d_in']} -> {shape['d_sae']:,} features, k {shape['k']}, "
        f"{shape['batch']:,} tokens a step; {report['machine'].partition(',')[0]}; torch "
        f"{report['versions']['torch']}:\n",
        "| | seconds a step | memory of a process |",
        "|---|---|---|",
    ]
    for key, name in (
        ("one_process", "one process of two threads"),
        ("two_processes", "two processes of one thread"),
    ):
        row = report[key]
        rows.append(
            f"| {name} | {row['median_seconds']:.3f} | {row['bytes_each'] / 1e9:.2f} GB |"
        )
    rows.append(
        f"| ratio | {report['time_ratio']:.2f} | {report['memory_ratio']:.2f} |"
    )
    return "\n".join(rows)
