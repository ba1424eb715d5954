import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sae_lens_alloc
from sae_lens_alloc.activations.on_text import gather_activations, text_of_sae
from sae_lens_alloc.cli import app
from sae_lens_alloc.thresholds.recalibration import load_saved_sae
from sae_lens_alloc.training import runner as runner_module
from tests.training.test_output_folder import held_by_another_process

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
CONFIG = str(DEMO / "mutual_choice.yaml")
# 4 steps of 256 tokens
TINY = (
    f"model_name={DEMO / 'model'}",
    f"dataset_path={DEMO / 'corpus'}",
    "hook_name=transformer.h.0",
    "sae.d_sae=64",
    "sae.k=4",
    "training_tokens=1024",
    "train_batch_size_tokens=256",
    "store_batch_size_prompts=4",
    "n_batches_in_buffer=4",
    "logger.wandb_log_frequency=1",
)


@pytest.fixture(autouse=True, scope="module")
def few_calibration_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "CALIBRATION_TOKENS", 1024)
        yield


def invoke(*args: str) -> Any:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(output: Path, *args: str) -> Any:
    return invoke("train", CONFIG, *TINY, f"output_path={output}", *args)


# train


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
        "memory      about 7.2 MB (parameters 0.1 MB, gradients 0.1 MB, Adam 0.2 MB, "
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


# run


def test_run_lets_saelens_own_command_line_train_our_architectures():
    result = subprocess.run(
        [
            *(sys.executable, "-m", "sae_lens_alloc", "run", "--"),
            *("sae_lens.llm_sae_training_runner", "--architecture", "mutual_choice"),
            "--help",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "mutual_choice,feature_choice," in result.stdout
    assert "MutualChoiceTrainingSAEConfig" in result.stdout
    assert "--feature_choice_steps [int]" in result.stdout
    assert "--k_start [float]" in result.stdout
    assert "found in sys.modules" not in result.stderr


@pytest.fixture
def _restore_process(monkeypatch: pytest.MonkeyPatch):
    """`run` takes over the process: give it its arguments and search path back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("_restore_process")
def test_run_is_python_dash_m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_script.py").write_text(
        "import sys\nprint(__name__, sys.argv)\nsys.exit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    for separator in (["--"], []):
        result = invoke("run", *separator, "a_script", "--quick", "x=1", "--", "-h")
        assert result.exit_code == 3
        script = str(tmp_path / "a_script.py")
        assert result.stdout == f"__main__ {[script, '--quick', 'x=1', '--', '-h']}\n"


@pytest.mark.parametrize("module", ["nowhere", "nowhere.at.all", "sae_lens"])
@pytest.mark.usefixtures("_restore_process")
def test_run_of_what_cannot_be_run_is_one_sentence(module: str):
    result = invoke("run", module)
    assert result.exit_code == 1
    assert result.stderr == f"error: there is no module {module!r} that can be run.\n"


# calibrate


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sae"
    assert train(folder).exit_code == 0
    return folder


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


# demo


def test_demo_leaves_a_used_folder_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    result = invoke("demo", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {str(tmp_path)!r} is not empty: ")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", [[], ["train"], ["run"], ["calibrate"], ["demo"]])
def test_help(command: list[str]):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


# what is not lost


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


def test_no_command_writes_into_the_folder_that_it_reads(saved: Path, tmp_path: Path):
    out, link = tmp_path / "out", tmp_path / "link"
    shutil.copytree(saved, out)
    link.symlink_to(out)
    before = contents(out)
    calibrated = invoke("calibrate", str(out), "--output", str(link), "--overwrite")
    assert "which is left as it is: give another folder." in calibrated.stderr
    trained = train(link, f"from_pretrained_path={out}", "--overwrite")
    assert "sae-lens-alloc finetune --from" in trained.stderr
    assert calibrated.exit_code == trained.exit_code == 1
    assert contents(out) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("sae_lens_alloc.training.runner.load_language_model", interrupt)
    result = train(tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; no checkpoint was saved\n"
    assert not (tmp_path / "out").exists()


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
