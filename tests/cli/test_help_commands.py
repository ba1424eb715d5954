"""`architectures`, `doctor`, and the examples and the completion of the command line."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_alloc.ops.backend import default_backend
from tests.cli.commands import invoke
from tests.cli.test_light import COMMANDS, ROOT


def test_every_architecture_has_a_line_and_its_own_fields():
    result = invoke("architectures")
    blocks = re.split(r"^(?=\S)", result.stdout, flags=re.MULTILINE)[1:]
    told = {block.splitlines()[0]: block.splitlines()[1:] for block in blocks}
    assert set(told) == set(SAE_TRAINING_CLASS_REGISTRY)
    assert all(lines[0].endswith(".") for lines in told.values())
    assert told["feature_choice"][-1].strip() == "mutual_choice_steps = 0"
    own = {line.strip() for line in told["matryoshka_mutual_choice"]}
    assert {"matryoshka_widths = []", "feature_choice_steps = None"} <= own
    assert not any(line.startswith("d_in") for line in own)
    assert [line.strip() for line in told["gated"][1:]] == [
        "l1_coefficient = 1.0",
        "l1_warm_up_steps = 0",
    ]


def test_one_architecture_has_all_its_fields():
    lines = invoke("architectures", "mutual_choice").stdout.splitlines()
    assert lines[0] == "mutual_choice"
    assert {"      d_in (required)", "      k = 100", "      dtype = 'float32'"} <= {
        *lines
    }
    result = invoke("architectures", "mutual_chice")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the architecture 'mutual_chice' is unknown, did you mean 'mutual_choice'?\n"
    )


def test_doctor_says_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "do-not-print")
    monkeypatch.setenv("HF_TOKEN", "do-not-print-either")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "do-not-print" not in result.stdout
    told = {
        line[2:26].rstrip(): line[26:]
        for line in result.stdout.splitlines()
        if line.startswith("  ")
    }
    assert told["sae-lens"] == version("sae-lens")
    assert told["torch"] == version("torch")
    assert told["W&B"] == "yes, by WANDB_API_KEY"
    assert told["Hugging Face hub"] == "yes, by HF_TOKEN"
    assert told["cpu"] == f"default {default_backend(torch.device('cpu'))}"
    assert told["  reference"] == "works"
    assert told["  triton"].startswith("Triton kernels need a CUDA device")


def test_doctor_finds_logins_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    stdout = invoke("doctor").stdout
    assert "Hugging Face hub        no (`hf auth login` or HF_TOKEN)" in stdout
    assert "W&B                     no (`wandb login` or WANDB_API_KEY)" in stdout
    (tmp_path / "token").write_text("hf_do-not-print")
    (tmp_path / "netrc").write_text(
        "machine api.wandb.ai\n  login user\n  password do-not-print\n"
    )
    stdout = invoke("doctor").stdout
    assert "Hugging Face hub        yes, by `hf auth login`" in stdout
    assert "W&B                     yes, by `wandb login`" in stdout
    assert "do-not-print" not in stdout


def test_doctor_goes_on_where_something_is_broken(monkeypatch: pytest.MonkeyPatch):
    def fails() -> int:
        raise RuntimeError("driver too old\nfor this")

    monkeypatch.setattr(torch.cuda, "device_count", fails)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert (
        "backends:\n  RuntimeError: driver too old for this\nlogins:" in result.stdout
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_the_command_line_knows(command: str):
    text = invoke(command, "--help").stdout
    (block,) = re.findall(r"  Examples?:\n((?:    .*\n)+)", text)
    own = [line for line in block.splitlines() if "sae-lens-alloc" in line]
    assert own
    for line in own:
        name, *arguments = shlex.split(line)[1:]
        assert name == command
        known = invoke(command, "--help").stdout
        options = [word for word in arguments if word.startswith("--") and word != "--"]
        assert command == "run" or all(option in known for option in options)
        for file in (word for word in arguments if word.startswith("configs/")):
            assert (ROOT / file).is_file()


def test_shells_can_complete_commands():
    script = "import sys; sys.argv[0] = 'sae-lens-alloc'; from sae_lens_alloc_cli import main"
    result = subprocess.run(
        [sys.executable, "-c", f"{script}; main()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            "_SAE_LENS_ALLOC_COMPLETE": "complete_bash",
            "COMP_WORDS": "sae-lens-alloc fin",
            "COMP_CWORD": "1",
        },
    )
    assert result.stdout.split() == ["finetune"]
