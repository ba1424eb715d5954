"""From a YAML file with SAELens' own keys to an AllocSAERunnerConfig that has been checked."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

from sae_lens.config import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig, SAEMetadata

from sae_lens_alloc.activations.buffer_setting import with_known_buffer_setting
from sae_lens_alloc.config.paths import settle_paths
from sae_lens_alloc.config.run_checks import check_run, check_value
from sae_lens_alloc.config.run_config import AllocSAERunnerConfig
from sae_lens_alloc.config.yaml_file import parse_value, read_mapping
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.mutual_choice_sae import with_schedule
from sae_lens_alloc.shares import (
    BUDGET_SHARE_KEY,
    SHARE_KEYS,
    multiple_of_k,
    share_of,
)
from sae_lens_alloc.typed_values import check_choice, convert, in_words, nearest, shown


def load_runner_config(
    path: str | Path, overrides: Sequence[str] = ()
) -> AllocSAERunnerConfig[Any]:
    """
    Reads a training run from a YAML file and checks it before any model is loaded.

    The file has the fields of AllocSAERunnerConfig at top level, those of
    LoggingConfig under `logger:` and those of a training SAE under `sae:`, together with
    `architecture:`. Without a `logger:` section nothing is logged to W&B. Step counts may be
    shares of the training steps, such as "75%". `k_start` may be a share of k, such as "200%".
    The `runner_cfg.json` that SAELens saves beside an SAE is such a file, too.

    Args:
        path: The YAML file.
        overrides: Settings that replace the file's, such as "lr=1e-3" or "sae.k=16".

    Raises:
        ValueError: if a key is unknown, a value has the wrong type, or the run could not work,
            in one sentence that names the file and the setting.
        FileNotFoundError: if there is no such file.
    """
    with named_errors(path, overrides):
        return build_training_config(read_settings(path, overrides))


def load_fine_tuning_config(
    path: str | Path, overrides: Sequence[str], source: SAEConfig
) -> tuple[AllocSAERunnerConfig[Any], dict[str, Any]]:
    """
    Reads a fine-tuning run as `load_runner_config` reads a training run, with two differences.
    `sae.d_in`, `sae.d_sae` and `sae.k` may be left out, since the SAE to start from has them.
    The learning rate warms up over the first tenth of the steps unless the file says otherwise.
    The first steps, without a history of gradients, would otherwise undo what was learned.

    Args:
        path: The YAML file.
        overrides: Settings that replace the file's.
        source: Config of the SAE to start from.

    Returns:
        The run, and the fields of its SAE that the file gives beside d_in, d_sae and the
        architecture.

    Raises:
        ValueError: as `load_runner_config`, and if d_in or d_sae are not those of the source.
        FileNotFoundError: if there is no such file.
    """
    with named_errors(path, overrides):
        settings = {"lr_warm_up_steps": "10%", **read_settings(path, overrides)}
        given = _mapping(settings, "sae")
        size = {"d_in": source.d_in, "d_sae": source.d_sae}
        # a k that is not known is measured once there are activations
        known_k = getattr(source, "k", None) or source.metadata.l0 or 1.0
        cfg = build_runner_config({**settings, "sae": {"k": known_k, **size, **given}})
        for name, value in size.items():
            if getattr(cfg.sae, name) != value:
                raise ValueError(
                    f"sae.{name} is {getattr(cfg.sae, name)}, but that of the SAE to start "
                    f"from is {value}: leave it out."
                )
    chosen = given.keys() - size.keys() - {"architecture"}
    return cfg, {name: getattr(cfg.sae, name) for name in sorted(chosen)}


@contextmanager
def named_errors(
    path: str | Path, overrides: Sequence[str]
) -> Generator[None, None, None]:
    """Puts the file and the overrides in front of the message of a ValueError."""
    source = " with ".join([str(path), *([", ".join(overrides)] if overrides else [])])
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_settings(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a YAML file with the overrides put in, such as "sae.k=16"."""
    settings = read_mapping(path)
    for override in overrides:
        _apply_override(settings, override)
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    dotted_key, equals, text = override.partition("=")
    if not dotted_key or not equals:
        raise ValueError(f"the override {override!r} does not look like key=value.")
    *sections, key = dotted_key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ValueError(
                f"the override {override!r} needs {section!r} to be a mapping, "
                f"but it is {shown(settings)}."
            )
    settings[key] = parse_value(text)


def build_training_config(
    settings: dict[str, Any],
) -> AllocSAERunnerConfig[Any]:
    """`build_runner_config` for a training from random weights, with its schedule filled in."""
    cfg = build_runner_config(settings)
    cfg.sae = with_schedule(cfg.sae, cfg.total_training_steps)
    check_run(cfg)  # again, with the schedule
    return cfg


def build_runner_config(
    settings: dict[str, Any],
) -> AllocSAERunnerConfig[Any]:
    """
    A training run from settings laid out as in the file that load_runner_config reads.

    Raises:
        ValueError: if a key is unknown, a value has the wrong type, or the run could not work,
            in one sentence that names the setting.
    """
    if "compare" in settings:
        raise ValueError(
            "this is the file of a comparison: give it to `sae-lens-alloc compare`."
        )
    sae_settings = dict(_mapping(settings, "sae"))
    # SAELens logs to W&B by default, and without a login fails after the model is loaded
    logger_settings = (
        _mapping(settings, "logger")
        if "logger" in settings
        else {"log_to_wandb": False}
    )
    sae_class = sae_config_class(sae_settings.pop("architecture", None))
    metadata = sae_settings.pop("metadata", None)

    top_hints = _hints(AllocSAERunnerConfig)
    logger_hints = _hints(LoggingConfig)
    sae_hints = _hints(sae_class)
    valid_keys = [
        *top_hints,
        *(f"logger.{name}" for name in logger_hints),
        *(f"sae.{name}" for name in ("architecture", *sae_hints)),
    ]
    top_settings = with_known_buffer_setting(
        {k: v for k, v in settings.items() if k not in ("sae", "logger")}
    )
    _check_keys("", top_settings, valid_keys)
    _check_keys("logger.", logger_settings, valid_keys)
    _check_keys("sae.", sae_settings, valid_keys)

    steps = _training_steps(top_settings)
    top = _typed("", top_settings, top_hints, steps)
    logger = LoggingConfig(**_typed("logger.", logger_settings, logger_hints, steps))
    sae = _sae_config(
        sae_class, _typed("sae.", sae_settings, sae_hints, steps), metadata
    )
    for name in ("adam_beta1", "adam_beta2"):
        if name in top:  # Adam refuses a pair of an integer and a float
            top[name] = float(top[name])
    cfg = AllocSAERunnerConfig(sae=sae, logger=logger, **top)
    settle_paths(cfg)
    check_run(cfg)
    return cfg


def _sae_config(sae_class: type[Any], values: dict[str, Any], metadata: Any) -> Any:
    """The config of the SAE, whose own errors name the section."""
    for name in _required(sae_class):
        if name not in values:
            raise ValueError(f"sae.{name} is missing.")
    try:
        sae = sae_class(**values)
    except (ValueError, TypeError, AssertionError, ArithmeticError) as error:
        raise ValueError(f"sae: {error}") from error
    if metadata is not None:
        sae.metadata = SAEMetadata(**_typed_value("sae.metadata", metadata, dict))
    return sae


def _mapping(settings: dict[str, Any], section: str) -> dict[str, Any]:
    value = settings.get(section, {})
    if not isinstance(value, dict):
        raise ValueError(f"{section} must be a mapping, got {shown(value)}.")
    return value


def sae_config_class(architecture: Any) -> type[Any]:
    """The config class of an architecture. Raises ValueError if there is no such architecture."""
    if architecture is None:
        raise ValueError(
            "sae.architecture is missing; it may be "
            f"{', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}."
        )
    check_choice("sae.architecture", architecture, SAE_TRAINING_CLASS_REGISTRY)
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def _hints(config_class: type[Any]) -> dict[str, Any]:
    """The type hint of each field that a file may set."""
    hints = get_type_hints(config_class)
    return {
        field.name: hints[field.name]
        for field in fields(config_class)
        if field.name not in ("sae", "logger", "metadata")
    }


def _required(config_class: type[Any]) -> list[str]:
    return [
        field.name
        for field in fields(config_class)
        if field.default is MISSING and field.default_factory is MISSING
    ]


def _check_keys(prefix: str, settings: dict[str, Any], valid_keys: list[str]) -> None:
    for name in settings:
        key = f"{prefix}{name}"
        if key not in valid_keys:
            # the right name in the wrong section is more likely than a misspelling
            same_name = [k for k in valid_keys if k.split(".")[-1] == str(name)]
            near = same_name[0] if same_name else nearest(key, valid_keys)
            raise ValueError(f"unknown key {shown(key)}, did you mean {near!r}?")


def _training_steps(settings: dict[str, Any]) -> Fraction:
    """Training steps of the run, not rounded, so that shares of them are exact."""
    defaults = AllocSAERunnerConfig
    names = {
        "training_tokens": defaults.training_tokens,
        "train_batch_size_tokens": defaults.train_batch_size_tokens,
    }
    given = {name: settings[name] for name in names if name in settings}
    counts = {**names, **_typed("", given, dict.fromkeys(names, int), Fraction(0))}
    return Fraction(counts["training_tokens"], counts["train_batch_size_tokens"])


def _typed(
    prefix: str, settings: dict[str, Any], hints: dict[str, Any], steps: Fraction
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in SHARE_KEYS and isinstance(value, str):
            value = share_of(steps, key, value)
        elif key == BUDGET_SHARE_KEY and isinstance(value, str):
            k = settings.get("k", AllocationTrainingSAEConfig.k)
            value = multiple_of_k(_typed_value("sae.k", k, float), key, value)
        values[name] = _typed_value(key, value, hints[name])
    return values


def _typed_value(key: str, value: Any, hint: Any) -> Any:
    try:
        converted = convert(value, hint)
    except TypeError:
        raise ValueError(
            f"{key} must be {in_words(hint)}, got {shown(value)}."
        ) from None
    check_value(key, converted)
    return converted
