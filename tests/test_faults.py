"""The kinds of bad configs that `scripts/faults/configs.py` counts."""

from typing import Any

import pytest
import torch
import yaml

from scripts.faults.configs import (
    BASE,
    COMBINATIONS,
    FILES,
    LINES,
    cases,
    try_case,
    with_changes,
)

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
    assert try_case("good", text).outcome == "ran"


def test_an_endless_run_and_a_traceback_would_be_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    """The script can find what it looks for."""
    from sae_lens_alloc import cli
    from scripts.faults import configs

    text = yaml.safe_dump(BASE)
    monkeypatch.setattr(configs, "SECONDS_PER_CASE", 1)

    def never_ends(*_: Any) -> None:
        while True:
            pass

    monkeypatch.setattr(cli, "check_training", never_ends)
    assert try_case("endless", text).outcome == "endless"

    def fails(*_: Any) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(cli, "check_training", fails)
    assert try_case("unforeseen", text).outcome == "unexpected"
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    assert try_case("traceback", text).outcome == "traceback"
