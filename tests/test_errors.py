"""Errors as the command line says them."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from sae_lens_alloc.errors import LONGEST_SENTENCE, in_one_sentence
from sae_lens_alloc_cli.endings import (
    TRACEBACK_VARIABLE,
    ends_when_interrupted,
    one_sentence_errors,
)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("k must\n  be one."), "k must be one."),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (RuntimeError("bad"), "RuntimeError: bad"),
        (AssertionError(), "AssertionError"),
        (EOFError(), "EOFError"),
        # the reason that a library chains is said, once
        (
            chained(RuntimeError("while reading."), OSError("disk full")),
            "RuntimeError: while reading (disk full)",
        ),
        (
            chained(OSError("no: disk full."), OSError("disk full.")),
            "no: disk full.",
        ),
        # our own sentences are whole
        (chained(ValueError("give --l0."), KeyError("k")), "give --l0."),
    ],
)
def test_an_error_is_one_line(error: Exception, sentence: str):
    assert in_one_sentence(error) == sentence


def test_a_long_error_is_cut():
    assert len(in_one_sentence(ValueError("x" * 10**6))) == LONGEST_SENTENCE + 2


@pytest.mark.parametrize("kind", [EOFError, RuntimeError, KeyError, AssertionError])
def test_an_unforeseen_error_is_a_sentence_too(
    kind: type[Exception],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    with pytest.raises(typer.Exit) as stop, one_sentence_errors():
        raise kind("why")
    assert stop.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {kind.__name__}: ")
    assert said.count("\n") == 1

    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(kind), one_sentence_errors():
        raise kind("why")


def test_an_exit_keeps_its_code():
    with pytest.raises(typer.Exit) as stop, one_sentence_errors():
        raise typer.Exit(130)
    assert stop.value.exit_code == 130


def test_the_hint_after_an_interruption_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "my runs"
    (folder / "256").mkdir(parents=True)
    (folder / "256" / "checkpoint.json").touch()
    cfg: Any = SimpleNamespace(checkpoint_path=str(folder))
    with pytest.raises(typer.Exit), ends_when_interrupted(cfg):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert shlex.split(said)[-1] == f"resume_from_checkpoint={folder}"
