"""SAEs that one already has, to be compared: loaded, named, and of the same activations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE

from sae_lens_alloc.saes.rows import output_width
from sae_lens_alloc.training.source_sae import inference_sae, load_source_sae

# What SAEs have to share to be measured on the same activations.
SAME_METADATA = ("model_name", "hook_name", "hook_name_out", "hook_head_index")


def load_given_saes(
    names: Sequence[str], device: str, same: Sequence[str] = SAME_METADATA
) -> dict[str, SAE[Any]]:
    """
    Loads SAEs by their names, and finds a short name for each.

    Args:
        names: Folders with an SAE or a training checkpoint, or RELEASE:ID, or RELEASE/ID.
        device: Where to load them.
        same: What their metadata must not say differently.

    Returns:
        Inference SAEs that take flat activations, by the shortest name that tells them apart.

    Raises:
        ValueError: if one of them cannot be loaded, or they are of different activations.
    """
    if len(set(names)) < len(names):
        raise ValueError("the same SAE is given twice: give each once.")
    shown = short_names(names)
    saes = {shown[name]: _load(name, device) for name in names}
    require_same_activations(saes, same)
    return saes


def short_names(names: Sequence[str]) -> dict[str, str]:
    """For each name the shortest end of it, in whole parts of a path, that no other one has."""
    parts = {name: _parts(name) for name in names}
    found: dict[str, str] = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        ends = (own[-n:] for n in range(1, len(own) + 1))
        end = next(
            (end for end in ends if all(other[-len(end) :] != end for other in others)),
            own,
        )
        found[name] = "/".join(end)
    return found


def require_same_activations(
    saes: Mapping[str, SAE[Any]], same: Sequence[str] = SAME_METADATA
) -> None:
    """
    Raises ValueError if SAEs do not encode, or reconstruct, the same activations, as far as they
    say: they are of other widths, or say different things of what is named in `same`.
    """
    first, *others = saes.items()
    for name, sae in others:
        widths = [(one.cfg.d_in, output_width(one.cfg)) for one in (first[1], sae)]
        facts = {"d_in and d_out": widths} | {
            key: [one.cfg.metadata[key] for one in (first[1], sae)] for key in same
        }
        for key, (of_first, its) in facts.items():
            is_known = key == "d_in and d_out" or (of_first and its)
            if is_known and of_first != its:
                raise ValueError(
                    f"{first[0]} and {name} are not SAEs of the same activations: {key} is "
                    f"{of_first!r} of one and {its!r} of the other."
                )


def _load(name: str, device: str) -> SAE[Any]:
    sae = inference_sae(load_source_sae(name, device)).to(device).eval()
    if isinstance(sae, TemporalSAE):
        raise ValueError(
            f"{name!r} is of the architecture {sae.cfg.architecture()!r}, which encodes a whole "
            "context at a time: give other SAEs."
        )
    # activations come flat, one vector a token
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


def _parts(name: str) -> tuple[str, ...]:
    path = Path(name)
    return path.resolve().parts if path.is_dir() else tuple(name.split("/"))
