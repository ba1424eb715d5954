"""`sae-lens-alloc finetune`, on the shipped language model."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_lens_alloc.config.run_file import load_fine_tuning_config
from sae_lens_alloc.training import fine_tuning_run
from tests.cli.commands import TINY, invoke, train

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = str(CONFIGS / "finetune_demo.yaml")
TOPK = "sae={architecture: topk, d_in: 192, d_sae: 64, k: 4}"
TINY_RUN = [setting for setting in TINY if not setting.startswith("sae.")]


@pytest.fixture(scope="module")
def topk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock TopK SAE, 16 steps old."""
    folder = tmp_path_factory.mktemp("source") / "topk"
    result = train(folder, TOPK, "training_tokens=4096")
    assert result.exit_code == 0
    assert SAE.load_from_disk(folder).cfg.architecture() == "topk"
    return folder


def finetune(source: Path | str, output: Path, *args: str):
    return invoke(
        "finetune",
        CONFIG,
        "--from",
        str(source),
        *TINY_RUN,
        f"output_path={output}",
        *args,
    )


@pytest.mark.parametrize("architecture", ["mutual_choice", "feature_choice"])
def test_a_stock_topk_sae_is_trained_further(
    topk: Path, tmp_path: Path, architecture: str
):
    before = {path.name: path.read_bytes() for path in topk.iterdir()}
    output = tmp_path / "output"
    result = finetune(topk, output, f"sae={{architecture: {architecture}}}")

    assert result.exit_code == 0, result.stderr
    assert {path.name: path.read_bytes() for path in topk.iterdir()} == before
    sae = SAE.load_from_disk(output)
    assert sae.cfg.architecture() == "jumprelu"
    assert not torch.equal(sae.W_dec, SAE.load_from_disk(topk).W_dec)
    assert sae.cfg.metadata.training_architecture == architecture
    assert sae.cfg.metadata.training_architecture_details["k"] == 4

    figures = json.loads((output / "fine_tuning.json").read_text())
    assert figures["source_architecture"] == "topk"
    assert figures["before"]["l0"] <= 4  # k of each token, where so many are positive
    assert figures["start"]["l0"] == pytest.approx(4, rel=0.01)
    assert figures["after"]["l0"] == pytest.approx(4, rel=0.2)
    dead = {when: figures[when]["dead_features"] for when in ("before", "after")}
    assert (
        dead["before"] - figures["revived_features"] + figures["died_features"]
        == dead["after"]
    )
    assert "before" in result.stdout
    assert f"{figures['revived_features']} features revived" in result.stdout
    assert "Before and after fine-tuning" in (output / "report.html").read_text()
    held_out = json.loads((output / "held_out.json").read_text())
    assert held_out["l0"] == figures["after"]["l0"]
    assert f"saved in {output}, with report.html\nnext:" in result.stdout


def test_a_dry_run_loads_no_model_and_writes_nothing(topk: Path, tmp_path: Path):
    result = finetune(topk, tmp_path / "output", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "mutual_choice, 192 -> 64 features" in result.stdout
    # features have their share already, unlike in a training from random weights
    assert "schedule    one rule throughout" in result.stdout
    assert ", k 4, float32 on cpu" in result.stdout
    assert f"from        topk, {topk}" in result.stdout
    assert not (tmp_path / "output").exists()


def test_an_existing_output_is_left_alone(topk: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    result = finetune(topk, tmp_path)
    assert result.exit_code == 1
    assert "is not empty: give --overwrite" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_topk_sae_that_was_saved_as_another_architecture_is_caught(
    topk: Path, tmp_path: Path
):
    # SAELens #308, #553: TopK files loaded as ReLU SAEs
    mislabelled = tmp_path / "mislabelled"
    mislabelled.mkdir()
    for path in topk.iterdir():
        (mislabelled / path.name).write_bytes(path.read_bytes())
    cfg = json.loads((topk / "cfg.json").read_text())
    cfg["architecture"] = "standard"
    (mislabelled / "cfg.json").write_text(json.dumps(cfg))

    result = finetune(mislabelled, tmp_path / "output")
    assert result.exit_code == 1
    assert "but should have about 4.0 features" in result.stderr
    assert "it was saved as another architecture" in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("not/there", "'not/there' is neither a folder nor RELEASE:ID"),
        (
            "gpt2-small-res-jbb:blocks.8.hook_resid_pre",
            "there is no release 'gpt2-small-res-jbb', did you mean 'gpt2-small-res-jb'?",
        ),
        (
            "gpt2-small-res-jb:blocks.8.hook_resid_prex",
            "did you mean 'blocks.8.hook_resid_pre'?",
        ),
    ],
)
def test_a_source_that_does_not_exist_is_named(
    source: str, message: str, tmp_path: Path
):
    result = finetune(source, tmp_path / "output")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_release_that_cannot_be_downloaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty")
    )
    result = finetune(
        "gpt2-small-res-jb:blocks.8.hook_resid_pre", tmp_path / "output", "--dry-run"
    )
    assert result.exit_code == 1
    assert "is not in the Hugging Face cache of this machine" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_without_an_sae_is_named(tmp_path: Path):
    result = finetune(tmp_path, tmp_path / "output")
    assert result.exit_code == 1
    assert "holds no SAE of SAELens: cfg.json is missing" in result.stderr


def test_an_sae_cannot_be_trained_further_as_a_stock_architecture(
    topk: Path, tmp_path: Path
):
    result = finetune(
        topk, tmp_path / "output", "--dry-run", "sae={architecture: topk}"
    )
    assert result.exit_code == 1
    assert "not to 'topk'" in result.stderr


def test_the_size_is_that_of_the_source():
    source = TopKTrainingSAEConfig(d_in=192, d_sae=64, k=4)
    cfg, chosen = load_fine_tuning_config(CONFIG, ["sae.k=8"], source)
    assert (cfg.sae.d_in, cfg.sae.d_sae) == (192, 64)
    assert cfg.total_training_steps == 78
    assert chosen == {"k": 8, "aux_loss": "aux_k", "aux_loss_decay_start": 58}
    with pytest.raises(ValueError, match="sae.d_sae is 32, but that .* is 64"):
        load_fine_tuning_config(CONFIG, ["sae.d_sae=32"], source)


def test_the_learning_rate_warms_up_unless_told_otherwise(tmp_path: Path):
    config = tmp_path / "config.yaml"
    text = (CONFIGS / "finetune_demo.yaml").read_text()
    config.write_text(text.replace("lr_warm_up_steps: 10%\n", ""))
    assert "lr_warm_up" not in config.read_text()
    source = TopKTrainingSAEConfig(d_in=192, d_sae=64, k=4)
    cfg, _ = load_fine_tuning_config(config, [], source)
    assert cfg.lr_warm_up_steps == 7  # a tenth of 78
    cfg, _ = load_fine_tuning_config(config, ["lr_warm_up_steps=0"], source)
    assert cfg.lr_warm_up_steps == 0


def test_the_gpt2_config_is_valid():
    source = TopKTrainingSAEConfig(d_in=768, d_sae=32768, k=32)
    cfg, _ = load_fine_tuning_config(CONFIGS / "finetune_gpt2_openai.yaml", [], source)
    assert cfg.total_training_steps == 12_207


def test_the_source_is_not_overwritten(topk: Path, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in topk.iterdir()}
    (tmp_path / "link").symlink_to(topk)
    for output in (topk, tmp_path / "link"):
        result = finetune(topk, output, "--overwrite", "model_name=not/loaded")
        assert result.exit_code == 1
        assert "is the folder of the SAE to start from" in result.stderr
    assert {path.name: path.read_bytes() for path in topk.iterdir()} == before


@pytest.mark.parametrize("how", ["error", "signal"])
def test_a_comparison_that_fails_says_where_the_sae_is(
    topk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    def fail(*_: Any, **__: Any) -> None:
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fine_tuning_run, "_write_results", fail)
    output = tmp_path / "output"
    result = finetune(topk, output)
    assert result.exit_code == (130 if how == "signal" else 1)
    said = f"the SAE is saved in {str(output)!r}, but not compared with what it was"
    reason = (
        f": the comparison cannot be written to {str(output)!r}: No space left on de"
    )
    assert said + (reason if how == "error" else "\n") in result.stderr
    assert SAE.load_from_disk(output).cfg.architecture() == "jumprelu"
    assert not (output / "fine_tuning.json").exists()


@pytest.mark.parametrize("how", ["error", "left out"])
def test_without_a_report_there_are_the_sae_and_its_figures(
    topk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
):
    output = tmp_path / "output"
    if how == "error":
        (output / "report.html").mkdir(parents=True)  # where a file is to be
    option = {"error": "--overwrite", "left out": "--no-report"}[how]
    result = finetune(topk, output, option)
    assert result.exit_code == 0, result.stderr
    assert (output / "fine_tuning.json").exists()
    assert f"saved in {output}\nnext:" in result.stdout
    said = f"the SAE is saved in {str(output)!r}, but not its report: "
    assert (said in caplog.text) == (how == "error")
    assert not (output / "report.html").is_file()
