"""
Writes what the documents take from code and from result files, so that no figure is typed.

    python docs/render.py           rewrites docs/config.md, the marked parts of README.md,
                                    docs/performance.md, docs/fine-tuning.md,
                                    docs/experiments.md, docs/results.md,
                                    docs/transcoders.md, docs/faults.md, docs/host-tests.md,
                                    docs/distributed.md and docs/models.md, their pictures,
                                    and the memory that the ready configs state
    python docs/render.py --check   exits with 1 if they are not up to date

Drawing a picture needs kaleido and a Chrome or Chromium; only new measurements need it.
"""

import json
import sys
from pathlib import Path

from benchmarks import tables
from benchmarks.gpu import short as gpu
from benchmarks.gpu.tables import section
from benchmarks.plot import (
    comparison,
    continuations,
    draw,
    gpu_steps,
    growth,
    is_drawn_from,
)
from docs.comparisons import (
    COMPARISONS,
    TRANSCODERS,
    comparison_parts,
    experiment_parts,
    transcoder_parts,
)
from docs.measured import (
    FINE_TUNING,
    FINE_TUNING_MINILM,
    KL_FINISH,
    KL_FINISH_VALIDATION,
    demo_table,
    faults_table,
    fine_tuning_table,
    kl_finish_table,
    shift_table,
    timed_switch_table,
)
from docs.models import models_table, ready_configs, with_memory
from docs.probed import probes_table
from docs.rank_costs import (
    costs_table,
    measured_beside_computed,
    messages_table,
    two_processes_table,
)
from scripts.config_reference import config_reference
from scripts.host_tests import compare as host_tests

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "results"
PERFORMANCE = RESULTS / "performance_cpu.json"
WIDE = RESULTS / "performance_cpu_wide.json"
MUON = RESULTS / "performance_cpu_muon.json"
SWEEPS = RESULTS / "performance_cpu_sweeps.json"
PIPELINE = RESULTS / "pipeline_cpu.json"
GPU = RESULTS / "performance_gpu.json"
HOST_TESTS = RESULTS / "host_tests.json"
# what each picture shows
PICTURES = {
    DOCS / "images" / "performance_cpu.svg": (SWEEPS, growth),
    DOCS / "images" / "performance_gpu.svg": (GPU, gpu_steps),
    DOCS / "images" / "fine_tuning.svg": (FINE_TUNING, continuations),
    DOCS / "images" / "compare_demo.svg": (COMPARISONS["compare_demo"], comparison),
}
if TRANSCODERS.exists():
    picture = DOCS / "images" / "compare_transcoders_demo.svg"
    PICTURES[picture] = (TRANSCODERS, comparison)


def main() -> None:
    on_gpu = json.loads(GPU.read_text())
    parts = {
        README: {
            "step": short_step_table(),
            "gpu": gpu.short(on_gpu),
            "demo": demo_table(),
        },
        DOCS / "performance.md": performance_parts(),
        DOCS / "fine-tuning.md": {
            "fine-tuning": fine_tuning_table(FINE_TUNING),
            "fine-tuning minilm": fine_tuning_table(FINE_TUNING_MINILM),
        },
        DOCS / "experiments.md": {
            **experiment_parts(),
            "timed switch": timed_switch_table(),
            "kl finish": kl_finish_table(KL_FINISH_VALIDATION),
            "kl finish over seeds": kl_finish_table(KL_FINISH),
        },
        DOCS / "results.md": {
            **comparison_parts(),
            "shift": shift_table(),
            "probes minilm": probes_table("minilm"),
            "probes demo": probes_table("demo"),
            "synthetic": gpu.synthetic_lead(on_gpu),
        },
        DOCS / "transcoders.md": transcoder_parts(),
        DOCS / "faults.md": {"faults": faults_table()},
        DOCS / "host-tests.md": host_tests_parts(),
        DOCS / "models.md": {
            "models": models_table(),
            "gpu": gpu.pipeline_lead(on_gpu),
        },
        DOCS / "distributed.md": {
            "messages": messages_table(),
            "costs": costs_table(),
            "measured": measured_beside_computed(on_gpu),
            "two processes": two_processes_table(),
        },
    }
    pages = {page: rendered(page, its_parts) for page, its_parts in parts.items()}
    pages[DOCS / "config.md"] = config_reference()
    pages |= {path: with_memory(path, cfg) for path, cfg in ready_configs()}
    stale = [
        path
        for path, text in pages.items()
        if not path.exists() or path.read_text() != text
    ]
    stale += [
        picture
        for picture, (results, _) in PICTURES.items()
        if not is_drawn_from(picture, results)
    ]
    if "--check" in sys.argv[1:]:
        sys.exit(
            f"not up to date, run python docs/render.py: {', '.join(map(str, stale))}"
            if stale
            else 0
        )
    for path, text in pages.items():
        path.write_text(text)
    for picture, (results, figure) in PICTURES.items():
        if picture in stale:
            draw(picture, results, figure)


def rendered(page: Path, parts: dict[str, str]) -> str:
    """The text of a page with its marked parts written anew."""
    text = page.read_text()
    for name, content in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n{content}\n{end}{after}"
    return text


def step_table(path: Path = PERFORMANCE) -> str:
    """The table of step times, from a file that `python -m benchmarks` wrote."""
    report = json.loads(path.read_text())
    return f"{tables.measured_on(report)}\n\n{tables.centre_table(report)}"


def short_step_table() -> str:
    """The rows of the table of step times that a reader compares first, with their lead."""
    report = json.loads(PERFORMANCE.read_text())
    return (
        f"{tables.recipe_lead(report)}\n\n{tables.centre_table(report, tables.SHORT)}"
    )


def performance_parts() -> dict[str, str]:
    """The tables of docs/performance.md."""
    report, on_gpu = json.loads(SWEEPS.read_text()), json.loads(GPU.read_text())
    parts = {
        "lead": f"{tables.recipe_lead(json.loads(PERFORMANCE.read_text()))}\n\n{gpu.lead(on_gpu)}",
        "limits": tables.limits(report),
        "centre": step_table(),
        "wide": step_table(WIDE),
        "muon": step_table(MUON),
        "memory line": tables.memory_line_table(report),
        "pipeline": tables.pipeline_table(json.loads(PIPELINE.read_text())),
        "gpu": section(on_gpu),
        "row-sparse": gpu.row_sparse_lead(on_gpu),
    }
    for axis in tables.AXES:
        parts[f"time {axis}"] = tables.time_table(report, axis)
        parts[f"memory {axis}"] = tables.memory_table(report, axis)
    return parts


def host_tests_parts() -> dict[str, str]:
    report = json.loads(HOST_TESTS.read_text())
    return {
        "host-tests": host_tests.counts(report),
        "host-tests-differences": host_tests.differences(report),
    }


if __name__ == "__main__":
    main()
