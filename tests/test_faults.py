"""The kinds of bad configs that `scripts/faults/configs.py` counts, and the counting itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from docs import measured
from sae_lens_alloc.training import runner
from scripts.faults.configs import (
    BASE,
    COMBINATIONS,
    FILES,
    LINES,
    cases,
    try_case,
    with_changes,
)
from scripts.faults.counting import OUTCOMES, Outcome, finish

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What is right after all, has no effect, or is found out by the model's own code.
GOOD = ("capital Constant with lr_end 0", "unknown model_kwargs")
FOUND_BY_THE_MODEL = "unknown model_from_pretrained_kwargs"
DEVICES = ("device cuda", "device mps", "device xpu")
BAD = [
    name
    for name in (*COMBINATIONS, *FILES, *LINES)
    if name not in (*GOOD, FOUND_BY_THE_MODEL)
    and not (name in DEVICES and torch.accelerator.is_available())
]


@pytest.fixture(autouse=True, scope="module")
def few_calibration_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CALIBRATION_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return dict(cases())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_before_the_model_is_loaded(
    texts: dict[str, str], name: str
):
    outcome = try_case(name, texts[name])
    assert outcome.outcome == "refused", outcome


def test_what_the_model_does_not_know_is_one_sentence(texts: dict[str, str]):
    outcome = try_case(FOUND_BY_THE_MODEL, texts[FOUND_BY_THE_MODEL])
    assert outcome.outcome == "refused late"
    assert "model_from_pretrained_kwargs {'bogus': 3}" in outcome.said


@pytest.mark.parametrize(
    "overrides", [{}, COMBINATIONS[GOOD[0]], {"adam_beta1": 0}], ids=str
)
def test_a_good_config_runs(overrides: dict[str, Any]):
    text = yaml.safe_dump(with_changes(BASE, overrides))
    assert try_case("good", text).outcome == "worked"


def test_an_endless_run_and_a_traceback_would_be_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    """The script can find what it looks for."""
    from sae_lens_alloc.training import preflight
    from sae_lens_alloc_cli.endings import TRACEBACK_VARIABLE
    from scripts.faults import configs

    text = yaml.safe_dump(BASE)
    monkeypatch.setattr(configs, "SECONDS_PER_CASE", 1)

    def never_ends(*_: Any) -> None:
        while True:
            pass

    monkeypatch.setattr(preflight, "check_training", never_ends)
    assert try_case("endless", text).outcome == "endless"

    def fails(*_: Any) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(preflight, "check_training", fails)
    assert try_case("unforeseen", text).outcome == "unexpected"
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    assert try_case("traceback", text).outcome == "traceback"


def test_outcomes_are_counted_and_a_bad_one_is_an_error(tmp_path: Path):
    good = [Outcome("a", "refused", "no"), Outcome("b", "worked", "")]
    path = tmp_path / "counts.json"
    assert finish(good, path) == 0
    none = dict.fromkeys(OUTCOMES, 0)
    written = json.loads(path.read_text())
    assert written["n_cases"] == 2
    assert written["counts"] == {**none, "refused": 1, "worked": 1}
    assert written["cases"][0] == {"case": "a", "outcome": "refused", "said": "no"}
    for bad in ("unexpected", "traceback", "endless", "lost", "leaked", "ignored"):
        assert finish([*good, Outcome("c", bad, "")], None) == 1


def test_one_command_writes_what_a_script_counts(tmp_path: Path):
    path = tmp_path / "faults.json"
    command = [sys.executable, "-m", "scripts.faults", path, "--every", "10000"]
    result = subprocess.run(
        [*command, "--only", "sae_folders"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert (report["every"], report["scripts"].keys()) == (10000, {"sae_folders"})
    # a whole SAE, given to three commands
    counted = report["scripts"]["sae_folders"]
    assert counted["n_cases"] == counted["counts"]["worked"] == 3
    assert counted["cases"] == []


def test_the_page_shows_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "faults.json"
    monkeypatch.setattr(measured, "FAULTS", path)
    assert measured.faults_table() == "Not counted yet."
    counts = {**dict.fromkeys(OUTCOMES, 0), "refused": 1234, "lost": 1}
    report = {
        "command": "python -m scripts.faults",
        "versions": {"torch": "2.13", "sae-lens": "6.54"},
        "every": 1,
        "scripts": {"configs": {"n_cases": 1235, "counts": counts, "cases": []}},
    }
    path.write_text(json.dumps(report))
    assert measured.faults_table().splitlines() == [
        "All cases; torch 2.13, sae-lens 6.54 (`python -m scripts.faults`):",
        "",
        "| | cases | refused | refused late | worked | unexpected | traceback | endless | lost | leaked | ignored |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| configs | 1,235 | 1,234 | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0 |",
    ]
