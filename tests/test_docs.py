"""What the documents show is run here, and what they take from files is up to date."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE, LanguageModelSAERunnerConfig
from safetensors.torch import load_file

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
    MutualChoiceTrainingTranscoderConfig,
    load_runner_config,
)
from sae_lens_alloc.demo.methods import CORPUS, HERE
from sae_lens_alloc.training import runner as runner_module

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sae_lens_alloc"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def tiny_demo_config(output: Path) -> LanguageModelSAERunnerConfig[Any]:
    return load_runner_config(
        HERE / "mutual_choice.yaml",
        [
            f"model_name={HERE / 'model'}",
            f"dataset_path={CORPUS}",
            f"output_path={output}",
            "training_tokens=8192",
            "n_batches_in_buffer=16",
            "sae.feature_choice_steps=2",
            "sae.d_sae=256",
        ],
    )


@pytest.mark.slow
def test_generated_parts_are_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "render.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_script_of_the_readme_runs_as_it_stands(tmp_path: Path):
    (code,) = code_blocks(ROOT / "README.md", "python")
    assert len(code.replace("\n\n", "\n").splitlines()) <= 12
    result = subprocess.run(
        [sys.executable, "-c", code + "\nprint(sae.cfg.architecture(), sae.cfg.d_sae)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "jumprelu 768"
    metadata = SAE.load_from_disk(tmp_path / "my-sae").cfg.metadata
    # a single seed on 200,000 tokens gives 0.77
    assert metadata.held_out["explained_variance"] > 0.6
    assert metadata.calibration["l0"] == pytest.approx(16, rel=0.02)


def test_python_in_inference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_demo_config(tmp_path / "demo-output" / "mutual_choice")
    cfg.sae.k = 8
    AllocSAETrainingRunner(cfg).run()
    (inference_code,) = code_blocks(ROOT / "docs" / "inference.md", "python")
    names: dict[str, Any] = {}
    exec(inference_code, names)
    assert names["sae"].cfg.architecture() == "jumprelu"
    assert names["sae"].cfg.metadata.calibration["target_l0"] == 8


def test_python_in_the_page_of_transcoders_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = load_runner_config(
        ROOT / "configs" / "transcoder_demo.yaml",
        [
            *(f"model_name={HERE / 'model'}", f"dataset_path={CORPUS}"),
            *("training_tokens=4096", "n_batches_in_buffer=16"),
            *("sae.d_sae=256", "sae.skip_connection=true"),
        ],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner_module, "CALIBRATION_TOKENS", 1024)
    AllocSAETrainingRunner(cfg).run()
    names: dict[str, Any] = {}
    for code in code_blocks(ROOT / "docs" / "transcoders.md", "python"):
        exec(code, names)
    # what circuit-tracer makes of the tensors: pre-activations by nn.functional.linear, a JumpReLU,
    # the decoder, and the skip connection
    tensors = load_file("layer_2.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (256, 192),
        "b_enc": (256,),
        "W_dec": (256, 192),
        "b_dec": (192,),
        "W_skip": (192, 192),
        "activation_function.threshold": (256,),
    }
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(0))
    pre_acts = torch.nn.functional.linear(x, tensors["W_enc"], tensors["b_enc"])
    acts = pre_acts * (pre_acts > tensors["activation_function.threshold"])
    out = acts @ tensors["W_dec"] + tensors["b_dec"] + x @ tensors["W_skip"].T
    torch.testing.assert_close(out, names["transcoder"](x), rtol=1e-4, atol=1e-4)


def test_python_in_the_page_of_own_activations_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    (code,) = code_blocks(ROOT / "docs" / "own-activations.md", "python")
    exec(code, names)
    assert names["sae"].cfg.architecture() == "jumprelu"
    assert names["sae"].cfg.metadata.calibration["l0"] == pytest.approx(8, rel=0.01)


def test_yaml_in_the_page_of_own_activations_is_a_run(tmp_path: Path):
    (block,) = code_blocks(ROOT / "docs" / "own-activations.md", "yaml")
    (tmp_path / "own.yaml").write_text(block)
    cfg = load_runner_config(tmp_path / "own.yaml")
    assert cfg.activations == "acts/train" and cfg.sae.d_in == 768


def test_yaml_in_the_page_of_transcoders_names_real_fields():
    (block,) = code_blocks(ROOT / "docs" / "transcoders.md", "yaml")
    settings = yaml.safe_load(block)
    valid = {field.name for field in fields(MutualChoiceTrainingTranscoderConfig)}
    assert set(settings.pop("sae")) - {"architecture"} <= valid
    assert set(settings) <= {field.name for field in fields(AllocSAERunnerConfig)}


def test_yaml_in_the_readme_names_real_fields():
    valid = {field.name for field in fields(MutualChoiceTrainingSAEConfig)}
    (block,) = code_blocks(ROOT / "README.md", "yaml")
    assert set(yaml.safe_load(block)["sae"]) - {"architecture"} <= valid


@pytest.mark.slow
def test_train_command_of_the_readme_is_accepted():
    (line,) = re.findall(
        r"sae-lens-alloc train (.*)", (ROOT / "README.md").read_text()
    )[:1]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "sae_lens_alloc", "train", *line.split()),
            *("device=cpu", "--dry-run"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    # nothing is wrong but that this machine may not have the text
    if result.returncode != 0:
        assert "cannot be loaded from the Hugging Face hub" in result.stderr
    assert "k 32 falling to 16" in result.stdout
    assert "lr 0.0003" in result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [
        target
        for target in targets
        if not target.startswith("http") and not (page.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize(
    "page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name
)
def test_files_and_modules_that_are_named_are_there(page: Path):
    """In backquotes: paths from the root or from the package, and what `python -m` runs."""
    text = page.read_text()
    folders = {path.name for path in [*ROOT.iterdir(), *PACKAGE.iterdir()]}
    named = {
        path
        for path in re.findall(r"`([\w-]+/[\w/-]*\.\w+)`", text)
        if path.split("/")[0] in folders
    }
    named |= {
        module.replace(".", "/")
        for module in re.findall(r"python -m ((?:benchmarks|scripts)[\w.]*)", text)
    }
    missing = [
        name
        for name in sorted(named)
        if not any(
            (folder / f"{name}{suffix}").exists()
            for folder in (ROOT, PACKAGE)
            for suffix in ("", ".py")
        )
    ]
    assert missing == []
