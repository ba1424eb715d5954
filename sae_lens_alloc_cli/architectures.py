"""`sae-lens-alloc architectures`: what `sae.architecture` may be, and the fields of each."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAEConfig


def architectures(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One of them, with the fields of every SAE, too."
        ),
    ] = None,
) -> None:
    """
    List the architectures that can be trained, with their own fields and defaults.

    Each is for `sae.architecture` of a YAML file, and its fields for `sae:`.

    \b
    Examples:
      sae-lens-alloc architectures
      sae-lens-alloc architectures mutual_choice
    """
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import TrainingSAEConfig

    from sae_lens_alloc.typed_values import check_choice
    from sae_lens_alloc_cli.endings import one_sentence_errors

    with one_sentence_errors():
        if name is not None:
            check_choice("the architecture", name, SAE_TRAINING_CLASS_REGISTRY)
    shared = set() if name else set(TrainingSAEConfig.__dataclass_fields__)
    for known in sorted(SAE_TRAINING_CLASS_REGISTRY) if name is None else [name]:
        sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[known]
        typer.echo(f"{known}\n    {_first_sentence(sae_class)}")
        for line in _fields(config_class, shared):
            typer.echo(f"      {line}")


def _first_sentence(cls: type[Any]) -> str:
    paragraph = (vars(cls).get("__doc__") or cls.__name__).strip().split("\n\n")[0]
    text = " ".join(paragraph.split())
    return text.split(". ")[0].rstrip(".") + "."


def _fields(config_class: "type[TrainingSAEConfig]", left_out: set[str]) -> list[str]:
    """The fields of a config, with their defaults."""
    from dataclasses import MISSING, fields

    lines: list[str] = []
    for field in fields(config_class):
        if field.name in left_out or field.name == "metadata":
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        lines.append(
            f"{field.name} (required)"
            if default is MISSING
            else f"{field.name} = {default!r}"
        )
    return lines
