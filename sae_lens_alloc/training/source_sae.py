"""The SAE that a fine-tuning starts from: a folder, or a release of SAELens' directory."""

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_lens import SAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.saes.saved_sae import (
    load_sae,
    number_or_none,
    read_json_mapping,
    trained_k,
)
from sae_lens_alloc.typed_values import nearest, shown


@dataclass(frozen=True)
class SourceSAE:
    """
    An SAE to start from.

    Args:
        name: Its folder, or RELEASE:ID.
        sae: The inference or training SAE.
        scaling_factor: Factor of the activations in training, from the checkpoint of a run
            with "expected_average_only_in", or None.
        expected_l0: Features per token according to its training or release, or None.
        expected_ev: Explained variance according to its release, or None.
    """

    name: str
    sae: SAE[Any]
    scaling_factor: float | None
    expected_l0: float | None
    expected_ev: float | None


def load_source_sae(name: str, device: str) -> SourceSAE:
    """
    Loads an SAE from disk or from SAELens' directory of pretrained SAEs.

    Args:
        name: A folder with an inference SAE or a training checkpoint, or RELEASE:ID, for which
            RELEASE/ID may stand.
        device: Device to load it to.

    Raises:
        ValueError: if there is no such SAE, one of its files is damaged, or it cannot be
            downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return _from_folder(folder, device)
    release, colon, sae_id = name.partition(":")
    if not colon:
        release, colon, sae_id = name.partition("/")
        if release not in get_pretrained_saes_directory():
            colon = ""
    if not colon:
        raise ValueError(
            f"{name!r} is neither a folder nor RELEASE:ID of a pretrained SAE."
        )
    return _from_release(release, sae_id, device)


def inference_sae(source: SourceSAE) -> SAE[Any]:
    """
    The SAE for inference. For a training SAE, this is what its run would have saved, with the
    thresholds of training.
    """
    if not isinstance(source.sae, TrainingSAE):
        return source.sae
    sae = copy.deepcopy(source.sae)
    if source.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(source.scaling_factor)
    with TemporaryDirectory() as folder:
        sae.save_inference_model(Path(folder))
        return SAE.load_from_disk(folder, str(sae.device))


def _from_folder(folder: Path, device: str) -> SourceSAE:
    if (folder / ACTIVATION_WHITENING_FILENAME).exists():
        raise ValueError(
            f"{str(folder)!r} is a checkpoint of a run on whitened activations, which cannot be "
            "converted: give the SAE that the run saved at its end."
        )
    sae = load_sae(folder, device)
    scaler = folder / ACTIVATION_SCALER_CFG_FILENAME
    factor = _scaling_factor(scaler) if scaler.exists() else None
    expected_l0 = number_or_none(sae.cfg.metadata.l0) or trained_k(sae)
    return SourceSAE(str(folder), sae, factor, expected_l0, None)


def _scaling_factor(path: Path) -> float | None:
    given = read_json_mapping(path).get("scaling_factor")
    if given is not None and number_or_none(given) is None:
        raise ValueError(
            f"{str(path)!r} is damaged: scaling_factor must be a number above 0 or null, "
            f"not {shown(given)}."
        )
    return given


def _from_release(release: str, sae_id: str, device: str) -> SourceSAE:
    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise ValueError(_unknown("release", release, list(directory)))
    known = directory[release]
    if sae_id not in known.saes_map:
        raise ValueError(_unknown(f"SAE of {release}", sae_id, list(known.saes_map)))
    try:
        sae = SAE.from_pretrained(release, sae_id, device)
    except OSError as error:  # those of requests and huggingface_hub are OSErrors, too
        raise ValueError(
            f"{release}:{sae_id} is not in the Hugging Face cache of this machine and could "
            "not be downloaded: run this once where there is a network, or give a folder."
        ) from error
    return SourceSAE(
        f"{release}:{sae_id}",
        sae,
        None,
        known.expected_l0.get(sae_id) or getattr(sae.cfg, "k", None),
        known.expected_var_explained.get(sae_id),
    )


def _unknown(what: str, name: str, known: list[str]) -> str:
    return f"there is no {what} {name!r}, did you mean {nearest(name, known)!r}?"
