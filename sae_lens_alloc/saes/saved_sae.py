"""SAEs read from a folder, or one sentence about which file is damaged and how."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    handle_config_defaulting,
    read_sae_components_from_disk,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE
from sae_lens.util import str_to_dtype
from safetensors import safe_open

from sae_lens_alloc.distributed.stored_tensors import METADATA_FILENAME
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.progress import announced
from sae_lens_alloc.saes.checkpoint_for_inference import CheckpointForInference
from sae_lens_alloc.saes.checkpoint_weights import weights_as_saved
from sae_lens_alloc.saes.split_weights import INDEX_FILENAME, read_split_weights
from sae_lens_alloc.typed_values import convert, in_words, shown

# Every training config has this field and no inference config does, while some names, such as
# topk, stand for one architecture of each kind.
TRAINING_ONLY_FIELD = "decoder_init_norm"
# Sizes of which a tensor can be made.
LARGEST_SIZE = 2**31


def load_sae(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """
    Loads an SAE, an inference SAE or a training checkpoint, whatever SAELens saved, and what
    ranks that share an SAE saved: checkpoints, and SAEs in several files.

    Args:
        folder: The folder of cfg.json and the weights. Not changed.
        device: Where to load it.

    Raises:
        ValueError: in one sentence that names the file and what is wrong with it: missing,
            not readable, of unknown settings, or of weights that are not finite or not
            those of the settings. Only thresholds may be infinite, of silenced features.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder.")
    weights = _weights_filename(folder)
    for filename in (SAE_CFG_FILENAME, weights):
        if not (folder / filename).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no SAE of SAELens: {filename} is missing."
            )
    cfg, config = _checked_cfg(folder / SAE_CFG_FILENAME)
    kind = TrainingSAE if _is_training(cfg) else SAE

    def read(
        path: str | Path, device: str, cfg_overrides: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        settings = {**cfg, "device": device, **(cfg_overrides or {})}
        return settings, _checked_weights(
            Path(path) / weights, settings, config, device
        )

    try:
        with announced("loading the SAE"):
            return kind.load_from_disk(folder, device, converter=read)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"{str(folder)!r} cannot be loaded: {as_reason(error)}."
        ) from error


def trained_k(sae: SAE[Any]) -> float | None:
    """The features per token that an SAE was trained for, as far as it says."""
    details = sae.cfg.metadata.training_architecture_details
    recorded = details.get("k") if isinstance(details, Mapping) else None
    return number_or_none(getattr(sae.cfg, "k", None)) or number_or_none(recorded)


def number_or_none(value: Any) -> float | None:
    """A finite number above 0 as it is, and None for anything else, as metadata may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and value > 0 else None


def read_json_mapping(path: Path) -> dict[str, Any]:
    """
    The mapping in a JSON file.

    Raises:
        ValueError: in one sentence that names the file, if it holds something else or cannot
            be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged, since it holds no JSON: {as_reason(error)}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{str(path)!r} is damaged: it must hold a mapping, not {shown(content)}."
        )
    return content


def _weights_filename(folder: Path) -> str:
    """The file to begin with: of one file, of an SAE in several, or of a checkpoint of ranks."""
    for filename in (METADATA_FILENAME, INDEX_FILENAME):
        if (folder / filename).is_file():
            return filename
    return SAE_WEIGHTS_FILENAME


def _is_training(cfg: Mapping[str, Any]) -> bool:
    return TRAINING_ONLY_FIELD in cfg


def _registry(cfg: Mapping[str, Any]) -> Mapping[str, tuple[Any, Any]]:
    if _is_training(cfg):
        return SAE_TRAINING_CLASS_REGISTRY
    return {
        name: classes
        for name, classes in SAE_CLASS_REGISTRY.items()
        if classes[0] is not CheckpointForInference
    }


def _checked_cfg(path: Path) -> tuple[dict[str, Any], SAEConfig]:
    """The settings of an SAE, in SAELens' present form and each of its type; and its config."""
    cfg = read_json_mapping(path)
    wrong = f"{str(path)!r} is not the config of an SAE"
    if not isinstance(cfg.get("metadata", {}), dict):
        raise ValueError(
            f"{wrong}: metadata must be a mapping, not {shown(cfg['metadata'])}."
        )
    try:
        cfg = handle_config_defaulting(cfg)
    except Exception as error:  # whatever a config of an old version makes SAELens do
        raise ValueError(f"{wrong}: {as_reason(error)}.") from error
    architecture = cfg.get("architecture")
    if not isinstance(architecture, str) or architecture not in _registry(cfg):
        kind = "training" if _is_training(cfg) else "inference"
        raise ValueError(
            f"{wrong}: there is no {kind} architecture {shown(architecture)}."
        )
    config_class = _registry(cfg)[architecture][1]
    required = {f.name for f in fields(config_class) if _has_no_default(f)} | {"dtype"}
    if missing := required - cfg.keys():
        raise ValueError(f"{wrong}: {_names(missing)} missing.")
    hints = get_type_hints(config_class)
    for name, hint in hints.items():
        if name in cfg and name != "metadata":
            try:
                cfg[name] = convert(cfg[name], hint)
            except TypeError:
                raise ValueError(
                    f"{wrong}: {name} must be {in_words(hint)}, not {shown(cfg[name])}."
                ) from None
    try:
        str_to_dtype(cfg.get("dtype", "float32"))
        config = config_class.from_dict({**cfg, "device": "cpu"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wrong}: {as_reason(error)}.") from error
    k = getattr(config, "k", 1)
    for name, size in {"d_in": config.d_in, "d_sae": config.d_sae, "k": k}.items():
        if not 0 < size < LARGEST_SIZE:
            raise ValueError(
                f"{wrong}: {name} must be above 0 and below 2^31, not {shown(size)}."
            )
    if k > config.d_sae:
        raise ValueError(
            f"{wrong}: k is {k}, but there are only {config.d_sae} features."
        )
    return cfg, config


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _checked_weights(
    path: Path, cfg: dict[str, Any], config: SAEConfig, device: str
) -> dict[str, torch.Tensor]:
    """The tensors of an SAE: those of its architecture, of their shapes, and finite."""
    wrong = f"{str(path)!r} does not hold the weights of the {cfg['architecture']} SAE"
    try:
        dtypes, weights = _read_weights(path, cfg, device)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # safetensors' own, and what SAELens does with odd tensors
        raise ValueError(f"{str(path)!r} is damaged: {as_reason(error)}.") from error
    try:
        sae_class = _registry(cfg)[cfg["architecture"]][0]
        expected, found = _expected_weights(sae_class, config, weights)
    except Exception as error:  # whatever odd tensors make an architecture do
        raise ValueError(f"{wrong} of its cfg.json: {as_reason(error)}.") from error
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{wrong} of its cfg.json: {_names(missing)} missing.")
    if extra := found.keys() - expected.keys():
        raise ValueError(f"{wrong} of its cfg.json: {_names(extra)} unknown to it.")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{wrong} of its cfg.json: {name} is of shape {tuple(tensor.shape)}, not "
                f"{tuple(expected[name].shape)}."
            )
        dtype = dtypes.get(name, "F32")
        if expected[name].is_floating_point() and "F" not in dtype:
            raise ValueError(
                f"{wrong} of its cfg.json: {name} is of type {dtype}, no floating-point one."
            )
        allowed = tensor.isfinite()
        if "threshold" in name:  # infinite of a feature that is silenced
            allowed = allowed | (tensor == math.inf)
        if not allowed.all():
            raise ValueError(
                f"{str(path)!r} is damaged: {name} holds "
                f"{int((~allowed).sum()):,} values that are NaN or infinite."
            )
    return weights


def _read_weights(
    path: Path, cfg: dict[str, Any], device: str
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What safetensors calls the types of the tensors, as far as it has them, and the tensors."""
    if path.name == METADATA_FILENAME:
        trained = TrainingSAE.from_dict({**cfg, "device": "meta"})
        return {}, weights_as_saved(trained, path.parent)
    if path.name == INDEX_FILENAME:
        return read_split_weights(path.parent, str_to_dtype(cfg["dtype"]), device)
    with safe_open(path, framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    _, weights = read_sae_components_from_disk(cfg, path, device)
    return dtypes, weights


def _expected_weights(
    sae_class: type[SAE[Any]], config: SAEConfig, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that an SAE of these settings has, without memory, and those it is given."""
    config.device = "meta"
    sae = sae_class(config)
    found = dict(weights)
    sae.process_state_dict_for_loading(found)
    return sae.state_dict(), found


def _names(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
