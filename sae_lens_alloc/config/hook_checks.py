"""Checks of the hooks of a run: one for an SAE, two for a transcoder."""

from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.hook_names import hook_name_out_of
from sae_lens_alloc.saes.rows import output_width


def check_hooks(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Raises ValueError if a transcoder has no output of its own, or an SAE has one."""
    out, sae = hook_name_out_of(cfg), cfg.sae
    if output_width(sae) is None:
        if out is not None:
            raise ValueError(
                f"hook_name_out is {out!r}, but sae.architecture {sae.architecture()!r} is no "
                "transcoder and reconstructs what it encodes: leave it out, or give a transcoder "
                "such as mutual_choice_transcoder."
            )
        return
    if not out:
        raise ValueError(
            f"hook_name_out is missing: sae.architecture {sae.architecture()!r} needs the hook "
            "of the activations that it reconstructs, such as 'blocks.0.hook_mlp_out'."
        )
    if out == cfg.hook_name:
        raise ValueError(
            f"hook_name_out is {out!r}, and so is hook_name: give two hooks, or an SAE such as "
            "mutual_choice."
        )
    for key, value, only in (
        ("hook_head_index", cfg.hook_head_index, None),
        ("use_cached_activations", cfg.use_cached_activations, False),
    ):
        if value != only:
            raise ValueError(
                f"{key} is {value!r}, but a transcoder reads whole activations at two hooks of "
                f"the language model: give {key}={'null' if only is None else 'false'}."
            )
