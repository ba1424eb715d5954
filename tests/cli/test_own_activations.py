"""`sae-lens-alloc train` with `activations:` in its file, and what can be done with that SAE."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sae_lens import SAE

from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from tests.cli.commands import CONFIG, invoke

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")

RUN = {
    "training_tokens": 2048,
    "train_batch_size_tokens": 64,
    "lr": 1e-2,
    "checkpoint_path": None,
    "logger": {"log_to_wandb": False, "wandb_log_frequency": 1},
    "sae": {"architecture": "mutual_choice", "d_in": 10, "d_sae": 40, "k": 3},
}


def rows(n: int = 3000) -> np.ndarray:
    draw = np.random.default_rng(0)
    codes = draw.random((n, 20)) * (draw.random((n, 20)) < 0.15)
    return (codes @ draw.normal(size=(20, 10))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "acts").mkdir()
    np.save(folder / "acts" / "0.npy", rows()[:2000])
    np.save(folder / "acts" / "1.npy", rows()[2000:])
    run = {**RUN, "activations": str(folder / "acts"), "output_path": f"{folder}/sae"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path, few_calibration_tokens: None) -> Path:
    result = invoke("train", str(folder / "run.yaml"))
    assert result.exit_code == 0, result.stderr
    assert f"activations {folder / 'acts'}\n" in result.stdout
    assert "model" not in result.stdout and "dataset" not in result.stdout
    assert f"saved in {folder / 'sae'}" in result.stdout
    return folder / "sae"


def test_train_saves_a_stock_sae(saved: Path, folder: Path):
    sae = SAE.load_from_disk(saved)
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.activations == str(folder / "acts")
    assert len((saved / "metrics.jsonl").read_text().splitlines()) == 32
    runner_cfg = json.loads((saved / "runner_cfg.json").read_text())
    assert runner_cfg["activations"] == str(folder / "acts")


def test_the_settings_that_a_run_saves_are_a_run(saved: Path, tmp_path: Path):
    result = invoke(
        "train", str(saved / "runner_cfg.json"), f"output_path={tmp_path / 'again'}"
    )
    assert result.exit_code == 0, result.stderr
    again = SAE.load_from_disk(tmp_path / "again")
    assert torch.equal(again.W_dec, SAE.load_from_disk(saved).W_dec)


def test_calibrate_reads_the_activations_of_the_training(saved: Path, tmp_path: Path):
    new = str(tmp_path / "new")
    arguments = ("calibrate", str(saved), "--l0", "2", "--output", new)
    result = invoke(*arguments, "--tokens", "2000")
    assert result.exit_code == 0, result.stderr
    sae = SAE.load_from_disk(new)
    usage = measure_usage(as_user(sae), torch.from_numpy(rows()))
    assert usage.l0 == pytest.approx(2, rel=0.1)
    too_many = invoke(*arguments, "--tokens", "4000", "--overwrite")
    assert too_many.exit_code == 1
    assert too_many.stderr.startswith("error: 4,000 tokens are wanted, but ")
    assert "has 3,000 rows: ask for fewer tokens" in too_many.stderr
    # or those of a config
    by_config = invoke(
        *("calibrate", str(saved), "--l0", "2", "--output", f"{new}er"),
        *("--tokens", "2000", "--config", str(saved / "runner_cfg.json")),
    )
    assert by_config.exit_code == 0, by_config.stderr
    again = SAE.load_from_disk(f"{new}er").state_dict()
    assert torch.equal(again["threshold"], sae.state_dict()["threshold"])


def test_what_needs_text_says_so(saved: Path, folder: Path, tmp_path: Path):
    page = ("features", str(saved), "--output", str(tmp_path / "page.html"))
    result = invoke(*page)
    assert result.exit_code == 1
    assert "metadata does not say its model_name and dataset_path" in result.stderr
    result = invoke(*page, "--config", str(folder / "run.yaml"))
    assert result.exit_code == 1
    assert (
        "the page needs a language model and text, but the run is on" in result.stderr
    )


def test_finetune_compares_before_and_after_on_held_out_rows(
    saved: Path, folder: Path, tmp_path: Path
):
    finer = tmp_path / "finer"
    result = invoke(
        *("finetune", str(folder / "run.yaml"), "--from", str(saved)),
        f"output_path={finer}",
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads((finer / "fine_tuning.json").read_text())
    held_out = SAE.load_from_disk(finer).cfg.metadata.held_out
    assert found["after"]["n_tokens"] == held_out["n_tokens"] == 22
    ev = held_out["explained_variance"]
    assert found["after"]["explained_variance"] == pytest.approx(ev, abs=1e-5)
    assert found["before"]["explained_variance"] < ev
    assert "ce_loss" not in found["after"]
    table, report = result.stdout, (finer / "report.html").read_text()
    assert "22 held-out tokens" in " ".join(table.split())
    assert "CE" not in table
    assert "on 22 tokens of activations that it was not trained on" in report
    assert "loss recovered" not in report and str(folder / "acts") in report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["activations=no/such"],
            "activations is 'no/such', but there is no such file",
        ),
        (["activations=''"], "activations is empty: give a file or a folder."),
        (
            ["hook_name=blocks.0.hook_resid_pre"],
            "hook_name is 'blocks.0.hook_resid_pre'",
        ),
        (["dataset_path=text"], "dataset_path is '"),
        (["streaming=false"], "streaming is False, but the run is on activations"),
        (["activations_column=x"], "activations_column is 'x', but '"),
        (["activations=null", "activations_column=x"], "but activations is missing"),
        (["sae.d_in=11"], "rows of 10 numbers, but sae.d_in is 11: give sae.d_in=10"),
        (
            ["train_batch_size_tokens=3000", "training_tokens=6000"],
            "has 3,000 rows, but",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_is_one_sentence(
    settings: list[str],
    message: str,
    dry_run: bool,
    folder: Path,
    tmp_path: Path,
):
    options = ["--dry-run"] if dry_run else []
    output = tmp_path / "sae"
    result = invoke(
        *("train", str(folder / "run.yaml"), *settings, f"output_path={output}"),
        *options,
    )
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not output.exists()


def test_text_and_activations_are_not_mixed(folder: Path):
    result = invoke("train", CONFIG, f"activations={folder / 'acts'}", "sae.d_in=10")
    assert result.exit_code == 1
    assert (
        "without a language model and its text: leave one of the two out"
        in result.stderr
    )
