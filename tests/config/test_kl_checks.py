"""A finish by the KL divergence that cannot work is refused in one sentence."""

from pathlib import Path

import pytest

from sae_lens_alloc.training.summary import describe_run
from tests.config.run_files import error_of, load


def test_a_finish_may_be_a_share(config_path: Path):
    assert load(config_path).kl_finish == 0
    cfg = load(config_path, "kl_finish=5%", "kl_weight=0.1")
    assert (cfg.kl_finish, cfg.kl_weight) == (5, 0.1)
    assert "with the KL divergence in the last 5\n" in describe_run(cfg)
    assert "KL divergence" not in describe_run(load(config_path))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("kl_finish=101",),
            "kl_finish (101) exceeds the 100 training steps.",
        ),
        (("kl_finish=-1",), "kl_finish must be at least 0, got -1."),
        (
            ("kl_finish=101%",),
            "kl_finish must be a number of steps or a share of them from '0%' to '100%', got "
            "'101%'.",
        ),
        (("kl_weight=-0.5",), "kl_weight must be greater than 0, got -0.5."),
        (
            ("kl_finish=5", "sae={architecture: topk, d_in: 8, d_sae: 32, k: 2}"),
            "kl_finish needs an SAE with an allocation, such as mutual_choice, got 'topk': give "
            "kl_finish=0.",
        ),
        (
            (
                "kl_finish=5",
                "use_cached_activations=true",
                "cached_activations_path=some/folder",
            ),
            "kl_finish runs the language model on its text, but use_cached_activations is true, "
            "so that the run reads neither: give use_cached_activations=false or kl_finish=0.",
        ),
        (
            ("kl_finish=5", "hook_head_index=1"),
            "kl_finish replaces all activations at hook_name, but hook_head_index is 1, and the "
            "SAE has one head alone: give kl_finish=0.",
        ),
        (
            ("kl_finish=5", "context_size=200"),
            "kl_finish puts a whole context into a batch, but a context has 200 tokens and "
            "train_batch_size_tokens is 100: raise it, or give kl_finish=0.",
        ),
    ],
)
def test_what_cannot_work(config_path: Path, overrides: tuple[str, ...], sentence: str):
    assert error_of(config_path, *overrides) == sentence


def test_a_part_of_a_long_context_may_fit(config_path: Path):
    cfg = load(
        config_path, "kl_finish=5", "context_size=200", "seqpos_slice=[100, 180]"
    )
    assert cfg.kl_finish == 5
