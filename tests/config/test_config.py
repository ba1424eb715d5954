import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import BatchTopKTrainingSAEConfig

from sae_lens_alloc import (
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAEConfig,
    load_runner_config,
)

# 10,000 tokens in steps of 100: 100 training steps
MINIMAL = """
model_name: gpt2
hook_name: blocks.0.hook_resid_pre
dataset_path: some/dataset
context_size: 50
n_batches_in_buffer: 4
training_tokens: 10_000
train_batch_size_tokens: 100
sae:
  architecture: mutual_choice
  d_in: 8
  d_sae: 32
  k: 2
logger:
  log_to_wandb: false
"""
BEYOND = "must be between -1e+15 and 1e+15"


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def load(path: Path, *overrides: str) -> Any:
    return load_runner_config(path, overrides)


def error_of(path: Path, *overrides: str) -> str:
    """The error's sentence without the file and the overrides it starts with."""
    with pytest.raises(ValueError) as error:
        load_runner_config(path, overrides)
    source, _, sentence = str(error.value).partition(".yaml")
    assert source == str(path).removesuffix(".yaml")
    if overrides:
        sentence = sentence.removeprefix(f" with {', '.join(overrides)}")
    return sentence.removeprefix(": ")


def test_file_becomes_the_config_that_saelens_would_build(config_path: Path):
    cfg = load(config_path)
    assert cfg.model_name == "gpt2"
    assert cfg.training_tokens == 10_000
    assert cfg.logger.log_to_wandb is False
    # what is left open of the schedule is the recipe's, for 100 steps
    assert cfg.sae == MutualChoiceTrainingSAEConfig(
        d_in=8, d_sae=32, k=2, feature_choice_steps=25, k_start=4, k_decay_steps=25
    )
    # untouched fields keep SAELens' defaults
    assert cfg.lr == 3e-4
    assert cfg.adam_beta2 == 0.999


def test_any_registered_architecture_can_be_trained(config_path: Path):
    cfg = load(config_path, "sae.architecture=batchtopk", "sae.topk_threshold_lr=0.02")
    assert cfg.sae == BatchTopKTrainingSAEConfig(
        d_in=8, d_sae=32, k=2, topk_threshold_lr=0.02
    )
    cfg = load(config_path, "sae.architecture=feature_choice")
    assert cfg.sae == FeatureChoiceTrainingSAEConfig(d_in=8, d_sae=32, k=2)


def test_runner_cfg_json_of_a_finished_run_is_a_config(
    config_path: Path, tmp_path: Path
):
    cfg = load(config_path, "seqpos_slice=[1, null]", "lr=3e-5")
    saved = tmp_path / "runner_cfg.json"
    saved.write_text(json.dumps(cfg.to_dict()))
    again = load(saved)
    assert '"lr": 3e-05' in saved.read_text()
    again.checkpoint_path = cfg.checkpoint_path  # a new run gets a new folder
    assert again == cfg


@pytest.mark.parametrize(
    ("logger", "logs"),
    [
        ("", False),
        ("logger: {log_to_wandb: true}", True),
        ("logger: {wandb_project: mine}", True),
    ],
)
def test_nothing_is_logged_to_wandb_without_a_logger_section(
    config_path: Path, logger: str, logs: bool
):
    text = MINIMAL.replace("logger:\n  log_to_wandb: false\n", logger)
    assert text != MINIMAL
    config_path.write_text(text)
    assert load(config_path).logger.log_to_wandb is logs


# overrides


def test_overrides_replace_values_at_any_depth(config_path: Path):
    cfg = load(
        config_path,
        "sae.k=1.5",
        "lr=1e-3",
        "logger.run_name=a b",
        "model_kwargs.start_at_layer=2",
        "output_path=null",
        "exclude_special_tokens=[0, 5]",
    )
    assert cfg.sae.k == 1.5
    assert cfg.lr == 1e-3
    assert cfg.logger.run_name == "a b"
    assert cfg.model_kwargs == {"start_at_layer": 2}
    assert cfg.output_path is None
    assert cfg.exclude_special_tokens == [0, 5]


def test_later_override_wins(config_path: Path):
    assert load(config_path, "sae.k=3", "sae.k=4").sae.k == 4


def test_error_names_the_file_and_the_overrides(config_path: Path):
    with pytest.raises(ValueError) as error:
        load(config_path, "lr=1e-3", "sae.kk=3")
    assert str(error.value) == (
        f"{config_path} with lr=1e-3, sae.kk=3: "
        "unknown key 'sae.kk', did you mean 'sae.k'?"
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr", "the override 'lr' does not look like key=value."),
        ("=3", "the override '=3' does not look like key=value."),
        (
            "lr.x=3",
            "the override 'lr.x=3' needs 'lr' to be a mapping, but it is 1.",
        ),
        (
            "lr=[1",
            "not valid YAML at line 1: expected ',' or ']', but got '<stream end>'.",
        ),
    ],
)
def test_bad_override_is_one_sentence(config_path: Path, override: str, sentence: str):
    config_path.write_text(MINIMAL + "lr: 1\n")
    assert error_of(config_path, override) == sentence


# numbers as people write them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        ("1.5e3", 1500.0),
        (".5e-1", 0.05),
        ("2.e-1", 0.2),
        ("3.0e-4", 3e-4),
        ("0.001", 0.001),
        ("1", 1),
    ],
)
def test_scientific_notation_is_a_number_in_the_file_too(
    config_path: Path, text: str, expected: float
):
    config_path.write_text(f"{MINIMAL}lr: {text}\n")
    assert load(config_path).lr == expected


def test_whole_floats_are_integers(config_path: Path):
    cfg = load(config_path, "training_tokens=1e6")
    assert cfg.training_tokens == 1_000_000
    assert isinstance(cfg.training_tokens, int)


def test_quoted_number_stays_a_string(config_path: Path):
    assert load(config_path, "logger.run_name='1e5'").logger.run_name == "1e5"


# shares of the training steps


def test_share_of_the_training_steps_becomes_a_step_count(config_path: Path):
    cfg = load(
        config_path,
        "sae.feature_choice_steps=75%",
        "sae.aux_loss_decay_start=33.4%",
        "sae.k_start=4",
        "sae.k_decay_steps=10 %",
        "lr_warm_up_steps=0%",
        "lr_decay_steps=20%",
        "dead_feature_window=100%",
    )
    # 100 steps
    assert cfg.sae.feature_choice_steps == 75
    assert cfg.sae.aux_loss_decay_start == 33
    assert cfg.sae.k_decay_steps == 10
    assert cfg.lr_warm_up_steps == 0
    assert cfg.lr_decay_steps == 20
    assert cfg.dead_feature_window == 100


@pytest.mark.parametrize(
    ("overrides", "k_start"),
    [(["sae.k=7"], 14.0), (["sae.k=0.3"], 0.6), (["sae.k=7", "sae.k_start=100%"], 7.0)],
)
def test_the_first_budget_may_be_a_share_of_k(
    config_path: Path, overrides: list[str], k_start: float
):
    cfg = load(config_path, "sae.k_decay_steps=50%", "sae.k_start=200%", *overrides)
    assert cfg.sae.k_start == pytest.approx(k_start)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("feature_choice", "mutual_choice_steps"),
        ("standard", "l1_warm_up_steps"),
        ("jumprelu", "l0_warm_up_steps"),
    ],
)
def test_share_for_one_architecture(config_path: Path, architecture: str, name: str):
    text = MINIMAL.replace("mutual_choice", architecture)
    has_k = architecture == "feature_choice"
    config_path.write_text(text if has_k else text.replace("  k: 2\n", ""))
    cfg = load(config_path, f"sae.{name}=25%")
    assert getattr(cfg.sae, name) == 25


@pytest.mark.parametrize(
    ("tokens", "batch", "share", "steps"),
    [
        (500_000_000, 4096, "75%", 91_552),  # 91552.73
        (10_000, 100, "29%", 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (1_000, 300, "100%", 3),
    ],
)
def test_share_is_rounded_down_exactly(
    config_path: Path, tokens: int, batch: int, share: str, steps: int
):
    cfg = load(
        config_path,
        f"training_tokens={tokens}",
        f"train_batch_size_tokens={batch}",
        "n_batches_in_buffer=1000",
        f"lr_decay_steps={share}",
    )
    assert cfg.lr_decay_steps == steps


def test_share_is_taken_of_the_default_batch_size(config_path: Path):
    config_path.write_text(
        MINIMAL.replace("train_batch_size_tokens: 100", "").replace(
            "10_000", "8_192_000"
        )
    )
    # SAELens' default of 4096 tokens a step: 2000 steps
    cfg = load(config_path, "n_batches_in_buffer=100", "lr_decay_steps=50%")
    assert cfg.lr_decay_steps == 1000


@pytest.mark.parametrize(
    "text", ["101%", "-1%", "a%", "75", "seventy", "1/0%", "1/0", "1e999999999%", "%"]
)
def test_bad_share_is_one_sentence(config_path: Path, text: str):
    assert error_of(config_path, f"lr_decay_steps='{text}'") == (
        "lr_decay_steps must be a number of steps or a share of them from '0%' to '100%', "
        f"got {text!r}."
    )


def test_shares_are_for_step_counts_only(config_path: Path):
    assert error_of(config_path, "training_tokens=75%") == (
        "training_tokens must be an integer, got '75%'."
    )


# unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model_nam", "model_name"),
        ("train_batch_size", "train_batch_size_tokens"),
        ("sae.feature_choice_step", "sae.feature_choice_steps"),
        ("logger.wandb_projekt", "logger.wandb_project"),
        ("sae.arch", "sae.architecture"),
        # the right name in the wrong section
        ("k", "sae.k"),
        ("sae.lr", "lr"),
        ("log_to_wandb", "logger.log_to_wandb"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_valid_one(
    config_path: Path, key: str, nearest: str
):
    assert error_of(config_path, f"{key}=1") == (
        f"unknown key {key!r}, did you mean {nearest!r}?"
    )


def test_field_of_another_architecture_is_unknown(config_path: Path):
    assert error_of(config_path, "sae.mutual_choice_steps=1") == (
        "unknown key 'sae.mutual_choice_steps', did you mean 'sae.feature_choice_steps'?"
    )


def test_key_given_twice_is_an_error(config_path: Path):
    config_path.write_text("lr: 1e-3\nseed: 1\nlr: 1e-4\n")
    assert error_of(config_path) == (
        "not valid YAML at line 3: the key 'lr' is given twice."
    )


# wrong types


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr=fast", "lr must be a number, got 'fast'."),
        ("lr=true", "lr must be a number, got True."),
        ("seed=true", "seed must be an integer, got True."),
        ("seed=1.5", "seed must be an integer, got 1.5."),
        ("streaming=1", "streaming must be true or false, got 1."),
        ("model_name=3", "model_name must be a string, got 3."),
        ("model_name=null", "model_name must be a string, got None."),
        ("hook_head_index=x", "hook_head_index must be an integer or null, got 'x'."),
        (
            "sequence_separator_token=pad",
            "sequence_separator_token must be an integer or 'bos' or 'eos' or 'sep' or "
            "null, got 'pad'.",
        ),
        (
            "exclude_special_tokens=[1, x]",
            "exclude_special_tokens must be true or false or a list with each item an "
            "integer, got [1, 'x'].",
        ),
        (
            "seqpos_slice=5",
            "seqpos_slice must be a list with each item an integer or null, got 5.",
        ),
        (
            "model_kwargs=5",
            "model_kwargs must be a mapping whose keys are strings, got 5.",
        ),
        ("sae.k=many", "sae.k must be a number, got 'many'."),
        (
            "sae.aux_loss=aux_zip",
            "sae.aux_loss must be 'aux_zipf' or 'aux_k' or 'none', got 'aux_zip'.",
        ),
        (
            "model_kwargs={1: 2}",
            "model_kwargs must be a mapping whose keys are strings, got {1: 2}.",
        ),
        (
            "sae.metadata=3",
            "sae.metadata must be a mapping whose keys are strings, got 3.",
        ),
        ("training_tokens=1e30", f"training_tokens {BEYOND}, got 10^30."),
        ("training_tokens=-1e30", f"training_tokens {BEYOND}, got -10^30."),
        (f"lr={10**400}", f"lr {BEYOND}, got 10^400."),
        ("lr=.nan", f"lr {BEYOND}, got nan."),
        ("sae.k=.inf", f"sae.k {BEYOND}, got inf."),
        ("sae=3", "sae must be a mapping, got 3."),
        ("logger=false", "logger must be a mapping, got False."),
    ],
)
def test_wrong_type_is_one_sentence(config_path: Path, override: str, sentence: str):
    assert error_of(config_path, override) == sentence


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("prefetch_llm_batches=true", "prefetch_llm_batches", True),
        ("prefetch_llm_batches=2", "prefetch_llm_batches", 2),
        ("sequence_separator_token=eos", "sequence_separator_token", "eos"),
        ("sequence_separator_token=7", "sequence_separator_token", 7),
        ("sequence_separator_token=null", "sequence_separator_token", None),
        ("seqpos_slice=[1, null]", "seqpos_slice", (1, None)),
        ("lr_end=0", "lr_end", 0),
    ],
)
def test_every_option_of_a_union_is_accepted(
    config_path: Path, override: str, name: str, expected: Any
):
    value = getattr(load(config_path, override), name)
    assert value == expected
    assert type(value) is type(expected)


# what cannot work


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["training_tokens=50"],
            "training_tokens (50) is less than train_batch_size_tokens (100), so there is "
            "not one training step.",
        ),
        (["training_tokens=0"], "training_tokens must be at least 1, got 0."),
        (
            ["logger.wandb_log_frequency=0"],
            "logger.wandb_log_frequency must be at least 1, got 0.",
        ),
        (["sae.d_sae=0"], "sae.d_sae must be at least 1, got 0."),
        (["lr=0"], "lr must be greater than 0, got 0."),
        (["lr=-1"], "lr must be greater than 0, got -1."),
        (["adam_beta1=1"], "adam_beta1 must be in [0, 1), got 1."),
        (
            ["sae.decoder_init_norm=0"],
            "sae.decoder_init_norm must be greater than 0, got 0.",
        ),
        (
            ["context_size=1e8"],
            "context_size must be at most 10,000,000, got 100,000,000.",
        ),
        (["n_checkpoints=-1"], "n_checkpoints must be at least 0, got -1."),
        (
            ["checkpoint_path=''"],
            "checkpoint_path is empty: give a folder, or null for no checkpoints.",
        ),
        (
            ["compare={}"],
            "this is the file of a comparison: give it to `sae-lens-alloc compare`.",
        ),
        (["lr_decay_steps=-1"], "lr_decay_steps must be at least 0, got -1."),
        (
            ["lr_warm_up_steps=50", "lr_decay_steps=51"],
            "lr_warm_up_steps (50) and lr_decay_steps (51) together exceed the 100 "
            "training steps.",
        ),
        (
            ["sae.feature_choice_steps=101"],
            "sae.feature_choice_steps (101) exceeds the 100 training steps.",
        ),
        (
            ["sae.aux_loss_decay_start=200"],
            "sae.aux_loss_decay_start (200) exceeds the 100 training steps.",
        ),
        (
            ["sae.k_start=50%", "sae.k_decay_steps=50%"],
            "sae.k_start must be a number of features or a share of k from '100%' on, got "
            "'50%'.",
        ),
        (["dtype=bf16"], "dtype 'bf16' is unknown, did you mean 'bfloat16'?"),
        (
            ["sae.dtype=float3"],
            "sae.dtype 'float3' is unknown, did you mean 'float32'?",
        ),
        (
            ["lr_scheduler_name=cosine"],
            "lr_scheduler_name 'cosine' is unknown, did you mean 'cosineannealing'?",
        ),
        (
            ["model_class_name=HookedTransformr"],
            "model_class_name 'HookedTransformr' is unknown, did you mean "
            "'HookedTransformer'?",
        ),
        (
            ["sae.architecture=mutual-choice"],
            "sae.architecture 'mutual-choice' is unknown, did you mean 'mutual_choice'?",
        ),
        (
            ["device=gpu"],
            "device must be a torch device such as 'cpu' or 'cuda:0', got 'gpu'.",
        ),
        (
            ["activations_mixing_fraction=1.5"],
            "activations_mixing_fraction must be between 0 and 1, got 1.5.",
        ),
        (
            ["lr_scheduler_name=cosineannealing", "lr_end=0", "lr_decay_steps=10"],
            "lr_decay_steps (10) would decay from lr_end = 0 to 0.",
        ),
        # raised by the configs' own validation
        (["sae.k=33"], "sae: k must be in (0, d_sae = 32], got 33."),
        (
            ["use_chat_formatting=true"],
            "use_chat_formatting and is_dataset_tokenized cannot both be True. Chat "
            "formatting requires raw conversation data.",
        ),
    ],
)
def test_impossible_run_is_one_sentence(
    config_path: Path, overrides: list[str], sentence: str
):
    assert error_of(config_path, *overrides) == sentence


def test_buffer_must_hold_a_batch(config_path: Path):
    # 2 contexts of 50 tokens hold exactly the 100 tokens of a batch
    load(config_path, "n_batches_in_buffer=2")
    assert error_of(config_path, "n_batches_in_buffer=1") == (
        "the activation buffer holds n_batches_in_buffer (1) times 50 tokens, fewer than "
        "train_batch_size_tokens (100): n_batches_in_buffer must be at least 2."
    )


def test_buffer_counts_the_positions_that_are_kept(config_path: Path):
    # 40 positions of each context are kept: 2 contexts hold 80 tokens
    sentence = error_of(config_path, "n_batches_in_buffer=2", "seqpos_slice=[5, -5]")
    assert sentence == (
        "the activation buffer holds n_batches_in_buffer (2) times 40 tokens, fewer than "
        "train_batch_size_tokens (100): n_batches_in_buffer must be at least 3."
    )
    load(config_path, "n_batches_in_buffer=3", "seqpos_slice=[5, -5]")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("  d_in: 8\n", "sae.d_in is missing."),
        ("  d_sae: 32\n", "sae.d_sae is missing."),
        (
            "  architecture: mutual_choice\n",
            "sae.architecture is missing; it may be abstopk, batchtopk, "
            "batchtopk_aux_zipf, feature_choice, gated, gated_aux_zipf, jumprelu, "
            "jumprelu_aux_zipf, matching_pursuit, matryoshka_batchtopk, "
            "matryoshka_batchtopk_aux_zipf, matryoshka_mutual_choice, mutual_choice, "
            "standard, standard_aux_zipf, topk, topk_aux_zipf.",
        ),
    ],
)
def test_missing_setting_is_named(config_path: Path, line: str, sentence: str):
    config_path.write_text(MINIMAL.replace(line, ""))
    assert error_of(config_path) == sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "the file must hold a mapping of settings."),
        ("- a\n- b\n", "the file must hold a mapping of settings."),
        (
            "a: b: c\n",
            "not valid YAML at line 1: mapping values are not allowed here.",
        ),
    ],
)
def test_file_without_settings_is_one_sentence(
    config_path: Path, content: str, sentence: str
):
    config_path.write_text(content)
    assert error_of(config_path) == sentence


def test_missing_file_is_reported_as_such(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "no.yaml")
