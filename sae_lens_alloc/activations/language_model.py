"""The language model of a run: how it is loaded, and what is known without its weights."""

import inspect
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.load_model import HookedProxyLM, load_model
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from transformer_lens import HookedTransformer
from transformer_lens.HookedTransformer import HookedRootModule
from transformer_lens.loading_from_pretrained import (
    OFFICIAL_MODEL_NAMES,
    get_official_model_name,
    get_pretrained_model_config,
)
from transformers import AutoConfig, AutoModelForCausalLM

from sae_lens_alloc.activations.hook_names import hook_name_out_of, hook_names_of
from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.progress import announced
from sae_lens_alloc.saes.rows import output_width
from sae_lens_alloc.typed_values import nearest, shown

# No model has this number of heads, so positions and heads cannot be confused.
N_PROBED_TOKENS = 7


def load_language_model(cfg: LanguageModelSAERunnerConfig[Any]) -> HookedRootModule:
    """
    Loads the language model as SAELens' runner does.

    Raises:
        ValueError: if it cannot be loaded, in one sentence that names the settings.
    """
    _require_folder(cfg.model_name)
    try:
        with announced("loading the language model"):
            return load_model(
                cfg.model_class_name,
                cfg.model_name,
                device=cfg.llm_device,
                model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
                hook_names=hook_names_of(cfg),
            )
    except Exception as error:  # each kind of model has errors of its own
        raise ValueError(_cannot_load(cfg, error)) from error


def find_language_model(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Finds the language model, and checks hook, width and positions without its weights. If they
    cannot be known without weights, `check_language_model` checks them once the model is loaded.

    Raises:
        ValueError: if the model cannot be found or does not fit, in one sentence that names the
            setting.
    """
    _require_folder(cfg.model_name)
    with announced("finding the language model"):
        model = _without_weights(cfg)
    if model is not None:
        check_language_model(model, cfg)


@torch.no_grad()
def check_language_model(
    model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """
    Runs the model on a few tokens, and compares the activations at the hook with the config.

    Args:
        model: The language model. On torch's meta device nothing is computed.
        cfg: The run.

    Raises:
        ValueError: if the model has no such hook or head, its activations have another width
            than `cfg.sae.d_in`, those of a transcoder's output another than `cfg.sae.d_out`, or it has fewer positions than a context.
    """
    _check_tokens(model, cfg)
    if cfg.use_cached_activations:
        return  # the model gives no activations
    _require_hooks(list(model.hook_dict), cfg)
    shape = _shape_at_hook(model, cfg, "hook_name")
    if shape is None:
        return
    if hook_name_out_of(cfg) is not None:
        _check_output(model, cfg)
    where = f"hook_name {cfg.hook_name!r}"
    head = cfg.hook_head_index
    if head is not None:
        if len(shape) != 4 or not -shape[2] <= head < shape[2]:
            heads = shape[2] if len(shape) == 4 else 0
            raise ValueError(
                f"hook_head_index is {head}, but {where} has {heads} heads."
            )
        width, where = shape[3], f"head {head} of {where}"
    else:
        width = shape[2:].numel()
    if width != cfg.sae.d_in:
        raise ValueError(
            f"sae.d_in is {cfg.sae.d_in}, but {where} has {width} dimensions: give "
            f"sae.d_in={width}, or another hook."
        )


def _require_folder(name: str) -> None:
    """Raises ValueError if the name is a path (hub names have at most one slash) to no folder."""
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name
    if not name:
        raise ValueError("model_name is missing.")
    if is_path and not Path(name).is_dir():
        raise ValueError(f"model_name is {name!r}, but there is no such folder.")


def _without_weights(
    cfg: LanguageModelSAERunnerConfig[Any],
) -> HookedRootModule | None:
    """The model on torch's meta device, None if it cannot be built without its weights."""
    try:
        if cfg.model_class_name == "AutoModelForCausalLM":
            config = _hugging_face_config(cfg)
        elif cfg.model_class_name == "HookedTransformer":
            config = _transformer_lens_config(cfg)
        else:
            return None
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load(cfg, error)) from error
    except Exception:
        return None  # the loader may manage, and reports the error if not
    try:
        with torch.device("meta"):
            if isinstance(config, dict):
                return HookedTransformer(config, move_to_device=False).eval()
            model = AutoModelForCausalLM.from_config(config).eval()
    except Exception:
        return None  # the model brings code of its own, or code for a device
    _require_hooks([name for name, _ in model.named_modules() if name], cfg)
    tokenizer: Any = None  # not needed without text
    return HookedProxyLM(model, tokenizer, hook_names=hook_names_of(cfg))


def _hugging_face_config(cfg: LanguageModelSAERunnerConfig[Any]) -> Any:
    config: Any = AutoConfig.from_pretrained(
        cfg.model_name,
        return_unused_kwargs=True,
        **(cfg.model_from_pretrained_kwargs or {}),
    )
    return config[0]


def _transformer_lens_config(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    known = inspect.signature(get_pretrained_model_config).parameters.keys()
    given = cfg.model_from_pretrained_kwargs or {}
    try:
        get_official_model_name(cfg.model_name)
    except ValueError:
        near = nearest(cfg.model_name, OFFICIAL_MODEL_NAMES)
        raise ValueError(
            f"TransformerLens knows no such model, did you mean {near!r}? Others, and "
            "folders, are loaded with model_class_name=AutoModelForCausalLM."
        ) from None
    chosen = {name: given[name] for name in given if name in known - {"dtype"}}
    config = get_pretrained_model_config(cfg.model_name, **chosen)
    # a tokenizer would be looked for on the hub
    return {
        **config.to_dict(),
        "device": "meta",
        "n_devices": 1,
        "tokenizer_name": None,
    }


def _check_tokens(
    model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Raises ValueError if the run uses positions or token ids that the model has no embedding for."""
    if isinstance(model, HookedProxyLM):
        config: Any = getattr(model.model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        names = ("max_position_embeddings", "vocab_size")
    else:
        config, names = getattr(model, "cfg", None), ("n_ctx", "d_vocab")
    n_positions, n_token_ids = (getattr(config, name, None) for name in names)
    if isinstance(n_positions, int) and cfg.context_size > n_positions > 0:
        raise ValueError(
            f"context_size is {cfg.context_size}, but {cfg.model_name} has {n_positions} "
            f"positions: give context_size={n_positions} or less."
        )
    separator = cfg.sequence_separator_token
    if (
        isinstance(separator, int)
        and isinstance(n_token_ids, int)
        and not 0 <= separator < n_token_ids
    ):
        raise ValueError(
            f"sequence_separator_token is {separator}, but the token ids of "
            f"{cfg.model_name} are 0 to {n_token_ids - 1}."
        )


def _require_hooks(names: list[str], cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    for key, hook in zip(
        ("hook_name", "hook_name_out"), hook_names_of(cfg), strict=False
    ):
        if hook not in names:
            hint = f", did you mean {nearest(hook, names)!r}?" if names else "."
            raise ValueError(
                f"{key} {hook!r} is not in {cfg.model_name} as "
                f"{cfg.model_class_name}{hint}"
            )


def _check_output(
    model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Raises ValueError if the output of a transcoder has another width than the config says."""
    shape = _shape_at_hook(model, cfg, "hook_name_out")
    d_out = output_width(cfg.sae)
    width = None if shape is None else shape[2:].numel()
    if width is not None and width != d_out:
        raise ValueError(
            f"sae.d_out is {d_out}, but hook_name_out {hook_name_out_of(cfg)!r} has {width} "
            f"dimensions: give sae.d_out={width}, or another hook."
        )


def _shape_at_hook(
    model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any], key: str
) -> torch.Size | None:
    """
    Shape of the activations of one context: (1, positions, width) or (1, positions, heads,
    width). None if the model cannot run without its weights.
    """
    hook: str = getattr(cfg, key)
    n_tokens = min(N_PROBED_TOKENS, cfg.context_size)
    device = next(model.parameters()).device
    tokens = torch.zeros(1, n_tokens, dtype=torch.long, device=device)
    try:
        cache: Any = model.run_with_cache(
            tokens,
            names_filter=[hook],
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook),
            prepend_bos=False,
            **cfg.model_kwargs,
        )[1]
        shape = cache[hook].shape
    except KeyError:
        raise ValueError(
            f"{key} {hook!r} gives no activations when {cfg.model_name} runs."
        ) from None
    except Exception as error:
        if device.type == "meta" and isinstance(error, RuntimeError):
            return None  # the model looks at values, as routers of experts do
        kwargs = cfg.model_kwargs
        given = f" with model_kwargs {shown(kwargs)}" if kwargs else ""
        raise ValueError(
            f"{key} {hook!r} cannot be read from {cfg.model_name}{given}: "
            f"{in_one_sentence(error)}"
        ) from error
    if len(shape) < 3 or shape[:2] != (1, n_tokens):
        raise ValueError(
            f"{key} {hook!r} does not give one vector for each position: for "
            f"{n_tokens} tokens its shape is {tuple(shape)}."
        )
    return shape


def _cannot_load(cfg: LanguageModelSAERunnerConfig[Any], error: Exception) -> str:
    kwargs = cfg.model_from_pretrained_kwargs
    given = f" and model_from_pretrained_kwargs {shown(kwargs)}" if kwargs else ""
    return (
        f"the language model cannot be loaded with model_class_name "
        f"{cfg.model_class_name!r}, model_name {cfg.model_name!r}{given}: "
        f"{in_one_sentence(error)}"
    )
