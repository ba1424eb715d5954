"""Bars: that of the training, which is SAELens' (compat.py), and ours."""

import threading

import pytest
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training import sae_trainer
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_alloc import AllocSAETrainer, progress
from tests.training.conftest import make_trainer
from tests.training.test_sae_trainer import batches

TOPK = TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2)


def test_the_bar_moves_in_short_runs_too(monkeypatch: pytest.MonkeyPatch):
    at: list[int] = []

    class Bar(sae_trainer.tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            at.append(int(n or 0))
            return super().update(n)

    monkeypatch.setattr(sae_trainer, "tqdm", Bar)
    make_trainer(TopKTrainingSAE(TOPK), batches(5), 5, SAETrainer).fit()
    assert at == [], "the host has changed: see StepwiseTrainer in compat.py"
    make_trainer(TopKTrainingSAE(TOPK), batches(5), 5, AllocSAETrainer).fit()
    assert at == [64] * 5
    # every 2nd of 250
    at.clear()
    make_trainer(TopKTrainingSAE(TOPK), batches(250), 250, AllocSAETrainer).fit()
    assert at == [128] * 125


def test_a_bar_appears_only_for_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert list(progress.shown([1, 2], "measuring")) == [1, 2]
    with progress.token_bar(100, "reading") as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "DELAY", 0)
    assert list(progress.shown([1, 2], "measuring")) == [1, 2]
    with progress.token_bar(100, "reading") as bar:
        bar.update(100)
    said = capsys.readouterr().err
    assert "measuring" in said
    assert "100/100" in said or "0.00/100" in said


def test_a_bar_appears_while_its_first_item_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    for item in progress.shown([1, 2], "measuring"):
        said = ""
        while f"{item - 1}/2" not in said:
            said += capsys.readouterr().err
    assert capsys.readouterr().err.endswith("\r")  # nothing is left of it


def test_a_line_says_what_goes_on_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with progress.announced("loading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    said = ""
    with pytest.raises(ValueError, match="as before"), progress.announced("loading"):
        while "loading: 00:00" not in said:
            said += capsys.readouterr().err
        raise ValueError("as before")
    threads = [thread.name for thread in threading.enumerate() if "show" in thread.name]
    assert threads == []
