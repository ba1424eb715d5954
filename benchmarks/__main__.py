"""
Measures training steps and writes the figures to a JSON file, measurement by measurement:
started again with the same file, it goes on where it stopped.

    python -m benchmarks docs/results/performance_cpu.json

`python -m benchmarks gpu OUT` is the campaign on a GPU, see benchmarks/gpu/command.py, `python -m benchmarks ranks OUT.json` compares two processes with one, see benchmarks/ranks.py,
`python -m benchmarks minilm OUT` collects activations to compare on, see benchmarks/minilm.py, and
`python -m benchmarks probes OUT.json` probes the features of a comparison's SAEs, see benchmarks/probes.py.

First every subject at one shape, the centre; then the sweeps of one axis at a time; then the
memory of ours as d_sae grows. Subjects that are not installed are left out (see
benchmarks/requirements.txt).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.command import main as gpu_campaign
from benchmarks.measure import peak_memory, time_step
from benchmarks.minilm import main as collect_minilm
from benchmarks.own_process import ProcessFailed, in_own_process
from benchmarks.probes import main as probe_saes
from benchmarks.ranks import main as two_ranks
from benchmarks.results import (
    describe_machine,
    installed_versions,
    load_results,
    write_results,
)
from benchmarks.shape import MEMORY_LINE, Shape
from benchmarks.subject import Machine
from benchmarks.subjects import SUBJECTS
from benchmarks.tables import centre_table

PACKAGES = ("torch", "sae-lens", "eai-sparsify", "dictionary-learning")
PARTS = ("centre", "sweeps", "memory")
MEASURES = {"centre": time_step, "sweeps": time_step, "memory": peak_memory}


def planned(
    part: str, subjects: list[str], centre: Shape
) -> Iterator[tuple[str, Shape]]:
    """The measurements of a part, as subjects and shapes."""
    for name in subjects:
        kind = SUBJECTS[name]
        if part == "centre":
            yield name, centre
            if kind.has_aux:
                yield name, centre.with_aux()
        elif part == "sweeps" and kind.swept:
            for shape in centre.sweeps():
                yield name, shape
        elif part == "memory" and kind.config is not None:
            for factor in MEMORY_LINE:
                yield name, centre.with_aux().scaled("d_sae", factor)


class Report:
    """The results file: what it is about, and the measurements so far."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self.content = load_results(path, about) or {
            **about,
            **{part: [] for part in PARTS},
        }

    def find(self, part: str, name: str, shape: Shape) -> dict[str, Any] | None:
        wanted = {"subject": name, **asdict(shape)}
        for row in self.content[part]:
            if wanted.items() <= row.items():
                return row
        return None

    def add(self, part: str, name: str, shape: Shape, result: dict[str, Any]) -> None:
        old = self.find(part, name, shape)
        if old is not None:
            self.content[part].remove(old)
        self.content[part].append({"subject": name, **asdict(shape), **result})
        order = list(SUBJECTS)
        self.content[part].sort(
            key=lambda row: [
                order.index(row["subject"]),
                *(row[field] for field in asdict(shape)),
            ]
        )
        write_results(self.path, self.content)


def too_much(
    at_centre: dict[str, Any], shape: Shape, limits: dict[str, float]
) -> str | None:
    """
    Why a sweep leaves a shape out: time and memory as at the centre, in proportion to
    d_sae and to the batch (and memory to k), would exceed the limits.
    """
    scale = shape.d_sae * shape.batch / (at_centre["d_sae"] * at_centre["batch"])
    seconds = min(at_centre["seconds"]) * scale
    if seconds > limits["step_seconds"]:
        return f"a step would take about {seconds:.0f} s"
    working = at_centre["working_bytes"] * scale * max(1, shape.k / at_centre["k"])
    # the subject's parameters, gradients and moments, the floor's, and the floor's product
    persistent = 2 * 4 * 4 * shape.n_parameters + 4 * shape.d_sae * shape.batch
    gigabytes = (working + persistent) / 1e9
    if gigabytes > limits["memory_gb"]:
        return f"would take about {gigabytes:.0f} GB"
    return None


def measure_all(
    report: Report,
    parts: list[str],
    subjects: list[str],
    machine: Machine,
    deadline: float,
) -> bool:
    """Measures what is missing, and returns whether that was all within the deadline."""
    centre = Shape(**report.content["centre_shape"])
    for part in parts:
        for name, shape in planned(part, subjects, centre):
            row = report.find(part, name, shape)
            if row is not None and "skipped" not in row:
                continue
            reason = None
            if part == "sweeps":
                at_centre = report.find("centre", name, centre)
                if at_centre is None:
                    sys.exit("The sweeps need the centre; measure it first.")
                reason = too_much(at_centre, shape, report.content["limits"])
            if reason is None and time.monotonic() > deadline:
                return False
            report.add(part, name, shape, measured(part, name, shape, machine, reason))
            print(f"{part}: {name}, {shape}", file=sys.stderr)
    return True


def measured(
    part: str, name: str, shape: Shape, machine: Machine, reason: str | None
) -> dict[str, Any]:
    """The result of a measurement, or why there is none."""
    if reason is not None:
        return {"skipped": reason}
    try:
        return in_own_process(MEASURES[part], name, shape, machine)
    except ProcessFailed as failure:
        if failure.kind:
            raise
        return {"skipped": failure.message}


def usable_memory_gb(machine: Machine) -> float:
    """Nine tenths of the memory there is."""
    if machine.is_cuda:
        return 0.9 * torch.cuda.get_device_properties(machine.device).total_memory / 1e9
    return 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def parse_args() -> argparse.Namespace:
    centre = Shape()
    installed = [name for name, kind in SUBJECTS.items() if kind.is_installed]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time and memory of training steps."
    )
    parser.add_argument("json", type=Path, help="results file, continued if it exists")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=installed)
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no measurement after this time; the exit status is 3 if some are left",
    )
    parser.add_argument("--d-in", type=int, default=centre.d_in)
    parser.add_argument("--d-sae", type=int, default=centre.d_sae)
    parser.add_argument("--k", type=int, default=centre.k)
    parser.add_argument("--batch", type=int, default=centre.batch)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument(
        "--step-seconds",
        type=float,
        default=60,
        help="leave out what would take longer a step",
    )
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["gpu"]:
        gpu_campaign(sys.argv[2:])
        return
    if sys.argv[1:2] == ["ranks"]:
        two_ranks(sys.argv[2:])
        return
    if sys.argv[1:2] == ["minilm"]:
        collect_minilm(sys.argv[2:])
        return
    if sys.argv[1:2] == ["probes"]:
        probe_saes(sys.argv[2:])
        return
    args = parse_args()
    machine = Machine(args.device, args.autocast)
    centre = Shape(d_in=args.d_in, d_sae=args.d_sae, k=args.k, batch=args.batch)
    report = Report(
        args.json,
        {
            "machine": describe_machine(machine.device),
            "autocast": machine.autocast,
            "versions": installed_versions(PACKAGES),
            "centre_shape": asdict(centre),
            "limits": {
                "step_seconds": args.step_seconds,
                "memory_gb": round(usable_memory_gb(machine)),
            },
        },
    )
    finished = measure_all(
        report,
        args.parts,
        args.subjects,
        machine,
        time.monotonic() + 60 * args.minutes,
    )
    print(centre_table(report.content))
    if not finished:
        print("not finished: run it again to go on", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
