"""What is wrong in a file or an override is said in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.run_files import MINIMAL, error_of, load

BEYOND = "must be between -1e+15 and 1e+15"


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
            "lr_decay_steps (10) would decay from lr_end = 0 to 0: give a larger lr_end, or "
            "lr_decay_steps=0.",
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
            "batchtopk_aux_zipf, batchtopk_transcoder, feature_choice, "
            "feature_choice_transcoder, gated, gated_aux_zipf, jumprelu, jumprelu_aux_zipf, "
            "matching_pursuit, matryoshka_batchtopk, matryoshka_batchtopk_aux_zipf, "
            "matryoshka_mutual_choice, mutual_choice, mutual_choice_transcoder, "
            "refined_mutual_choice, standard, standard_aux_zipf, topk, topk_aux_zipf, topk_transcoder.",
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
