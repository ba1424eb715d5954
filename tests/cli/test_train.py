"""`sae-lens-alloc train`, on the shipped language model."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE

from tests.cli.commands import CONFIG, DEMO, TINY, contents, invoke, train

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")


def test_train_saves_a_stock_sae(tmp_path: Path):
    output = tmp_path / "deep" / "output"
    result = train(output)
    assert result.exit_code == 0
    assert f"saved in {output}" in result.stdout
    sae = SAE.load_from_disk(output)
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.W_dec.shape == (64, 192)
    runner_cfg = json.loads((output / "runner_cfg.json").read_text())
    assert runner_cfg["training_tokens"] == 1024
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4

    # again into the same folder: refused, and nothing there is touched
    before = {path: path.read_bytes() for path in output.iterdir()}
    result = train(output, "seed=1")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: output_path '{output}' is not empty: give --overwrite to write into it, "
        "or another output_path.\n"
    )
    assert {path: path.read_bytes() for path in output.iterdir()} == before

    # unless told so: the SAE and its metrics are replaced, other files stay
    (output / "notes.txt").write_text("mine")
    result = train(output, "seed=1", "--overwrite")
    assert result.exit_code == 0
    assert not torch.equal(SAE.load_from_disk(output).W_dec, sae.W_dec)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4
    assert (output / "notes.txt").read_text() == "mine"


def test_train_says_what_it_will_do(tmp_path: Path):
    result = train(
        tmp_path / "output",
        "--dry-run",
        "checkpoint_path=null",
        "sae.feature_choice_steps=2",
        "sae.k_start=200%",
        "sae.k_decay_steps=2",
    )
    assert result.exit_code == 0
    # Parameters: 2 * 192 * 64 + 64 + 192 = 24,832 of 4 bytes. Buffer: 2 * (4 + 4) contexts
    # of 256 tokens of 192 floats: 3.15 MB. Step: 16 * 256 * 192 floats of inputs, 4 blocks of
    # 256 * 64, and 256 times 8 + 4 + 4 pairs of 64 bytes: 3.67 MB.
    assert result.stdout.splitlines() == [
        "SAE         mutual_choice, 192 -> 64 features (0.333333x), k 8 falling to 4, "
        "float32 on cpu",
        "schedule    Feature Choice for 2 steps, then Mutual Choice; aux_zipf to the end",
        f"model       {DEMO / 'model'} at transformer.h.0, contexts of 256 tokens, on cpu",
        f"dataset     {DEMO / 'corpus'}",
        "training    1,024 tokens = 4 steps of 256; lr 0.004 constant",
        "memory      about 7.2 MB (parameters 0.1 MB, gradients 0.1 MB, optimizer 0.2 MB, "
        "activation buffer 3.1 MB, step 3.7 MB) beside the language model",
        f"output      {tmp_path / 'output'}",
        "checkpoints none",
    ]
    assert not (tmp_path / "output").exists()


def test_nested_reconstructions_take_memory(tmp_path: Path):
    """7 matrices of 256 x 192 floats and 8 pairs of 64 bytes per token more for each of two."""
    result = train(
        tmp_path / "output",
        "--dry-run",
        "sae.architecture=matryoshka_mutual_choice",
        "sae.matryoshka_widths=[16, 32]",
    )
    assert result.exit_code == 0
    assert "step 6.7 MB" in result.stdout  # 3.67 MB + 2 * (1.38 MB + 0.13 MB)


@pytest.mark.parametrize(
    ("architecture", "schedule"),
    [("batchtopk", []), ("batchtopk_aux_zipf", ["aux_zipf until step 2"])],
)
def test_train_says_how_long_aux_zipf_lasts(
    tmp_path: Path, architecture: str, schedule: list[str]
):
    settings = yaml.safe_load(Path(CONFIG).read_text())
    settings["sae"] = {"architecture": architecture, "d_in": 192, "d_sae": 64, "k": 4}
    if schedule:
        settings["sae"]["aux_loss_decay_start"] = 2
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    output = f"output_path={tmp_path / 'output'}"
    result = invoke(
        "train", str(config), *TINY, output, "--dry-run", "checkpoint_path=null"
    )
    assert result.exit_code == 0, result.output
    said = [line for line in result.stdout.splitlines() if "schedule" in line]
    assert said == [f"schedule    {text}" for text in schedule]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sae.kk=3", "unknown key 'sae.kk', did you mean 'sae.k'?"),
        ("lr=fast", "lr must be a number, got 'fast'."),
        ("sae.k=65", "sae: k must be in (0, d_sae = 64], got 65."),
    ],
)
def test_wrong_setting_is_one_sentence(tmp_path: Path, override: str, sentence: str):
    result = train(tmp_path / "output", override)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {CONFIG} with ")
    assert result.stderr.endswith(f": {sentence}\n")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("dataset_path=''", "dataset_path is missing."),
        (
            "resume_from_checkpoint=/no/such/folder",
            "resume_from_checkpoint is '/no/such/folder', but there is no such folder.",
        ),
        pytest.param(
            "device=cuda",
            "device is 'cuda', but torch finds no such device on this machine: give "
            "device=cpu to run without one.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(
    tmp_path: Path, override: str, sentence: str
):
    result = train(tmp_path / "output", override)
    assert result.exit_code == 1
    assert result.stderr == f"error: {sentence}\n"
    assert not (tmp_path / "output").exists()


def test_output_that_cannot_be_made_is_found_before_training(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        result = train(output, "--overwrite")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert str(tmp_path / "file") in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_config_is_an_error_of_usage(tmp_path: Path):
    result = invoke("train", str(tmp_path / "no.yaml"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


@pytest.mark.parametrize(
    "bad", ["hook_name=nowhere", "dataset_path=/no/such", "model_name=/no/such"]
)
def test_overwrite_by_a_run_that_cannot_work_changes_nothing(
    saved: Path, tmp_path: Path, bad: str
):
    shutil.copytree(saved, tmp_path / "out")
    before = contents(tmp_path / "out")
    result = train(tmp_path / "out", "--overwrite", bad)
    assert result.exit_code == 1
    assert contents(tmp_path / "out") == before


def test_output_may_be_the_current_folder_with_the_checkpoints_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "link")
    result = train(Path("."), "checkpoint_path=checkpoints", "n_checkpoints=1")
    assert result.exit_code == 0
    assert SAE.load_from_disk(tmp_path / "out").cfg.architecture() == "jumprelu"
    (run,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert [path.name for path in run.iterdir()] == ["768"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(
        "sae_lens_alloc.training.sourced_runner.load_language_model", interrupt
    )
    result = train(tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; no checkpoint was saved\n"
    assert not (tmp_path / "out").exists()
