"""The model card of some SAEs: what they are, their figures, and how to load them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from sae_lens import SAE

from sae_lens_alloc.activations.names import name_for_others
from sae_lens_alloc.sharing.known_figures import (
    KnownFigures,
    calibration_in_words,
    known_curve,
    known_figures,
)
from sae_lens_alloc.sharing.picture import density_svg
from sae_lens_alloc.sharing.saes_to_share import SharedSAE
from sae_lens_alloc.version import __version__

CARD_FILENAME = "README.md"
PICTURE_FILENAME = "density.svg"
# A legend with more lines leaves no room for the picture.
MOST_IN_PICTURE = 8
# What a reader wants to know of an SAE's config, by its name in SAELens.
CONFIG_FIELDS = ("d_in", "d_sae", "d_out", "k", "dtype", "normalize_activations")
METADATA_FIELDS = (
    *("model_name", "model_class_name", "hook_name", "hook_name_out"),
    *("hook_head_index", "dataset_path", "context_size", "prepend_bos"),
    *("exclude_special_tokens", "training_architecture"),
)
PATH_FIELDS = ("model_name", "dataset_path")


def write_card(folder: Path, shared: Sequence[SharedSAE], repo_id: str) -> list[str]:
    """
    Writes the model card, and its picture if densities are known.

    Args:
        folder: Where to write.
        shared: The SAEs.
        repo_id: Where they will be on the hub, as ORG/NAME.

    Returns:
        The names of the files written.
    """
    curves = {
        one.sae_id: curve
        for one in shared
        if (curve := known_curve(one.given)) is not None and curve[0]
    }
    curves = dict(list(curves.items())[:MOST_IN_PICTURE])
    if curves:
        svg = density_svg(curves)
        (folder / PICTURE_FILENAME).write_text(svg, encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("sae_lens_alloc", "sharing"),
        autoescape=False,  # it is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    models = _common(shared, "model_name")
    card = environment.get_template("card.md.jinja").render(
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        base_models=_on_the_hub(models),
        datasets=_on_the_hub(_common(shared, "dataset_path")),
        models=[name_for_others(model) for model in models],
        hooks=_common(shared, "hook_name"),
        saes=[
            {
                "id": one.sae_id,
                "architecture": one.sae.cfg.architecture(),
                "n_features": one.sae.cfg.d_sae,
                "figures": _in_words(known_figures(one.sae, one.given)),
                "calibration": calibration_in_words(one.sae),
                "config": _config(one.sae),
                "training": _training(one.sae),
            }
            for one in shared
        ],
        picture=PICTURE_FILENAME if curves else None,
        version=__version__,
    )
    (folder / CARD_FILENAME).write_text(card, encoding="utf-8")
    return [CARD_FILENAME, *([PICTURE_FILENAME] if curves else [])]


def _common(shared: Sequence[SharedSAE], field: str) -> list[str]:
    """The values of a field of the metadata, each once."""
    values = [one.sae.cfg.metadata[field] for one in shared]
    return list(dict.fromkeys(str(value) for value in values if value))


def _on_the_hub(names: Sequence[str]) -> list[str]:
    """Names of the form that the hub's metadata have. It refuses a card with others."""
    return [name for name in names if name.count("/") == 1 and not Path(name).exists()]


def _in_words(figures: KnownFigures) -> dict[str, str]:
    def in_form(value: float | None, form: str) -> str:
        return "–" if value is None or not math.isfinite(value) else form.format(value)

    n_tokens = in_form(figures.n_tokens, "{:,}")
    return {
        "l0": in_form(figures.l0, "{:.2f}"),
        "explained_variance": in_form(figures.explained_variance, "{:.4f}"),
        "ce_recovered": in_form(figures.ce_recovered, "{:.4f}"),
        "dead_features": in_form(figures.dead_features, "{:,}"),
        "measured_on": f"{n_tokens}: {figures.text}" if figures.n_tokens else "–",
    }


def _config(sae: SAE[Any]) -> dict[str, Any]:
    config, metadata = sae.cfg.to_dict(), sae.cfg.metadata
    fields = {name: config.get(name) for name in CONFIG_FIELDS}
    fields |= {name: metadata[name] for name in METADATA_FIELDS}
    for name in PATH_FIELDS:
        if fields[name]:
            fields[name] = name_for_others(str(fields[name]))
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _training(sae: SAE[Any]) -> dict[str, Any]:
    """The settings of the architecture that it was trained with, and versions."""
    metadata = sae.cfg.metadata
    provenance: dict[str, Any] = metadata.provenance or {}
    return {
        **(metadata.training_architecture_details or {}),
        **{
            name: provenance[name]
            for name in ("seed", "git_commit")
            if provenance.get(name) is not None
        },
        **provenance.get("versions", {}),
    }


def _cell(value: Any) -> str:
    """A value for the cell of a table, in which a bar or the end of a line would end it."""
    return " ".join(str(value).replace("|", "\\|").split())
