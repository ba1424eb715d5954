"""A file of a run, read with overrides, and what is wrong with it in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from sae_lens_alloc import (
    load_runner_config,
)

# 10,000 tokens in steps of 100: 100 training steps
MINIMAL = """
model_name: gpt2
hook_name: blocks.0.hook_resid_pre
dataset_path: some/dataset
context_size: 50
n_batches_in_buffer: 4
training_tokens: 10_000
train_batch_size_tokens: 100
sae:
  architecture: mutual_choice
  d_in: 8
  d_sae: 32
  k: 2
logger:
  log_to_wandb: false
"""


def load(path: Path, *overrides: str) -> Any:
    return load_runner_config(path, overrides)


def error_of(path: Path, *overrides: str) -> str:
    """The error's sentence without the file and the overrides it starts with."""
    with pytest.raises(ValueError) as error:
        load_runner_config(path, overrides)
    source, _, sentence = str(error.value).partition(".yaml")
    assert source == str(path).removesuffix(".yaml")
    if overrides:
        sentence = sentence.removeprefix(f" with {', '.join(overrides)}")
    return sentence.removeprefix(": ")
