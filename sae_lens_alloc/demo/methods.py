"""The two SAEs of the demo: Mutual Choice and SAELens' batchtopk, with the same other settings."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_alloc.activations.on_text import take_tokens
from sae_lens_alloc.config.run_file import load_runner_config
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.thresholds.factor import set_l0
from sae_lens_alloc.training.output_folder import new_files
from sae_lens_alloc.training.runner import (
    CALIBRATION_TOKENS,
    AllocSAETrainingRunner,
)

HERE = Path(__file__).parent
CONFIG = HERE / "mutual_choice.yaml"
CORPUS = HERE / "corpus"

RunnerConfig = LanguageModelSAERunnerConfig[Any]


@dataclass(frozen=True)
class Trained:
    """
    A trained and saved SAE.

    Args:
        name: Name of its architecture.
        cfg: The run that trained it.
        folder: Folder that it was saved to.
        seconds: Duration of the training, with the language model and the calibration of the
            thresholds.
        l0_before: Features per token on training text with the threshold that SAELens left.
            None if the runner calibrated the SAE.
    """

    name: str
    cfg: RunnerConfig
    folder: Path
    seconds: float
    l0_before: float | None


def demo_configs(output: Path, *overrides: str) -> dict[str, RunnerConfig]:
    """
    The run of each method, by name.

    Args:
        output: Folder that gets a folder for each method.
        overrides: Settings that replace those of the demo's file in all methods.
    """
    shared = (f"model_name={HERE / 'model'}", f"dataset_path={CORPUS}", "verbose=false")
    ours = load_runner_config(
        CONFIG, [*shared, f"output_path={output / 'mutual_choice'}", *overrides]
    )
    sae = ours.sae
    batchtopk = load_runner_config(
        CONFIG,
        [
            *shared,
            f"output_path={output / 'batchtopk'}",
            f"sae={{architecture: batchtopk, d_in: {sae.d_in}, d_sae: {sae.d_sae}, k: {sae.k}}}",
            *overrides,
        ],
    )
    return {"mutual_choice": ours, "batchtopk": batchtopk}


def train(name: str, cfg: RunnerConfig, overwrite: bool = False) -> Trained:
    """
    Trains one SAE and saves it with thresholds for k features per token.

    Args:
        name: Name of the method.
        cfg: The run, with an output path.
        overwrite: Whether an SAE in the output folder may be replaced.
    """
    assert cfg.output_path is not None
    folder = Path(cfg.output_path)
    with warnings.catch_warnings():
        # SAELens recommends tokenizing the corpus first, which takes longer than it saves here
        warnings.filterwarnings("ignore", "Dataset is not tokenized")
        # the saved batchtopk SAE differs from the trained one until _set_saved_l0
        warnings.filterwarnings("ignore", "The saved SAE, loaded with SAELens")
        runner = AllocSAETrainingRunner(cfg, overwrite=overwrite)
        start = time.perf_counter()
        runner.run()
        l0_before = None
        if not isinstance(cfg.sae, MutualChoiceTrainingSAEConfig):
            l0_before = _set_saved_l0(folder, runner)
    return Trained(name, cfg, folder, time.perf_counter() - start, l0_before)


def events(cfg: RunnerConfig) -> list[tuple[float, str]]:
    """Changes during a run, as (tokens seen, what changes)."""
    if not isinstance(cfg.sae, MutualChoiceTrainingSAEConfig):
        return []
    switch = (cfg.sae.feature_choice_steps or 0) * cfg.train_batch_size_tokens
    return [(switch, "Feature Choice → Mutual Choice")]


def _set_saved_l0(folder: Path, runner: AllocSAETrainingRunner) -> float:
    """
    Sets the threshold of a saved SAE for the k it was trained with, as the runner does for our
    architectures, so that both are compared at equal sparsity. SAELens' running threshold
    starts at 0, and is still too low after a short run.

    Returns:
        Features per token before.
    """
    activations = take_tokens(runner.activations_store, CALIBRATION_TOKENS)
    sae = SAE.load_from_disk(folder)
    assert isinstance(sae, JumpReLUSAE)
    before = measure_usage(as_user(sae), activations).l0
    set_l0(sae, activations, runner.cfg.sae.k)
    with new_files(folder, "the SAE") as new_folder:
        sae.save_model(new_folder)
    return before
