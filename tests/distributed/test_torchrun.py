"""`torchrun -m sae_lens_alloc train`: what a user sees, and what is left when processes end."""

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from sae_lens_alloc.training.checkpoint import find_checkpoint
from scripts.kill_ranks import (
    BATCH,
    N_STEPS,
    SECONDS_TO_END,
    ranks_of,
    results,
    start,
    wait_for,
)

PATIENCE = 240


def said_in(folder: Path) -> list[str]:
    """The lines of a log, without those that a progress bar has overwritten."""
    text = (folder / "log.txt").read_text()
    return [line.rsplit("\r", 1)[-1] for line in text.split("\n")]


def sentences(folder: Path) -> list[str]:
    """How the run ended, as its processes say, be it behind a progress bar."""
    text = (folder / "log.txt").read_text()
    return re.findall(r"(?:error: |interrupted; |saved in /)[^\r\n]*", text)


def n_rows(folder: Path) -> int:
    metrics = folder / "sae" / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun") / "undisturbed"
    assert start(folder, 2).wait(PATIENCE) == 0, "\n".join(said_in(folder))
    return folder


def test_a_user_sees_one_training(undisturbed: Path):
    text = (undisturbed / "log.txt").read_text()
    (processes,) = (line for line in said_in(undisturbed) if "processes" in line[:12])
    # 72 features and 240 tokens shared by 2. Sent as floats: 120 x 192 activations, and 240 x 192
    # for the sums of the reconstruction and of that of the auxiliary loss: 461 kB; then the
    # histograms of two searches by 3 and 2 digits of up to 11 bits
    assert re.fullmatch(
        r"processes   2, each with 36 features and 120 tokens of a batch, from its own part of "
        r"the dataset; each sends about 0\.6 MB a step",
        processes,
    )
    assert text.count("memory      about") == 1
    assert "Dataset is not tokenized" not in text  # which nobody here can help
    assert (
        text.count("Training SAE:   0%") <= 2
    )  # one bar, drawn when it begins and ends
    assert sentences(undisturbed) == [f"saved in {undisturbed / 'sae'}"]
    assert n_rows(undisturbed) == N_STEPS


def test_a_user_sees_one_sentence(tmp_path: Path):
    folder = tmp_path / "wrong"
    launcher = start(folder, 2, n_restarts=0, hook_name="transformer.h.99")
    assert launcher.wait(PATIENCE) == 1
    (said,) = sentences(folder)
    assert said.startswith("error: hook_name 'transformer.h.99'")
    assert not (folder / "sae").exists()
    assert not (folder / "checkpoints").exists()


def test_a_signal_to_the_launcher_saves_one_checkpoint(tmp_path: Path):
    folder = tmp_path / "stopped"
    # so long that it cannot end before the signal
    launcher = start(folder, 2, n_checkpoints=0, training_tokens=100 * BATCH * N_STEPS)
    assert wait_for(lambda: n_rows(folder) >= 3, launcher)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(SECONDS_TO_END) != 0
    run = folder / "checkpoints" / "run"
    (saved,) = (path for path in run.iterdir() if path.is_dir())
    assert find_checkpoint(run) == saved
    assert int(saved.name) == BATCH * n_rows(folder)
    assert sentences(folder) == [
        f"interrupted; to continue, start again with resume_from_checkpoint={run}"
    ]


def test_a_killed_rank_ends_all_and_torchrun_goes_on(tmp_path: Path, undisturbed: Path):
    folder = tmp_path / "killed"
    launcher = start(folder, 2)
    assert wait_for(lambda: n_rows(folder) >= 14, launcher)
    ranks = ranks_of(launcher)
    ranks[1].kill()
    _, alive = psutil.wait_procs(ranks, timeout=SECONDS_TO_END)
    assert not alive
    assert launcher.wait(PATIENCE) == 0
    found: dict[str, Any] = results(folder)
    expected = results(undisturbed)
    assert [name for name in expected if found[name] != expected[name]] == []
    lost, saved = sentences(folder)
    assert lost.startswith("error: another process of the training has ended")
    assert saved == f"saved in {folder / 'sae'}"
