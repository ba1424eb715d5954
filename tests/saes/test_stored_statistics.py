"""Statistics stay float32 in a checkpoint whatever the dtype that SAELens loads it in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.saes.conftest import make_sae, statistics

# beyond the range of float16, below its smallest number, and no round numbers
VALUES = torch.tensor([1e5, 3.4e38, 1e-6, 1.2e-38, 0.1, 1 + 2**-23, 0.0, torch.inf])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_survives(dtype: str, tmp_path: Path):
    sae = make_sae(dtype=dtype)
    statistics(sae).threshold[: len(VALUES)] = VALUES
    statistics(sae).density[: len(VALUES)] = VALUES
    statistics(sae).cut.fill_(1e-7)
    sae.save_model(tmp_path)
    loaded = make_sae(seed=3, dtype=dtype)
    loaded.load_weights_from_checkpoint(tmp_path)
    for name, value in statistics(sae).named_buffers():
        found = statistics(loaded).get_buffer(name)
        assert found.dtype == value.dtype, name
        assert torch.equal(found, value), name


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path):
    """They hold three bfloat16 numbers for each, whose sum it is."""
    sae = make_sae()
    weights, _ = sae.save_model(tmp_path)
    tensors = load_file(weights)
    density = torch.rand(32)
    first = density.bfloat16().float()
    second = (density - first).bfloat16().float()
    tensors["allocation.density"] = torch.stack(
        [first, second, density - first - second]
    )
    save_file(tensors, weights)
    loaded = make_sae(seed=3)
    loaded.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(statistics(loaded).density, density)
