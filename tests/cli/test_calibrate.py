"""`sae-lens-alloc calibrate`, on an SAE of the shipped language model."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

from sae_lens_alloc.activations.on_text import gather_activations, text_of_sae
from sae_lens_alloc.thresholds.recalibration import load_saved_sae
from tests.cli.commands import CONFIG, DEMO, contents, invoke

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")


@pytest.mark.parametrize("how", [(), ("--per-feature",)])
def test_calibrate_sets_l0_in_a_new_folder(
    saved: Path, tmp_path: Path, how: tuple[str, ...]
):
    source, output = tmp_path / "source", tmp_path / "deep" / "output"
    shutil.copytree(saved, source)
    before = contents(source)
    options = ("--l0", "2.5", "--tokens", "4096", *how)
    result = invoke("calibrate", str(source), "--output", str(output), *options)
    assert result.exit_code == 0, result.stderr
    assert contents(source) == before
    sae = SAE.load_from_disk(output)
    assert sae.cfg.architecture() == "jumprelu"
    calibration = sae.cfg.metadata.calibration
    assert calibration["l0_after"] == pytest.approx(2.5, rel=1e-3)
    assert calibration["n_tokens"] == 2048
    assert calibration["per_feature"] == bool(how)
    # the table: calibration and held-out half, before and after
    rows = [line for line in result.stdout.splitlines() if "half of 2,048" in line]
    assert len(rows) == 4
    for row, figures in zip(
        rows,
        ("before", "after", "held_out_before", "held_out_after"),
        strict=True,
    ):
        assert f" {calibration[f'l0_{figures}']:.2f} " in row
        assert f" {calibration[f'ev_{figures}']:.4f} " in row
        assert f" {calibration[f'dead_{figures}']} " in row
    assert f"saved in {output}" in result.stdout

    # again into the same folder, or into the SAE's own: refused, and nothing is touched
    written = contents(output)
    result = invoke("calibrate", str(source), "--output", str(output), *options)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: --output '{output}' is not empty: give --overwrite to write into it, or "
        "another --output.\n"
    )
    result = invoke(
        "calibrate", str(source), "--output", str(source), "--overwrite", *options
    )
    assert result.exit_code == 1
    assert "is the folder of the SAE itself" in result.stderr
    assert contents(output) == written
    assert contents(source) == before


def test_calibrate_takes_a_stock_topk_sae_and_a_config(tmp_path: Path):
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=192, d_sae=64, k=4))
    source, output = tmp_path / "source", tmp_path / "output"
    sae.save_model(source)
    texts = ("--model", str(DEMO / "model"), "--dataset", str(DEMO / "corpus"))
    options = ("--output", str(output), *texts, "--tokens", "2048", "--overwrite")
    result = invoke("calibrate", str(source), *options)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the SAE's metadata does not say its hook_name and context_size: give the "
        "config of a run that has them.\n"
    )
    result = invoke("calibrate", str(source), *options, "--config", CONFIG)
    assert result.exit_code == 0, result.stderr
    calibrated = SAE.load_from_disk(output)
    assert calibrated.cfg.architecture() == "jumprelu"
    # the k of the topk SAE by default
    assert calibrated.cfg.metadata.calibration["target_l0"] == 4
    assert calibrated.cfg.metadata.l0 == pytest.approx(4, rel=1e-2)


def test_calibrate_refuses_the_config_of_another_width(tmp_path: Path):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=100, d_sae=64))
    sae.save_model(tmp_path / "source")
    options = ("--output", str(tmp_path / "output"), "--l0", "3", "--config", CONFIG)
    result = invoke("calibrate", str(tmp_path / "source"), *options)
    assert result.exit_code == 1
    assert "takes activations of 100 dimensions, but sae.d_in of" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "give --l0."),
        (
            ("--l0", "3", "--dataset", "/no/such"),
            "dataset_path is '/no/such', but there is no such folder.",
        ),
        (("--l0", "3", "--config", CONFIG, "--device", "gpu"), "device"),
    ],
)
def test_calibrate_that_cannot_work_is_one_sentence(
    tmp_path: Path, options: tuple[str, ...], sentence: str
):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=192, d_sae=64))
    sae.cfg.metadata.hook_name = "transformer.h.0"
    sae.cfg.metadata.model_name = str(DEMO / "model")
    sae.cfg.metadata.model_class_name = "AutoModelForCausalLM"
    sae.cfg.metadata.context_size = 64
    sae.save_model(tmp_path / "source")
    result = invoke(
        "calibrate",
        str(tmp_path / "source"),
        *("--output", str(tmp_path / "output"), *options),
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--l0", "-1"), "no thresholds give an L0 of -1: it must be above 0 and at"),
        (("--l0", "inf"), "no thresholds give an L0 of inf: it must be above 0 and at"),
        (("--tokens", "2"), "--tokens must be at least 4, two for each half, got 2."),
    ],
)
def test_calibrate_refuses_what_makes_no_sense(
    saved: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
):
    before = contents(saved)
    output = tmp_path / "deep" / "output"
    model = ("--model", "no/such/model")  # which is not looked for
    result = invoke("calibrate", str(saved), "--output", str(output), *model, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert contents(saved) == before


def text_of(folder: Path, n_characters: int) -> Path:
    """A dataset of the beginning of the demo's text."""
    texts = pq.read_table(DEMO / "corpus" / "train.parquet")["text"].to_pylist()
    folder.mkdir()
    row = json.dumps({"text": "".join(texts)[:n_characters]})
    (folder / "text.jsonl").write_text(row)
    return folder


def test_calibrate_takes_no_context_twice(saved: Path, tmp_path: Path):
    """The text is read once; where it is too short, the sentence says by how much."""
    text = text_of(tmp_path / "text", 30_000)
    options = ("--dataset", str(text), "--l0", "4")
    output = tmp_path / "output"
    result = invoke(
        "calibrate", str(saved), "--output", str(output), *options, "--tokens", "40000"
    )
    assert result.exit_code == 1
    said = re.search(
        r"error: 40,000 tokens are wanted, .* has only ([\d,]+) ", result.stderr
    )
    assert said is not None, result.stderr
    assert not output.exists()
    # as many as it says there are, and not one more
    given = int(said[1].replace(",", ""))
    cfg = text_of_sae(load_saved_sae(saved), dataset_path=str(text))
    activations = gather_activations(cfg, given)
    assert activations.shape == (given, 192)
    halves = [half.unique(dim=0) for half in activations.chunk(2)]
    shared = sum(map(len, halves)) - len(torch.cat(halves).unique(dim=0))
    assert shared < 20  # two contexts may begin with the same word
    with pytest.raises(ValueError, match="has only"):
        gather_activations(cfg, given + 2)


@pytest.mark.parametrize(
    ("tensor", "value", "sentence"),
    [
        ("W_enc", torch.nan, "W_enc holds 12,288 values that are NaN or infinite."),
        ("W_dec", 1e3, "of the variance of these activations"),
    ],
)
def test_calibrate_writes_nothing_of_weights_that_are_absurd(
    saved: Path, tmp_path: Path, tensor: str, value: float, sentence: str
):
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(saved, source)
    weights = load_file(source / "sae_weights.safetensors")
    weights[tensor] *= value
    save_file(weights, source / "sae_weights.safetensors")
    options = ("--tokens", "2048", "--l0", "4")
    result = invoke("calibrate", str(source), "--output", str(output), *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert sentence in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not output.exists()


def test_calibrate_of_a_hook_that_is_not_there(saved: Path, tmp_path: Path):
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(saved, source)
    cfg = json.loads((source / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "transformer.h.9"
    (source / "cfg.json").write_text(json.dumps(cfg))
    result = invoke("calibrate", str(source), "--output", str(output), "--l0", "4")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "transformer.h.9" in last
    assert not output.exists()
