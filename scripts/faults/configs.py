"""
Trains with hundreds of configs that are wrong in one place, and counts what comes of them.

    python -m scripts.faults.configs [--json COUNTS.json] [--every N] [--only TEXT]

Every case runs in this process, in a folder of its own, with an alarm. A good outcome is one
sentence, or a run where the value is a good one after all.
"""

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # read where they are imported; a missing name is then missing at once
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"

import yaml  # noqa: E402
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import sae_lens_alloc  # noqa: E402
from sae_lens_alloc import MutualChoiceTrainingSAEConfig  # noqa: E402
from sae_lens_alloc.training import runner, sourced_runner  # noqa: E402
from sae_lens_alloc_cli import app  # noqa: E402
from sae_lens_alloc_cli.endings import TRACEBACK_VARIABLE  # noqa: E402
from scripts.faults.counting import (  # noqa: E402
    Outcome,
    chosen,
    finish,
    read_options,
)

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
SECONDS_PER_CASE = 60
MEMORY_LIMIT = 16 * 2**30

# Two steps of 64 tokens.
BASE: dict[str, Any] = {
    "model_class_name": "AutoModelForCausalLM",
    "model_name": str(DEMO / "model"),
    "hook_name": "transformer.h.0",
    "dataset_path": str(DEMO / "corpus"),
    "dataset_trust_remote_code": False,
    "is_dataset_tokenized": False,
    "streaming": True,
    "context_size": 16,
    "training_tokens": 128,
    "train_batch_size_tokens": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "n_batches_for_norm_estimate": 2,
    "lr": 1e-3,
    "output_path": "saved",
    "checkpoint_path": None,
    "verbose": False,
    "sae": {"architecture": "mutual_choice", "d_in": 192, "d_sae": 64, "k": 4},
    "logger": {"log_to_wandb": False},
}

# YAML texts that are put in the place of every setting.
BAD_VALUES = {
    "1e30": "1e30",
    "10^400": "1" + "0" * 400,
    "-1": "-1",
    "0": "0",
    "nan": ".nan",
    "inf": ".inf",
    "list": "[1, a]",
    "mapping": "{a: 1, 2: b}",
    "deep": "[" * 2000 + "]" * 2000,
    "a hundred deep": "{a: " * 100 + "1" + "}" * 100,
    "1/0": "1/0",
    "1/0%": "1/0%",
    "long": "x" * 100_000,
}

# What the settings say together, and other files than settings: overrides by name.
COMBINATIONS: dict[str, dict[str, Any]] = {
    "seqpos_slice of no number": {"seqpos_slice": []},
    "seqpos_slice of four numbers": {"seqpos_slice": [0, 8, 2, 1]},
    "seqpos_slice with step 0": {"seqpos_slice": [0, 8, 0]},
    "seqpos_slice of nothing": {"seqpos_slice": [16, None]},
    "metadata that is a list": {"sae": {"metadata": [1]}},
    "metadata that is a number": {"sae": {"metadata": 3}},
    "metadata with numbers as keys": {"sae": {"metadata": {1: 2}}},
    "unknown model_from_pretrained_kwargs": {
        "model_from_pretrained_kwargs": {"bogus": 3}
    },
    "unknown model_kwargs": {"model_kwargs": {"bogus": 3}},
    **{f"device {name}": {"device": name} for name in ("meta", "xpu", "cuda", "mps")},
    **{
        f"{key} {name}": {key: name}
        for key in ("llm_device", "act_store_device")
        for name in ("meta", "cuda:7")
    },
    "sae.device meta": {"sae": {"device": "meta"}},
    **{
        f"d_in {d_in} at {hook}": {"hook_name": hook, "sae": {"d_in": d_in}}
        for d_in in (1, 191, 193)
        for hook in (
            "transformer.h.0",
            "transformer.h.1.mlp.c_fc",
            "transformer.h.1.attn",
            "lm_head",
        )
    },
    "a hook that is not there": {"hook_name": "transformer.h.9"},
    "a hook of TransformerLens": {"hook_name": "blocks.0.hook_resid_pre"},
    "a hook that gives nothing": {"hook_name": "transformer.h.0.attn.attn_dropout"},
    "a head where there are none": {"hook_head_index": 0, "sae": {"d_in": 64}},
    "context of 257 positions": {"context_size": 257},
    "d_sae beyond the memory": {"sae": {"d_sae": 10**9}},
    "buffer beyond the memory": {"n_batches_in_buffer": 10**9},
    "prefetched beyond the memory": {"prefetch_llm_batches": 10**9},
    "10^14 training tokens in one step": {
        "training_tokens": 10**14,
        "train_batch_size_tokens": 10**14,
    },
    "quota above a falling budget": {
        "training_tokens": 640,
        "sae": {
            "min_tokens_per_feature": 6.0,
            "feature_choice_steps": 8,
            "k_start": 8,
            "k_decay_steps": 4,
        },
    },
    "quota above the budget of the recipe": {
        "training_tokens": 640,
        "sae": {"min_tokens_per_feature": 7.0},
    },
    "quota above the budget of feature_choice": {
        "sae": {"architecture": "feature_choice", "min_tokens_per_feature": 5.0}
    },
    "evaluation of no batch": {
        "n_eval_batches": 0,
        "logger": {"log_to_wandb": True, "eval_every_n_wandb_logs": 1},
    },
    "cosine over no step": {
        "lr_scheduler_name": "cosineannealing",
        "lr_warm_up_steps": 1,
        "lr_decay_steps": 1,
    },
    "more cycles than steps": {
        "lr_scheduler_name": "cosineannealingwarmrestarts",
        "n_restart_cycles": 3,
    },
    "lr_end above lr": {"lr_scheduler_name": "cosineannealing", "lr_end": 1},
    "lr_end below 0": {"lr_scheduler_name": "cosineannealing", "lr_end": -1},
    "warm-up and decay that overlap": {"lr_warm_up_steps": 2, "lr_decay_steps": 1},
    "capital Constant with lr_end 0": {
        "lr_scheduler_name": "Constant",
        "lr_decay_steps": 1,
        "lr_end": 0,
    },
    "checkpoints without a path": {"n_checkpoints": 1},
    "final checkpoint without a path": {"save_final_checkpoint": True},
    "checkpoints at an empty path": {"n_checkpoints": 1, "checkpoint_path": ""},
    "no output": {"output_path": None},
    "empty output": {"output_path": ""},
    "missing model folder": {"model_name": "/no/such/model"},
    "missing relative model folder": {"model_name": "./no/such"},
    "model that is a folder without a model": {"model_name": str(DEMO / "corpus")},
    "unknown model of TransformerLens": {"model_class_name": "HookedTransformer"},
    "mamba without mamba-lens": {"model_class_name": "HookedMamba"},
    "missing dataset folder": {"dataset_path": "/no/such/dataset"},
    "dataset folder without data": {"dataset_path": str(DEMO.parent / "ops")},
    "dataset that is no dataset": {"dataset_path": str(DEMO / "model" / "config.json")},
    "missing checkpoint": {"resume_from_checkpoint": "/no/such"},
    "a checkpoint that is none": {"resume_from_checkpoint": str(DEMO / "model")},
    "missing pretrained SAE": {"from_pretrained_path": "/no/such"},
    "a pretrained SAE that is none": {"from_pretrained_path": str(DEMO / "model")},
    "separator beyond the vocabulary": {"sequence_separator_token": 1536},
    "bad compilation mode": {"compile_llm": True, "llm_compilation_mode": "fastest"},
    "cached activations that are not there": {"use_cached_activations": True},
    "chat formatting of text that is tokenized": {
        "use_chat_formatting": True,
        "is_dataset_tokenized": True,
    },
    "a comparison": {"compare": {"k": [4]}},
    "an unknown architecture": {"sae": {"architecture": "every"}},
}
FILES = {
    "empty file": "",
    "a list": "- a\n- b\n",
    "a word": "word",
    "not YAML": "a: b: c",
    "a control character": "a: \x01",
    "a Python object": "a: !!python/object:os.system {}",
}

# What is added to a config that works.
LINES = {
    "a key that is a list": "[a, b]: 1\n",
    "a key that is a mapping": "{a: b}: 1\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "a date that is none": "model_kwargs: {a: 2020-13-45}\n",
    "a number of 10,000 digits": "seed: 1" + "0" * 10_000,
    "a mapping in itself": "model_kwargs: &a {b: *a}\n",
    "an alias that is not there": "model_kwargs: *b\n",
    "mappings 5,000 deep": "model_kwargs: " + "{a: " * 5000 + "1" + "}" * 5000,
    "a share of 10^9 digits": "lr_warm_up_steps: 1e999999999%\n",
    "a date in a mapping": "model_kwargs: {a: 2020-01-02}\n",
    "a set in a mapping": "model_kwargs: {a: !!set {b, c}}\n",
}


class _Endless(BaseException):
    """No Exception, which somebody might catch."""


def cases() -> Iterator[tuple[str, str]]:
    """What is wrong, and the YAML file."""
    sections = {
        "": LanguageModelSAERunnerConfig,
        "logger": LoggingConfig,
        "sae": MutualChoiceTrainingSAEConfig,
    }
    for section, config_class in sections.items():
        for field in fields(config_class):
            if field.name in sections:
                continue
            for kind, text in BAD_VALUES.items():
                yield (
                    ".".join(filter(None, [section, field.name])) + f" = {kind}",
                    _with_text(section, field.name, text),
                )
    for section in ("sae", "logger", "unknown_key"):
        for kind, text in BAD_VALUES.items():
            yield f"{section} = {kind}", _with_text("", section, text)
    for name, overrides in COMBINATIONS.items():
        yield name, yaml.safe_dump(with_changes(BASE, overrides))
    yield from FILES.items()
    for name, text in LINES.items():
        yield name, yaml.safe_dump(BASE) + text


def _with_text(section: str, key: str, text: str) -> str:
    settings = with_changes(BASE, {})
    target = settings[section] if section else settings
    target[key] = "PLACE"
    return yaml.safe_dump(settings, width=10**6).replace("PLACE", text)


def with_changes(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of settings with others put in, those of a section beside what is there."""
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
    for key, value in overrides.items():
        nested = isinstance(value, dict) and key in base
        merged[key] = {**base[key], **value} if nested else value
    return merged


def try_case(case: str, text: str) -> Outcome:
    """Trains with one config, in a new folder. A run "worked" if the value was a good one."""
    loaded = False
    load = sourced_runner.load_language_model

    def note_loading(cfg: Any) -> Any:
        nonlocal loaded
        loaded = True
        return load(cfg)

    sourced_runner.load_language_model = note_loading
    try:
        with tempfile.TemporaryDirectory() as folder, _inside(folder), _alarm():
            Path("run.yaml").write_text(text)
            result = CliRunner().invoke(app, ["train", "run.yaml"])
    except _Endless:
        return Outcome(case, "endless", "")
    finally:
        sourced_runner.load_language_model = load
    if isinstance(result.exception, _Endless):
        return Outcome(case, "endless", "")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return Outcome(case, "traceback", repr(result.exception)[:1000])
    if result.exit_code == 0:
        return Outcome(case, "worked", result.stdout.splitlines()[-1][:200])
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if len(said) != 1:
        return Outcome(case, "traceback", result.stderr[-1000:])
    if TRACEBACK_VARIABLE in said[0]:
        return Outcome(case, "unexpected", said[0][:1000])
    return Outcome(case, "refused late" if loaded else "refused", said[0][:1000])


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _Endless

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    """Runs the cases, prints what was not refused, and returns the exit code."""
    options = read_options(__doc__)
    # a run that takes all memory fails by itself, and not the machine
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    runner.CALIBRATION_TOKENS = 256
    outcomes: list[Outcome] = []
    for case, text in chosen(cases(), options):
        outcomes.append(try_case(case, text))
        if outcomes[-1].outcome not in ("refused", "worked"):
            print(outcomes[-1], flush=True)
    return finish(outcomes, options.json)


if __name__ == "__main__":
    sys.exit(main())
