"""SAEs in the form of other libraries, where one of theirs computes the same."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import save_file

from sae_lens_alloc.saes.refined_jumprelu_sae import RefinedJumpReLUSAE
from sae_lens_alloc.saes.rows import output_width
from sae_lens_alloc.thresholds.jumprelu_form import jumprelu_form

# They change the activations of each token when the SAE is used, which no form of theirs does.
AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")


@dataclass(frozen=True, eq=False)
class PlainWeights:
    """
    An SAE as z = x W_enc + b_enc, or (x - b_dec) W_enc + b_enc with `k`, of which some are chosen
    as activations, and x' = activations · W_dec + b_dec. All float32.

    Args:
        W_enc: Shape (d_in, d_sae).
        b_enc: Shape (d_sae,).
        W_dec: Shape (d_sae, d_in).
        b_dec: Shape (d_in,).
        threshold: An activation is chosen if it exceeds it, shape (d_sae,). Not used with `k`.
        k: The k largest of a token are chosen; None if thresholds choose.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor
    k: int | None


def save_for_dictionary_learning(sae: SAE[Any], folder: Path) -> None:
    """
    Writes an SAE as `dictionary_learning.utils.load_dictionary` reads it: a JumpReluAutoEncoder,
    or an AutoEncoderTopK.

    Args:
        sae: An inference SAE of SAELens' jumprelu, topk, standard or gated architecture.
        folder: An existing folder to write to.

    Raises:
        ValueError: if no form of theirs holds the SAE.
    """
    weights = _plain_weights(sae, "dictionary_learning")
    if weights.k is None:
        state = {
            "W_enc": weights.W_enc,
            "b_enc": weights.b_enc,
            "W_dec": weights.W_dec,
            "b_dec": weights.b_dec,
            "threshold": weights.threshold,
        }
        settings: dict[str, Any] = {"dict_class": "JumpReluAutoEncoder"}
    else:
        state = {
            "encoder.weight": weights.W_enc.T.contiguous(),
            "encoder.bias": weights.b_enc,
            "decoder.weight": weights.W_dec.T.contiguous(),
            "b_dec": weights.b_dec,
            "k": torch.tensor(weights.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),  # none
        }
        settings = {"dict_class": "AutoEncoderTopK", "k": weights.k}
    metadata = sae.cfg.metadata
    settings |= {
        "activation_dim": sae.cfg.d_in,
        "dict_size": sae.cfg.d_sae,
        "lm_name": metadata.model_name,
        "submodule_name": metadata.hook_name,
    }
    torch.save(state, folder / "ae.pt")
    _write_json(folder / "config.json", {"trainer": settings})


def save_for_sparsify(sae: SAE[Any], folder: Path) -> None:
    """
    Writes an SAE as `sparsify.SparseCoder.load_from_disk` reads it.

    Args:
        sae: An inference SAE of SAELens' topk architecture.
        folder: An existing folder to write to.

    Raises:
        ValueError: if it is another SAE, since theirs choose k activations for each token.
    """
    weights = _plain_weights(sae, "sparsify")
    if weights.k is None:
        raise ValueError(
            f"sparsify has TopK SAEs alone, which give every token k features, so it cannot hold "
            f"a {sae.cfg.architecture()} SAE: dictionary_learning can."
        )
    state = {
        "encoder.weight": weights.W_enc.T.contiguous(),
        "encoder.bias": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
    }
    save_file(state, folder / "sae.safetensors")
    settings = {
        "activation": "topk",
        "k": weights.k,
        "num_latents": sae.cfg.d_sae,
        "normalize_decoder": False,
        "d_in": sae.cfg.d_in,
    }
    _write_json(folder / "cfg.json", settings)


# By the name of the library.
SAVE_FOR: dict[str, Callable[[SAE[Any], Path], None]] = {
    "sparsify": save_for_sparsify,
    "dictionary_learning": save_for_dictionary_learning,
}


@torch.no_grad()
def _plain_weights(sae: SAE[Any], library: str) -> PlainWeights:
    """
    The weights of an SAE with decoder norms, gates and the dtype folded in.

    Raises:
        ValueError: if the SAE is no chain of two affine maps with a choice between them.
    """
    why = None
    if not isinstance(sae, JumpReLUSAE | TopKSAE | StandardSAE | GatedSAE):
        why = f"its architecture is {sae.cfg.architecture()}"
    elif isinstance(sae, RefinedJumpReLUSAE):
        why = "it encodes twice (give the folder stock_jumprelu in its own)"
    elif output_width(sae.cfg) is not None:
        why = "it is a transcoder"
    elif sae.cfg.normalize_activations in AT_RUN_TIME:
        why = f"it changes its input by {sae.cfg.normalize_activations} when it is used"
    if why is not None:
        raise ValueError(f"{library} has no form that holds this SAE: {why}.")
    form = jumprelu_form(sae)
    tensors = {name: value.float() for name, value in form.state_dict().items()}
    k = int(sae.cfg.k) if isinstance(sae, TopKSAE) else None
    subtracts = form.cfg.apply_b_dec_to_input
    if subtracts != (k is not None):  # as their encoders do
        shift = tensors["b_dec"] @ tensors["W_enc"]
        tensors["b_enc"] = (
            tensors["b_enc"] - shift if subtracts else tensors["b_enc"] + shift
        )
    return PlainWeights(**tensors, k=k)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
