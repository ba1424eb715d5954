"""Some of the cases that `scripts/faults/data.py` counts, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from scripts.faults.data import BAD, kind

CASES = (
    "SIGTERM in train: tokens",
    "SIGTERM in estimating a norm",
    "SIGTERM in finetune: conversion",
    "SIGTERM in calibrate: tokens",
    "SIGTERM in demo: first SAE",
    "SIGTERM in compare",
    "finetune on 5 texts, 40960 tokens",
    "resumed with lr_warm_up_steps",
    "resumed with seed",
    "only the BOS of each context",
)


def test_nothing_is_endless_leaks_or_is_ignored(tmp_path: Path):
    output = tmp_path / "faults.json"
    command = [*(sys.executable, "-m", "scripts.faults.data"), "--output", str(output)]
    done = subprocess.run(
        [*command, "--only", *CASES],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(output.read_text())
    assert len(found["cases"]) == len(CASES)
    assert {key: found["counts"][key] for key in BAD} == dict.fromkeys(BAD, 0)
    assert found["counts"]["refused"] == 2


def test_the_script_tells_apart_what_it_counts():
    assert kind("loss", "leak: LEAK: 3 of 18; saved in new") == "leak"
    assert kind("loss", "ignored: seed; saved in new") == "ignored"
    assert kind("ok", "error: no") == "refused"
    assert kind("ok", "saved in new") == "ok"
    assert kind("endless", "") == "endless"
