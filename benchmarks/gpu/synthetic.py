"""
SynthSAEBench-16k, the samples drawn on the card. A training of some length is one measurement:
budget and learning rate fall over its whole length, so that a longer one is another training
and not the same one continued.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig

from benchmarks.gpu.scale import SyntheticScale
from benchmarks.measure import synchronize
from benchmarks.subject import Machine
from sae_lens_alloc import AllocSAETrainer
from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.comparison.synthetic import (
    SAMPLES_PER_BATCH,
    known_feature_metrics,
)
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.thresholds.operating_point import at_l0

SYNTHSAEBENCH_2K = Path(__file__).parents[2] / "configs" / "compare_synthetic_2k.yaml"
LEARNING_RATE = 3e-4
# Share of the steps over which the learning rate falls to 0 at the end, as in docs/results.md.
DECAY = 1 / 3
ARCHITECTURES = (
    "mutual_choice",
    "batchtopk",
    "matryoshka_mutual_choice",
    "matryoshka_batchtopk",
)


def model_config(scale: SyntheticScale) -> SyntheticModelConfig:
    """
    The model of the data as published. SynthSAEBench-2k differs from SynthSAEBench-16k in
    these three sizes alone.
    """
    comparison, _ = load_comparison(SYNTHSAEBENCH_2K)
    assert comparison.synthetic is not None
    settings = copy.deepcopy(dict(comparison.synthetic))
    settings["num_features"] = scale.num_features
    settings["hidden_dim"] = scale.hidden_dim
    settings["hierarchy"]["total_root_nodes"] = scale.root_nodes
    return SyntheticModelConfig.from_dict(settings)


def train_and_evaluate(
    architecture: str, samples: int, scale: SyntheticScale, machine: Machine
) -> dict[str, Any]:
    """
    Trains an SAE, brings it to k features per token, and compares its features with the known
    ones.

    Returns:
        The metrics, the seconds of the training, and `fixed_seconds`, those of all else.
    """
    start = time.perf_counter()
    machine.prepare()
    model = SyntheticModel(model_config(scale), device=machine.device)
    torch.manual_seed(0)
    sae: Any = TrainingSAE.from_dict(_sae_config(architecture, scale, machine))
    steps = samples // scale.batch
    trainer = AllocSAETrainer(
        SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=scale.batch,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
            lr_decay_steps=int(DECAY * steps),
            device=machine.device,
            autocast=machine.autocast,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        _samples(model, scale.batch),
    )
    synchronize(machine)
    begin = time.perf_counter()
    trainer.fit()
    synchronize(machine)
    training_seconds = time.perf_counter() - begin
    validation = _drawn(model, scale.evaluated)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder, device=machine.device).eval()
    calibrated = at_l0(saved, validation, scale.k)
    usage = measure_usage(as_user(calibrated), _drawn(model, scale.evaluated))
    metrics = {
        name: value
        for name, value in usage.to_dict().items()
        if name not in ("l0_histogram", "top_1_percent_share")
    }
    return {
        **metrics,
        **known_feature_metrics(calibrated, model, scale.evaluated),
        "seconds": training_seconds,
        "fixed_seconds": time.perf_counter() - start - training_seconds,
    }


def _sae_config(
    architecture: str, scale: SyntheticScale, machine: Machine
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "architecture": architecture,
        "d_in": scale.hidden_dim,
        "d_sae": scale.d_sae,
        "k": scale.k,
        "device": machine.device,
    }
    if architecture.startswith("matryoshka"):
        settings["matryoshka_widths"] = list(scale.matryoshka_widths)
    return TrainingSAEConfig.from_dict(settings).to_dict()


def _samples(model: SyntheticModel, batch: int) -> Iterator[torch.Tensor]:
    while True:
        yield model.sample(batch)


def _drawn(model: SyntheticModel, n_samples: int) -> torch.Tensor:
    """So many samples, of which a batch of known features is held at a time."""
    batches = torch.arange(n_samples).split(SAMPLES_PER_BATCH)
    return torch.cat([model.sample(len(batch)) for batch in batches])
