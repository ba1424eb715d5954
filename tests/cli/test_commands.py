"""Every command: help, folders that are left alone, and the demo's end."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import contents, invoke, train
from tests.training.test_output_folder import held_by_another_process

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")


@pytest.mark.parametrize("command", [[], ["train"], ["run"], ["calibrate"], ["demo"]])
def test_help(command: list[str]):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_no_command_writes_into_the_folder_that_it_reads(saved: Path, tmp_path: Path):
    out, link = tmp_path / "out", tmp_path / "link"
    shutil.copytree(saved, out)
    link.symlink_to(out)
    before = contents(out)
    calibrated = invoke("calibrate", str(out), "--output", str(link), "--overwrite")
    assert "which must not change: give another folder." in calibrated.stderr
    trained = train(link, f"from_pretrained_path={out}", "--overwrite")
    assert "sae-lens-alloc finetune --from" in trained.stderr
    assert calibrated.exit_code == trained.exit_code == 1
    assert contents(out) == before


def test_demo_leaves_a_used_folder_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    result = invoke("demo", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {str(tmp_path)!r} is not empty: ")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_demo_ends_on_a_signal_and_shares_its_folder_with_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "demo"
    with held_by_another_process(output):
        result = invoke("demo", "--output", str(output))
    assert result.exit_code == 1
    assert "is in use by another run" in result.stderr

    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    # after the training of its first SAE
    monkeypatch.setattr("sae_lens_alloc.demo.run.train", interrupt)
    result = invoke("demo", "--output", str(output))
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize("command", ["demo", "compare", "calibrate", "features"])
def test_commands_for_one_process_say_so_to_several(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "given").mkdir()
    (tmp_path / "config.yaml").touch()
    arguments = {
        "demo": [],
        "compare": [str(tmp_path / "config.yaml")],
        "calibrate": [str(tmp_path / "given")],
        "features": [str(tmp_path / "given")],
    }[command]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = invoke(command, *arguments, "--output", str(tmp_path / "out"))
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr == (rank == "0") * (
            f"error: `sae-lens-alloc {command}` is for one process: start it without torchrun.\n"
        )
    assert not (tmp_path / "out").exists()
