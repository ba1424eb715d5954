import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

import sae_lens_alloc
from tests.saes.conftest import ARCHITECTURES

REPOSITORY = Path(sae_lens_alloc.__file__).parents[1]
CLASSES: dict[str, Any] = {
    "mutual_choice": (
        sae_lens_alloc.MutualChoiceTrainingSAE,
        sae_lens_alloc.MutualChoiceTrainingSAEConfig,
    ),
    "feature_choice": (
        sae_lens_alloc.FeatureChoiceTrainingSAE,
        sae_lens_alloc.FeatureChoiceTrainingSAEConfig,
    ),
}
CONFIG_FIELDS: dict[str, Any] = {
    "d_in": 4,
    "d_sae": 16,
    "k": 2.5,
    "k_start": 4.0,
    "k_decay_steps": 7,
    "aux_loss": "aux_k",
    "aux_loss_coefficient": 0.25,
    "aux_loss_decay_start": 11,
    "k_aux": 3,
    "underuse_fraction": 0.25,
    "density_window_tokens": 1234,
    "max_density": 0.5,
    "min_tokens_per_feature": 0.125,
    "rescale_acts_by_decoder_norm": False,
    "decoder_init_norm": 0.5,
    "apply_b_dec_to_input": False,
    "normalize_activations": "layer_norm",
}
SCHEDULE_FIELD: dict[str, Any] = {
    "mutual_choice": "feature_choice_steps",
    "feature_choice": "mutual_choice_steps",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_import_registers_the_architecture(architecture: str):
    assert get_sae_training_class(architecture) == CLASSES[architecture]
    assert CLASSES[architecture][1].architecture() == architecture


def test_reloading_the_package_is_harmless():
    before = dict(SAE_TRAINING_CLASS_REGISTRY)
    importlib.reload(sae_lens_alloc)
    importlib.reload(sae_lens_alloc)
    assert before == SAE_TRAINING_CLASS_REGISTRY


@pytest.mark.slow
def test_import_error_says_who_took_the_name():
    program = """
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
register_sae_training_class("feature_choice", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
try:
    import sae_lens_alloc
except ImportError as error:
    print(error)
print(SAE_TRAINING_CLASS_REGISTRY["feature_choice"][0].__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stdout.splitlines() == [
        "sae_lens_alloc cannot register the SAE architecture 'feature_choice': "
        "sae_lens.saes.batchtopk_sae.BatchTopKTrainingSAE already took that name. "
        "Import only one of the two packages in a process.",
        "BatchTopKTrainingSAE",
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_survives_json_and_keeps_every_field(architecture: str):
    _, config_class = CLASSES[architecture]
    cfg = config_class(**CONFIG_FIELDS, **{SCHEDULE_FIELD[architecture]: 5})
    restored = TrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert type(restored) is config_class
    assert restored.to_dict() == cfg.to_dict()
    for name, value in CONFIG_FIELDS.items():
        assert getattr(restored, name) == value, name
    assert getattr(restored, SCHEDULE_FIELD[architecture]) == 5
    # the same dictionary builds the SAE itself, as the runner does
    assert type(TrainingSAE.from_dict(cfg.to_dict())) is CLASSES[architecture][0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_config_survives_to_dict_and_from_dict(architecture: str):
    _, config_class = CLASSES[architecture]
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(**CONFIG_FIELDS, **{SCHEDULE_FIELD[architecture]: 5}),
        model_name="somewhere",
        hook_name="transformer.h.2",
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    restored = LanguageModelSAERunnerConfig.from_dict(
        json.loads(json.dumps(cfg.to_dict()))
    )
    assert type(restored.sae) is config_class
    assert restored.sae.to_dict() == cfg.sae.to_dict()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"k": 0}, "k must be in (0, d_sae = 16], got 0."),
        ({"k": -1.5}, "k must be in (0, d_sae = 16], got -1.5."),
        ({"k": 16.5}, "k must be in (0, d_sae = 16], got 16.5."),
        (
            {"k": 4, "k_start": 3, "k_decay_steps": 5},
            "k_start must be in [k = 4, d_sae = 16], since the budget only falls, got 3.",
        ),
        (
            {"k": 4, "k_start": 17, "k_decay_steps": 5},
            "k_start must be in [k = 4, d_sae = 16], since the budget only falls, got 17.",
        ),
        (
            {"k": 4, "k_start": 8},
            "k_decay_steps must be at least 1 when k_start is set, or the budget would "
            "never reach k, got 0.",
        ),
        ({"k": 4, "k_decay_steps": -1}, "k_decay_steps must be >= 0, got -1."),
        (
            {"k": 4, "aux_loss": "topk"},
            "aux_loss must be 'aux_zipf', 'aux_k' or 'none', got 'topk'.",
        ),
        (
            {"k": 4, "aux_loss_coefficient": -0.5},
            "aux_loss_coefficient must be >= 0, got -0.5.",
        ),
        (
            {"k": 4, "aux_loss_decay_start": -1},
            "aux_loss_decay_start must be a step count >= 0 or None, got -1.",
        ),
        ({"k": 4, "k_aux": 0}, "k_aux must be in [1, d_sae = 16] or None, got 0."),
        ({"k": 4, "k_aux": 17}, "k_aux must be in [1, d_sae = 16] or None, got 17."),
        (
            {"k": 4, "underuse_fraction": 0.0},
            "underuse_fraction must be in (0, 1], got 0.0.",
        ),
        (
            {"k": 4, "density_window_tokens": 0},
            "density_window_tokens must be >= 1, got 0.",
        ),
        ({"k": 4, "max_density": 1.5}, "max_density must be in (0, 1], got 1.5."),
        (
            {"k": 4, "min_tokens_per_feature": -1},
            "min_tokens_per_feature must be >= 0, got -1.",
        ),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_impossible_settings_are_refused_in_one_sentence(
    architecture: str, overrides: dict[str, Any], sentence: str
):
    with pytest.raises(ValueError) as error:
        CLASSES[architecture][1](d_in=4, d_sae=16, **overrides)
    assert str(error.value) == sentence


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_negative_schedule_steps_are_refused(architecture: str):
    field = SCHEDULE_FIELD[architecture]
    with pytest.raises(ValueError) as error:
        CLASSES[architecture][1](d_in=4, d_sae=16, k=4, **{field: -1})
    assert str(error.value) == f"{field} must be >= 0, got -1."


@pytest.mark.parametrize("k", [float("nan"), float("inf")])
def test_k_that_is_no_number_is_refused(k: float):
    with pytest.raises(ValueError, match=r"^k must be in \(0, d_sae = 16\]"):
        sae_lens_alloc.MutualChoiceTrainingSAEConfig(d_in=4, d_sae=16, k=k)
