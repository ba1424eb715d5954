"""SIGTERM in every phase of every command: it ends, and nothing else begins."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from sae_lens.training.activation_scaler import ActivationScaler

import sae_lens_alloc_cli as cli
from sae_lens_alloc.activations import on_text
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.comparison import pool, worker
from sae_lens_alloc.demo import run as demo_run
from sae_lens_alloc.thresholds import recalibration
from sae_lens_alloc.training import fine_tuning, fine_tuning_run, preflight, trainer
from scripts.faults.forks import PHASES, Action, Case, before_first_call, send
from scripts.faults.older_run import finetune, train

Place = tuple[Any, str]
IN_TRAINING: dict[str, Place] = {
    "preflight": (preflight, "find_language_model"),
    "tokens": (ResumableActivationsStore, "get_filtered_llm_batch"),
    "first step": (trainer.AllocSAETrainer, "step"),
    **{name: PHASES[name] for name in ("model", "held-out contexts", "calibration")},
}
IN_FINE_TUNING: dict[str, Place] = {
    "conversion": (fine_tuning, "convert_sae"),
    "baseline": (fine_tuning_run, "measure_baseline"),
    "evaluation": (fine_tuning_run, "evaluate_sae"),
    "first step": IN_TRAINING["first step"],
}
IN_CALIBRATION: dict[str, Place] = {
    "model": (on_text, "gather_activations"),
    "tokens": IN_TRAINING["tokens"],
    "recalibration": (recalibration, "recalibrate"),
}


def interrupted() -> Iterator[Case]:
    commands: dict[str, tuple[list[str], dict[str, Place]]] = {
        "train": (train("output_path=new"), IN_TRAINING),
        "estimating a norm": (
            train(
                "output_path=new",
                "sae.normalize_activations=expected_average_only_in",
            ),
            {"begin": (ActivationScaler, "estimate_scaling_factor")},
        ),
        "finetune": (
            finetune("--from", "out", "output_path=new", "checkpoint_path=null"),
            IN_FINE_TUNING,
        ),
        "calibrate": (
            ["calibrate", "out", "--output", "new", "--tokens", "4096"],
            IN_CALIBRATION,
        ),
    }
    for name, (command, places) in commands.items():
        for place, where in places.items():
            yield Case(f"SIGTERM in {name}: {place}", at(where, command), check=ended())
    for n, what in ((1, "first"), (2, "second")):
        yield Case(f"SIGTERM in demo: {what} SAE", demo(n), check=ended(trainings=n))
    yield Case(
        "SIGTERM in demo: evaluation",
        demo(0),
        check=ended(trainings=2),
    )
    yield Case("SIGTERM in compare", compare, check=no_process_left)


def at(place: Place, command: list[str]) -> Action:
    def act() -> None:
        owner, name = place
        function = before_first_call(getattr(owner, name), send(signal.SIGTERM))
        setattr(owner, name, function)
        cli.app(command)

    return act


def demo(sae: int) -> Action:
    """The demo on little text, ended while it trains its first or second SAE, or after."""

    def act() -> None:
        demo_run.QUICK = "training_tokens=20_480"
        trained = demo_run.train
        n = 0

        def training(*args: Any, **kwargs: Any) -> Any:
            nonlocal n
            n += 1
            if n == sae:
                owner, name = IN_TRAINING["first step"]
                step = before_first_call(getattr(owner, name), send(signal.SIGTERM))
                setattr(owner, name, step)
            return trained(*args, **kwargs)

        demo_run.train = training
        if sae == 0:
            demo_run.evaluate = before_first_call(
                demo_run.evaluate, send(signal.SIGTERM)
            )
        cli.app(["demo", "--quick", "--output", "new"])

    return act


def compare() -> None:
    settings = {
        "sae": {"d_in": 8, "d_sae": 16},
        "training_tokens": 10**7,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 4,
        "compare": {
            "k": [2],
            "lr": [1e-2],
            "seeds": [0, 1],
            "eval_samples": 500,
            "rows": {"ours": {"architecture": "mutual_choice"}},
            "synthetic": {
                "num_features": 20,
                "hidden_dim": 8,
                "firing_probability": {
                    "generator_name": "constant",
                    "probability": 0.1,
                },
                "seed": 1,
            },
        },
    }
    Path("compare.yaml").write_text(yaml.safe_dump(settings))
    open_process = pool.subprocess.Popen

    def opening(*args: Any, **kwargs: Any) -> Any:
        process = open_process(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    pool.subprocess.Popen = opening  # type: ignore[assignment,misc]
    cli.app(["compare", "compare.yaml", "--output", "new"])


def ended(trainings: int | None = None):
    def check(code: int, said: str) -> str | None:
        if code != 130 or "interrupted" not in said:
            return f"endless: went on to exit code {code}"
        n = said.count("Training mutual_choice on") + said.count(
            "Training batchtopk on"
        )
        if trainings is not None and n != trainings:
            return f"endless: {n} SAEs were trained"
        return None

    return check


def no_process_left(code: int, said: str) -> str | None:
    folder = str(Path.cwd())
    deadline = time.monotonic() + 10
    left: list[str] = []
    while time.monotonic() < deadline:
        left = [p for p in working_in(folder) if worker.__name__ in p]
        if not left:
            return ended()(code, said)
        time.sleep(0.1)
    return f"endless: {left}"


def working_in(folder: str) -> Iterator[str]:
    """The command lines of the processes in a folder."""
    for process in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else []:
        try:
            if os.readlink(process / "cwd") == folder:
                yield (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
