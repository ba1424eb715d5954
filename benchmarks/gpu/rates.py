"""What the card can do at best: the rates that a floor of a training step is counted from."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.scale import PRECISIONS, Scale
from benchmarks.measure import synchronize
from benchmarks.results import describe_machine
from benchmarks.shape import Shape
from benchmarks.subject import Machine

REPEATS = 20
# Adam reads a weight, its gradient and two moments and writes all but the gradient, in float32.
ADAM_BYTES = 7 * 4


def describe_card(device: str) -> dict[str, Any]:
    """Name of the card, and its memory if it is a GPU."""
    card: dict[str, Any] = {"name": describe_machine(device)}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card["memory_bytes"] = properties.total_memory
    return card


def measure_rates(scale: Scale, device: str) -> dict[str, Any]:
    """
    Products per second, in floating-point operations, for each precision: of large square
    matrices, and of the encoder of the step table; and bytes per second of a copy.
    """
    machine = Machine(device)

    def seconds(action: Callable[[], object]) -> float:
        action()
        found = []
        for _ in range(REPEATS):
            synchronize(machine)
            start = time.perf_counter()
            action()
            synchronize(machine)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    source = torch.randn(scale.copied // 4, device=device)
    target = torch.empty_like(source)
    copy_seconds = seconds(lambda: target.copy_(source))
    bytes_per_second = 2 * source.numel() * 4 / copy_seconds
    del source, target

    square = Shape(d_in=scale.product, d_sae=scale.product, batch=scale.product)
    flops: dict[str, dict[str, float]] = {}
    for precision, computed in PRECISIONS.items():
        computed.prepare()
        dtype = torch.bfloat16 if computed.autocast else torch.float32
        flops[precision] = {}
        for name, shape in {"square": square, "encoder": scale.centre}.items():
            left = torch.randn(shape.batch, shape.d_in, device=device, dtype=dtype)
            right = torch.randn(shape.d_in, shape.d_sae, device=device, dtype=dtype)
            taken = seconds(lambda left=left, right=right: left @ right)
            flops[precision][name] = product_flops(shape) / taken
    return {"flops": flops, "bytes_per_second": bytes_per_second}


def product_flops(shape: Shape) -> int:
    """Floating-point operations of the encoder's product."""
    return 2 * shape.batch * shape.d_in * shape.d_sae


def floor_of_rates(rates: dict[str, Any], shape: Shape, precision: str) -> float:
    """Seconds of the encoder's product and of Adam at the card's best rates."""
    product = product_flops(shape) / max(rates["flops"][precision].values())
    return product + ADAM_BYTES * shape.n_parameters / rates["bytes_per_second"]
