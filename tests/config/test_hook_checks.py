"""One hook for an SAE, two for a transcoder."""

from pathlib import Path

import pytest

from tests.config.run_files import error_of, load

TRANSCODER = (
    "sae.architecture=mutual_choice_transcoder",
    "sae.d_out=6",
    "hook_name_out=blocks.0.hook_mlp_out",
)


def test_a_transcoder_has_an_output(config_path: Path):
    cfg = load(config_path, *TRANSCODER)
    assert cfg.hook_name_out == "blocks.0.hook_mlp_out"
    assert (cfg.sae.d_out, cfg.sae.skip_connection) == (6, False)
    assert cfg.sae.apply_b_dec_to_input is False
    assert cfg.sae.feature_choice_steps == 25  # the recipe's


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("hook_name_out=blocks.0.hook_mlp_out",),
            "hook_name_out is 'blocks.0.hook_mlp_out', but sae.architecture 'mutual_choice' is no "
            "transcoder and reconstructs what it encodes: leave it out, or give a transcoder such "
            "as mutual_choice_transcoder.",
        ),
        (
            TRANSCODER[:2],
            "hook_name_out is missing: sae.architecture 'mutual_choice_transcoder' needs the hook "
            "of the activations that it reconstructs, such as 'blocks.0.hook_mlp_out'.",
        ),
        (
            (*TRANSCODER, "hook_name_out=blocks.0.hook_resid_pre"),
            "hook_name_out is 'blocks.0.hook_resid_pre', and so is hook_name: give two hooks, or "
            "an SAE such as mutual_choice.",
        ),
        ((TRANSCODER[0], TRANSCODER[2]), "sae.d_out is missing."),
        ((*TRANSCODER, "sae.d_out=0"), "sae.d_out must be at least 1, got 0."),
        (
            (*TRANSCODER, "hook_head_index=1"),
            "hook_head_index is 1, but a transcoder reads whole activations at two hooks of the "
            "language model: give hook_head_index=null.",
        ),
        (
            (
                *TRANSCODER,
                "use_cached_activations=true",
                "cached_activations_path=somewhere",
            ),
            "use_cached_activations is True, but a transcoder reads whole activations at two "
            "hooks of the language model: give use_cached_activations=false.",
        ),
        (
            (*TRANSCODER, "sae.normalize_activations=covariance_whitening"),
            "sae: normalize_activations must be 'none', 'expected_average_only_in' or "
            "'layer_norm' in a transcoder, whose output would need a whitening of its own, got "
            "'covariance_whitening'.",
        ),
    ],
)
def test_hooks_that_no_run_can_have(
    config_path: Path, overrides: tuple[str, ...], sentence: str
):
    assert error_of(config_path, *overrides) == sentence
