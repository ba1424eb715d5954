"""`from_pretrained_path`: the SAE that is printed and recorded is the one that is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import (
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.training.pretrained import load_pretrained
from tests.cli.commands import CONFIG, TINY, invoke, train
from tests.training.conftest import D_MODEL, lm_config

WEIGHTS = "sae_weights.safetensors"


def config(**overrides: Any) -> MutualChoiceTrainingSAEConfig:
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_sae": 64, "k": 4, **overrides}
    return MutualChoiceTrainingSAEConfig(**settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Mutual Choice SAE without a schedule, with k 6."""
    torch.manual_seed(1)
    MutualChoiceTrainingSAE(config(k=6, feature_choice_steps=0)).save_model(
        tmp_path / "start"
    )
    return tmp_path / "start"


def test_weights_are_the_folders_and_settings_the_runs(folder: Path):
    wanted = config(feature_choice_steps=3, k_start=8, k_decay_steps=3)
    sae = load_pretrained(folder, wanted, "cpu")
    assert sae.cfg == wanted
    given = TrainingSAE.load_from_disk(folder).state_dict()
    assert given.keys() == sae.state_dict().keys()
    for name, weight in given.items():
        assert torch.equal(sae.state_dict()[name], weight), name


@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
def test_the_run_is_the_one_that_is_printed_and_recorded(
    folder: Path,
    tmp_path: Path,
    demo_model: HookedRootModule,
    demo_text: Dataset,
    monkeypatch: pytest.MonkeyPatch,
):
    cfg = lm_config(
        config(),
        from_pretrained_path=str(folder),
        training_tokens=8 * 256,
        output_path=str(tmp_path / "output"),
    )
    rules: list[str] = []
    rule_at = MutualChoiceTrainingSAE.rule_at

    def note(sae: MutualChoiceTrainingSAE, step: int) -> Any:
        rules.append(f"{step} {rule_at(sae, step)}")
        return rule_at(sae, step)

    monkeypatch.setattr(MutualChoiceTrainingSAE, "rule_at", note)
    runner = AllocSAETrainingRunner(cfg, demo_text, demo_model)
    runner.run()
    # the recipe: a quarter of 8 steps, from 2 k to k
    recorded = json.loads((tmp_path / "output" / "runner_cfg.json").read_text())["sae"]
    for sae_cfg in (recorded, runner.sae.cfg.to_dict(), runner.cfg.sae.to_dict()):
        schedule = [sae_cfg[n] for n in ("feature_choice_steps", "k_start", "k")]
        assert schedule == [2, 8, 4]
    assert {f"{n} {'feature' if n < 2 else 'mutual'}" for n in range(8)} <= {*rules}


@pytest.mark.slow
def test_the_command_says_the_same(folder: Path, tmp_path: Path):
    arguments = (f"from_pretrained_path={folder}", f"output_path={tmp_path / 'out'}")
    result = invoke("train", CONFIG, *TINY, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "Feature Choice for 1 steps, then Mutual Choice" in result.stdout
    assert "k 8 falling to 4" in result.stdout
    details = SAE.load_from_disk(
        tmp_path / "out"
    ).cfg.metadata.training_architecture_details
    assert (details["feature_choice_steps"], details["k"]) == (1, 4)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4),
            "its SAE has architecture 'mutual_choice', and the one to be trained 'topk'.",
        ),
        (config(d_sae=65), "its SAE has d_sae 64, and the one to be trained 65."),
        (config(d_in=191), "its SAE has d_in 192, and the one to be trained 191."),
        (
            config(normalize_activations="layer_norm"),
            "its SAE has normalize_activations 'none', and the one to be trained "
            "'layer_norm'.",
        ),
    ],
)
def test_another_sae_is_refused(folder: Path, wanted: Any, sentence: str):
    with pytest.raises(ValueError) as error:
        load_pretrained(folder, wanted, "cpu")
    assert (
        str(error.value) == f"from_pretrained_path is {str(folder)!r}, but {sentence}"
    )


def test_a_stock_sae_is_not_trained_in_place_of_ours(tmp_path: Path):
    """SAELens trains the folder's JumpReLU SAE, whatever was printed."""
    JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=64)).save_model(
        tmp_path / "start"
    )
    for how in ([], ["--dry-run"]):
        result = train(
            tmp_path / "output", f"from_pretrained_path={tmp_path / 'start'}", *how
        )
        assert result.exit_code == 1
        assert "its SAE has architecture 'jumprelu'" in result.stderr


def test_settings_of_a_stock_sae_are_the_runs_too(tmp_path: Path):
    TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=9)).save_model(
        tmp_path
    )
    wanted = TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)
    assert load_pretrained(tmp_path, wanted, "cpu").cfg == wanted


def test_an_inference_sae_points_to_finetune(tmp_path: Path, folder: Path):
    sae = MutualChoiceTrainingSAE(config(feature_choice_steps=0))
    sae.save_inference_model(str(tmp_path / "inference"))
    result = train(
        tmp_path / "output", f"from_pretrained_path={tmp_path / 'inference'}"
    )
    assert result.exit_code == 1
    assert "start from it with `sae-lens-alloc finetune --from`" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("cfg.json", None, "cfg.json is missing."),
        (WEIGHTS, None, f"{WEIGHTS} is missing."),
        ("cfg.json", b"{", "cfg.json' is damaged"),
        ("cfg.json", b"[]", "cfg.json' is damaged"),
        (WEIGHTS, b"text", f"{WEIGHTS}' is damaged"),
        (WEIGHTS, b"", f"{WEIGHTS}' is damaged"),
    ],
)
def test_a_damaged_folder_is_one_sentence(
    folder: Path, name: str, content: bytes | None, sentence: str
):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_pretrained(folder, config(), "cpu")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
def test_a_resumed_run_does_not_need_what_it_started_from(
    folder: Path, tmp_path: Path, demo_model: HookedRootModule, demo_text: Dataset
):
    cfg = lm_config(
        config(),
        from_pretrained_path=str(folder),
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
    )
    whole = AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    shutil.rmtree(folder)
    cfg.resume_from_checkpoint = cfg.checkpoint_path
    resumed = AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    assert torch.equal(resumed.W_enc, whole.W_enc)


def test_an_sae_that_is_passed_is_the_one_that_is_recorded(
    demo_model: HookedRootModule, demo_text: Dataset
):
    sae = MutualChoiceTrainingSAE(config(k=6))
    runner = AllocSAETrainingRunner(lm_config(config()), demo_text, demo_model, sae)
    assert runner.cfg.sae is runner.sae.cfg
    assert runner.cfg.sae.k == 6


def test_finetune_refuses_a_second_start(folder: Path, tmp_path: Path):
    result = invoke(
        *("finetune", CONFIG, "--from", str(folder), *TINY),
        *(f"output_path={tmp_path / 'output'}", f"from_pretrained_path={folder}"),
    )
    assert result.exit_code == 1
    assert "from_pretrained_path has no effect in a fine-tuning" in result.stderr
