"""What is found about a run's folders before it starts, and what stays in them."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.training.output_folder import LAUNCH_FILENAME, is_of_launch
from sae_lens_alloc.training.run_folders import (
    _claimed,
    claimed_folders,
    estimate_disk,
    require_free_output,
)
from tests.training.conftest import D_MODEL, lm_config
from tests.training.test_output_folder import contents, held_by_another_process


def config(folder: Path, **overrides: Any) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "output_path": str(folder / "sae"),
        "checkpoint_path": str(folder / "checkpoints"),
        "logger": LoggingConfig(
            log_to_wandb=False, wandb_id="run", wandb_log_frequency=2
        ),
        **overrides,
    }
    sae = MutualChoiceTrainingSAEConfig(
        d_in=D_MODEL, d_sae=128, k=8, feature_choice_steps=2
    )
    return lm_config(sae, **settings)


def claim(cfg: LanguageModelSAERunnerConfig[Any], overwrite: bool = False) -> None:
    with claimed_folders(cfg, overwrite):
        pass


def write(folder: Path, **files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["sae", "checkpoints/run"])
def test_one_run_at_a_time_has_a_folder(folder: str, tmp_path: Path):
    with (
        held_by_another_process(tmp_path / folder),
        pytest.raises(ValueError, match="_path .* is in use by another run"),
    ):
        AllocSAETrainingRunner(config(tmp_path, model_name="not/loaded"))


@pytest.mark.parametrize("folder", ["sae", "checkpoints"])
def test_a_folder_that_cannot_be_made_is_found_at_once(folder: str, tmp_path: Path):
    (tmp_path / folder).write_text("mine")
    with pytest.raises(OSError, match="_path .* cannot be written to"):
        AllocSAETrainingRunner(config(tmp_path, model_name="not/loaded"))
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_an_sae_is_replaced_only_if_told_so(tmp_path: Path):
    write(tmp_path / "sae", cfg={})
    with pytest.raises(ValueError, match="already holds an SAE: .* overwrite=True"):
        claim(config(tmp_path))
    claim(config(tmp_path), overwrite=True)
    assert contents(tmp_path / "sae") == {"cfg.json": b"{}"}


@pytest.mark.parametrize(
    ("recorded", "own"),
    [
        ({"checkpoint_path": "checkpoints/run"}, True),
        ({"checkpoint_path": "x", "resume_from_checkpoint": "checkpoints/run"}, True),
        ({"checkpoint_path": "x", "resume_from_checkpoint": "checkpoints/run/8"}, True),
        ({"checkpoint_path": "checkpoints/other"}, False),
        ({"checkpoint_path": None}, False),
        ([], False),
    ],
)
def test_a_resumed_run_replaces_its_own_sae(
    recorded: Any, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "checkpoints" / "run" / "8", checkpoint={})
    write(tmp_path / "sae", cfg={"metadata": {}}, runner_cfg=recorded)
    for resumed in ("checkpoints/run", "checkpoints/run/8"):
        cfg = config(tmp_path, resume_from_checkpoint=resumed)
        if own:
            claim(cfg)
            require_free_output(cfg, overwrite=False)
        else:
            with pytest.raises(ValueError, match="already holds an SAE"):
                claim(cfg)
            with pytest.raises(ValueError, match="is not empty"):
                require_free_output(cfg, overwrite=False)
    # on the command line, one that has come to its end is only replaced by --overwrite
    write(tmp_path / "sae", cfg={"metadata": {"held_out": {"l0": 8}}})
    with pytest.raises(ValueError, match="is not empty"):
        require_free_output(
            config(tmp_path, resume_from_checkpoint="checkpoints/run"), overwrite=False
        )


def test_checkpoints_of_two_runs_are_not_mixed(tmp_path: Path):
    write(tmp_path / "checkpoints" / "run" / "8", checkpoint={})
    with pytest.raises(ValueError, match="checkpoints of another run: .*wandb_id, or"):
        claim(config(tmp_path), overwrite=True)
    run = tmp_path / "checkpoints" / "run"
    claim(config(tmp_path, resume_from_checkpoint=str(run / "8")))
    claim(config(tmp_path, resume_from_checkpoint=str(run)))
    write(tmp_path / "checkpoints" / "other" / "8", checkpoint={})
    other = str(tmp_path / "checkpoints" / "other")
    with pytest.raises(ValueError, match="checkpoints of another run"):
        claim(config(tmp_path, resume_from_checkpoint=other))


@pytest.mark.parametrize("key", ["from_pretrained_path", "resume_from_checkpoint"])
def test_a_run_does_not_overwrite_what_it_starts_from(key: str, tmp_path: Path):
    (tmp_path / "source").mkdir()
    (tmp_path / "sae").symlink_to(tmp_path / "source")
    with pytest.raises(ValueError, match=f"is the folder of {key}"):
        claim(config(tmp_path, **{key: str(tmp_path / "source")}), overwrite=True)


def test_a_folder_in_place_of_a_file_is_found(tmp_path: Path):
    (tmp_path / "sae" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a folder metrics.jsonl"):
        claim(config(tmp_path), overwrite=True)


def test_metrics_that_are_none_are_found_before_the_run_goes_on(tmp_path: Path):
    write(tmp_path / "checkpoints" / "run" / "8", checkpoint={})
    write(tmp_path / "sae")
    (tmp_path / "sae" / "metrics.jsonl").write_text('{"step": 1}\n{"stp": 2}\n{"st')
    cfg = config(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoints" / "run"))
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl' is no row"):
        claim(cfg)


def test_the_room_on_the_disk_is_estimated(tmp_path: Path):
    cfg = config(tmp_path, n_checkpoints=3, save_final_checkpoint=True)
    (tmp_path / "checkpoints" / "run" / "256").mkdir(parents=True)
    # 2 * 192 * 128 + 128 + 192 parameters of 4 bytes; 16 + 8 contexts of 64 tokens of 192
    # floats; 3 checkpoints of which one is there, and the final one; 4 rows of metrics
    parameters, buffer = 4 * 49_472, 24 * 64 * 192 * 4
    assert estimate_disk(cfg) == {
        tmp_path / "sae": 2 * parameters + 4 * 2000,
        tmp_path / "checkpoints" / "run": 3 * (3 * parameters + buffer),
    }


def test_a_disk_without_room_is_found_at_once(tmp_path: Path):
    cfg = config(tmp_path, n_checkpoints=10**9, training_tokens=10**12)
    with pytest.raises(ValueError, match="will write about .* but that disk has"):
        claim(cfg)


@pytest.mark.usefixtures("few_calibration_tokens")
def test_an_overwritten_run_is_whole_until_the_new_one_is(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    def start(**overrides: Any) -> AllocSAETrainingRunner:
        cfg = config(tmp_path, checkpoint_path=None, **overrides)
        return AllocSAETrainingRunner(cfg, demo_text, demo_model, overwrite=True)

    output = tmp_path / "sae"
    start().run()
    (output / "notes.txt").write_text("mine")
    old = contents(output)

    # one that fails on the way, as with a bad hook or data
    failing = start(seed=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("in step 3")

    calls = iter(range(3))
    failing.sae.hook_sae_recons.add_hook(
        lambda *_, **__: None if next(calls, None) is not None else fail()
    )
    with pytest.raises(RuntimeError, match="in step 3"):
        failing.run()
    found = contents(output)
    metrics = found.pop("metrics.new.jsonl")
    assert found == old
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [1]

    start(seed=1).run()
    found = contents(output)
    assert found.keys() == old.keys()
    assert found["metrics.jsonl"] != old["metrics.jsonl"]
    assert len(found["metrics.jsonl"].splitlines()) == 4
    assert found["notes.txt"] == b"mine"
    assert SAE.load_from_disk(output).cfg.metadata.provenance["seed"] == 1


def test_a_launch_may_replace_what_it_has_written_itself(tmp_path: Path):
    cfg, output = config(tmp_path), tmp_path / "sae"

    def claim_by(launch: str) -> AbstractContextManager[None]:
        return _claimed(cfg, False, only_if_empty=True, launch=launch, n_ranks=2)

    with claim_by("one"):
        for folder in (output, tmp_path / "checkpoints" / "run"):
            assert (folder / LAUNCH_FILENAME).read_text() == f"one {os.getpid()}"
    assert not output.exists()  # since nothing was written

    with claim_by("one"):
        write(output, cfg={}, metrics={})
    # another run of the same process
    with (
        pytest.raises(ValueError, match="is not empty: give --overwrite"),
        claim_by("one"),
    ):
        pass
    # torchrun has started another process
    (output / LAUNCH_FILENAME).write_text("one 1")
    with claim_by("one"), claim_by("one"):
        assert not is_of_launch(output, "other")
        assert not is_of_launch(output, None)
    for claimed in (claim_by("other"), claimed_folders(cfg, only_if_empty=True)):
        with pytest.raises(ValueError, match="is not empty: give --overwrite"), claimed:
            pass
    assert is_of_launch(output, "one")  # of which nothing is lost


def test_a_launch_that_was_refused_may_not_replace_anything_when_started_again(
    tmp_path: Path,
):
    cfg, output = config(tmp_path), tmp_path / "sae"
    write(output, cfg={"mine": True})
    for _ in range(2):
        claimed = _claimed(cfg, False, only_if_empty=True, launch="one", n_ranks=2)
        with pytest.raises(ValueError, match="is not empty"), claimed:
            pass
    assert contents(output) == {"cfg.json": b'{"mine": true}'}
