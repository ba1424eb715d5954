"""Some of the cases that `scripts/faults/data.py` counts, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.faults import forks, interrupted
from scripts.faults.counting import OUTCOMES, Outcome
from scripts.faults.data import told_by_the_check

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


@pytest.mark.slow
def test_nothing_is_endless_leaks_or_is_ignored(tmp_path: Path):
    path = tmp_path / "counts.json"
    command = [*(sys.executable, "-m", "scripts.faults.data"), "--json", str(path)]
    done = subprocess.run(
        [*command, "--only", *CASES],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(path.read_text())
    assert found["n_cases"] == len(CASES)
    good = {"refused": 2, "worked": len(CASES) - 2}
    assert found["counts"] == {**dict.fromkeys(OUTCOMES, 0), **good}


def test_what_a_check_has_found_is_counted():
    for kind in ("leaked", "ignored", "endless", "traceback"):
        found = Outcome("case", "lost", f"{kind}: something; saved in new")
        assert told_by_the_check(found).outcome == kind
        assert not OUTCOMES[kind]
    lost = Outcome("case", "lost", "out/cfg.json is another; saved in new")
    assert told_by_the_check(lost) == lost


def test_the_places_where_runs_are_ended_are_there():
    phases = {
        **forks.PHASES,
        **forks.OTHER_PHASES,
        **interrupted.IN_TRAINING,
        **interrupted.IN_FINE_TUNING,
        **interrupted.IN_CALIBRATION,
    }
    assert [
        name for name, (owner, key) in phases.items() if not hasattr(owner, key)
    ] == []
