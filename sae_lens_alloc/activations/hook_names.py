"""The hooks of a run: one, or, of a transcoder, two."""

from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig


def hook_name_out_of(cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
    """The hook whose activations a transcoder reconstructs. SAELens' own configs have none."""
    return getattr(cfg, "hook_name_out", None)


def hook_names_of(cfg: LanguageModelSAERunnerConfig[Any]) -> list[str]:
    """The hooks whose activations a run needs, in the order of a row."""
    out = hook_name_out_of(cfg)
    return [cfg.hook_name] if out is None else [cfg.hook_name, out]
