"""The ready configurations: the table of docs/models.md, and the memory that each file states."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sae_lens_alloc import load_runner_config
from sae_lens_alloc.activations.hook_names import hook_names_of
from sae_lens_alloc.training.summary import estimate_memory, in_bytes

CONFIGS = Path(__file__).parent.parent / "configs"
MEMORY = re.compile(r"(?<=^# Memory: )about [\d.]+ [MG]B", re.MULTILINE)


def ready_configs() -> Iterator[tuple[Path, Any]]:
    """The configs of trainings of public models, which run on a GPU."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        is_comparison = "compare" in settings
        is_fine_tuning = (
            "d_in" not in settings["sae"]
        )  # known from the SAE to start from
        if settings["device"] == "cuda" and not is_comparison and not is_fine_tuning:
            yield path, load_runner_config(path)


def memory_of(cfg: Any) -> str:
    """What a training needs beside the language model, such as "about 3.7 GB"."""
    return f"about {in_bytes(sum(estimate_memory(cfg).values()))}"


def with_memory(path: Path, cfg: Any) -> str:
    """The text of a config with the memory in its comment written anew."""
    return MEMORY.sub(memory_of(cfg), path.read_text(), count=1)


def models_table() -> str:
    """All ready configurations, a row each."""
    rows = [
        "| config | model | hook | d_in | d_sae | k | tokens | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, cfg in ready_configs():
        hooks = " to ".join(f"`{hook}`" for hook in hook_names_of(cfg))
        rows.append(
            f"| [`{path.stem}`](../configs/{path.name}) | {cfg.model_name} | {hooks} "
            f"| {cfg.sae.d_in:,} | {cfg.sae.d_sae:,} | {cfg.sae.k:g} "
            f"| {cfg.training_tokens:,} | {memory_of(cfg)} |"
        )
    return "\n".join(rows)
