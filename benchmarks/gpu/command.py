"""
The campaign on a GPU: every kernel checked, training steps of ours and of others timed, memory,
the whole pipeline, and a benchmark with known features. Keeps each result as soon as it is
there, in OUT/campaign.json; run again with the same OUT, it goes on with what is missing or
failed.

    python -m benchmarks gpu OUT --minutes 8
    python -m benchmarks gpu OUT --rehearse --device cpu
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.campaign import Results, run_campaign
from benchmarks.gpu.plan import all_tasks
from benchmarks.gpu.rates import describe_card
from benchmarks.gpu.scale import CARD, REHEARSAL
from benchmarks.gpu.tables import section
from benchmarks.own_process import ProcessFailed, in_own_process
from benchmarks.results import installed_versions

PACKAGES = (
    *("torch", "triton", "transformers", "sae-lens"),
    *("eai-sparsify", "dictionary-learning"),
)


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="Measures all there is to measure on a GPU.",
    )
    parser.add_argument(
        "out", type=Path, help="folder of the results, continued if it exists"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="start nothing that does not fit into this time; the exit status is 3 if "
        "something is left",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--rehearse", action="store_true", help="all of it at tiny sizes"
    )
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.rehearse:
        parser.error("a CPU can only rehearse the campaign: add --rehearse.")
    return args


def main(arguments: Sequence[str]) -> None:
    started = time.monotonic()
    args = parse_args(arguments)
    if args.device == "cpu":
        # read by the processes that import Triton
        os.environ["TRITON_INTERPRET"] = "1"
    scale = REHEARSAL if args.rehearse else CARD
    try:
        # in a process of its own: this one never touches the card, nor takes its memory
        card = in_own_process(describe_card, args.device, seconds=120)
    except ProcessFailed as failure:
        sys.exit(f"{args.device} cannot be used: {failure.message}")
    about = {
        "card": card,
        "scale": scale.name,
        "versions": installed_versions(PACKAGES),
    }
    results = Results(args.out, about)
    minutes = args.minutes - (time.monotonic() - started) / 60
    finished = run_campaign(results, all_tasks(scale, args.device), minutes)
    print(section(results.content))
    if not finished:
        print("not finished: run it again to go on", file=sys.stderr)
        sys.exit(3)
