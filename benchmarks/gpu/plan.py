"""All measurements of the campaign, the ones that matter most first within each part."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu import language_model, rates, steps, synthetic
from benchmarks.gpu.gradient_checks import check_gradients
from benchmarks.gpu.kernel_checks import DTYPES, KERNELS, check_kernels
from benchmarks.gpu.large_checks import check_large
from benchmarks.gpu.scale import PRECISIONS, Scale, StepRow
from benchmarks.gpu.task import Task
from benchmarks.shape import Shape
from benchmarks.subject import Machine
from benchmarks.subjects import SUBJECTS

RATES = "rates"
# Torch's backend last: it is what the others must beat.
BACKENDS = ("triton", "triton_prefilter", "torch")
MEMORY_ROWS = (
    ("mutual_choice", "triton"),
    ("SAELens batchtopk", None),
    ("mutual_choice, row-sparse Adam", "triton"),
)


def all_tasks(scale: Scale, device: str) -> list[Task]:
    """The whole campaign, part by part."""
    return [
        *kernel_tasks(scale, device),
        *step_tasks(scale, device),
        *memory_tasks(scale, device),
        *pipeline_tasks(scale, device),
        *synthetic_tasks(scale, device),
    ]


def kernel_tasks(scale: Scale, device: str) -> Iterator[Task]:
    """Every kernel of every backend, and gradients, against their references."""
    for backend in BACKENDS:
        for kernel in KERNELS:
            if backend == "triton_prefilter" and kernel == "products":
                continue  # those of triton
            for dtype in DTYPES:
                if backend == "triton_prefilter" and dtype != torch.float32:
                    continue  # the low-precision prefilter is for float32 alone
                yield Task(
                    "kernels",
                    f"{kernel}, {backend}, {str(dtype).removeprefix('torch.')}",
                    check_kernels,
                    (kernel, backend, dtype, scale.checked, device),
                    seconds=20,
                    like=f"{kernel}, {backend}",
                )
        yield Task(
            "kernels",
            f"beyond 2^32 affinities, {backend}",
            check_large,
            (backend, scale.large, device),
            seconds=20,
        )
        yield Task(
            "kernels",
            f"gradients, {backend}",
            check_gradients,
            (backend, scale.trained, device),
            seconds=20,
        )


def step_tasks(scale: Scale, device: str) -> Iterator[Task]:
    """The rates of the card, and the step tables."""
    yield Task("steps", RATES, rates.measure_rates, (scale, device))
    first, later = scale.first_rows, scale.later_rows
    dead, in_bfloat16 = scale.centre.with_aux(), ("bfloat16 autocast",)
    tables = (
        (first, scale.centre, scale.precisions),
        (first[:2], dead, scale.precisions),
        (first[:3], scale.wide, in_bfloat16),
        (later, scale.centre, scale.precisions),
        (first[2:] + later, dead, scale.precisions),
        (first[3:], scale.wide, in_bfloat16),
        (first, scale.wide.with_aux(), in_bfloat16),
    )
    for rows, shape, precisions in tables:
        for precision in precisions:
            for row in rows:
                # the low-precision prefilter is for float32 alone
                if row[1] != "triton_prefilter" or precision == "float32":
                    yield from _step_task(row, shape, precision, scale, device)


def _step_task(
    row: StepRow,
    shape: Shape,
    precision: str,
    scale: Scale,
    device: str,
) -> Iterator[Task]:
    subject, backend, cuda_graph = row
    if shape.aux and not SUBJECTS[subject].has_aux:
        return
    machine = replace(
        PRECISIONS[precision], device=device, backend=backend, cuda_graph=cuda_graph
    )
    facts = steps.facts(subject, shape, machine, precision)
    name = [subject, backend, "graph" if cuda_graph else None, precision]
    name += [f"d_sae {shape.d_sae}", "10% dead" if shape.aux else None]
    yield Task(
        "steps",
        ", ".join(part for part in name if part is not None),
        steps.measure_step,
        (subject, shape, machine, scale.pace),
        facts=facts,
        like=f"{subject} {backend} {shape.d_sae}",
    )


def memory_tasks(scale: Scale, device: str) -> Iterator[Task]:
    """Peak memory over d_sae, with a tenth of the features dead."""
    for d_in in scale.memory_d_in:
        for subject, backend in MEMORY_ROWS:
            for d_sae in scale.memory_d_sae:
                shape = replace(scale.centre, d_in=d_in, d_sae=d_sae).with_aux()
                machine = Machine(device, backend=backend)
                yield Task(
                    "memory",
                    f"{subject}, d_in {d_in}, d_sae {d_sae}",
                    steps.measure_memory,
                    (subject, shape, machine),
                    facts=steps.facts(subject, shape, machine),
                    like=f"{subject} {d_in}",
                )


def pipeline_tasks(scale: Scale, device: str) -> Iterator[Task]:
    """Whole trainings on a language model, as ours starts them: with the backend it chooses."""
    for precision in scale.precisions[:2]:
        for architecture in (language_model.OURS, "batchtopk"):
            machine = replace(PRECISIONS[precision], device=device)
            yield Task(
                "pipeline",
                f"{architecture}, {precision}",
                language_model.measure_pipeline,
                (architecture, scale.language_model, machine),
                facts={"architecture": architecture, "precision": precision},
                seconds=30,
                like=architecture,
            )


def synthetic_tasks(scale: Scale, device: str) -> Iterator[Task]:
    """
    The shortest trainings, by which the seconds of the others are foretold, and then the longest
    that fit for all architectures alike.
    """
    sizes = scale.synthetic
    for samples in (sizes.samples[0], *reversed(sizes.samples[1:])):
        for architecture in synthetic.ARCHITECTURES:
            machine = Machine(device)
            yield Task(
                "synthetic",
                f"{architecture}, {samples} samples",
                synthetic.train_and_evaluate,
                (architecture, samples, sizes, machine),
                facts={"architecture": architecture, "samples": samples},
                # 100,000 samples a second, and the model of the data
                seconds=10 + samples / 100_000,
                like=architecture,
                size=samples,
                together=None if samples == sizes.samples[0] else str(samples),
                limit=600,
            )
