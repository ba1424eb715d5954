"""An SAE that training leaves with one threshold a feature: how it is used and how it is saved."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import nn
from typing_extensions import override

from sae_lens_alloc.allocation.mutual_choice import require_no_nan_or_inf
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.stored_tensors import holds_stored_tensors
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.ops.block_encoder import BlockEncoder, Encoder, KnownAffinities
from sae_lens_alloc.ops.device_checks import DeviceChecks
from sae_lens_alloc.ops.encode_thresholds import encode_thresholds
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.auxiliary_loss import decoder_norms
from sae_lens_alloc.saes.checkpoint_weights import STATISTICS, load_own_weights
from sae_lens_alloc.saes.dense_path import (
    decode_dense,
    dense_affinities,
    mask_of,
    require_all_features,
)
from sae_lens_alloc.saes.reconstruction import Weights, reconstruct
from sae_lens_alloc.saes.running_statistics import remove_statistics
from sae_lens_alloc.saes.skip_connection import with_past

T_CONFIG = TypeVar("T_CONFIG", bound=AllocationTrainingSAEConfig)


class ThresholdTrainingSAE(TrainingSAE[T_CONFIG]):
    """
    Training SAE that is allocated by the batch in training mode (`sae.train()`), and by
    thresholds in evaluation mode (`sae.eval()`). It is saved as a stock JumpReLU SAE.
    """

    b_enc: nn.Parameter

    def __init__(self, cfg: T_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.allocation = AllocationStatistics(
            cfg.d_sae, cfg.density_window_tokens, self.W_dec.device
        )
        self.checks = DeviceChecks()

    @property
    def shard(self) -> FeatureShard:
        """The features that the weights are of: all of them, or those of this rank."""
        return self.allocation.shard

    @abstractmethod
    def preview(self, encoder: BlockEncoder, x: torch.Tensor) -> SparseActivations:
        """
        The pairs that a training batch of encoder inputs x, of shape (B, d_in), would get. Does
        not change any statistics.
        """

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = nn.Parameter(
            torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        )

    def _affinity_scale(self) -> torch.Tensor | None:
        """Decoder norms, or None where features compete with their bare pre-activation."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        return decoder_norms(self.W_dec)

    def encoder(self) -> Encoder:
        """The encoder by blocks of features, detached from the graph."""
        return Encoder(self.W_enc.detach(), self.b_enc.detach(), self._affinity_scale())

    @override
    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Dense feature activations and affinities, both of shape (..., d_sae): the thresholded
        ones in evaluation mode, the allocation of x as one batch in training mode. Does not
        change any statistics.

        Raises:
            ValueError: in training mode, if x leads to NaN or infinite affinities.
        """
        affinities = self._dense_affinities(self.process_sae_in(x))
        if not self.training:
            mask = (affinities > self.allocation.threshold) & (affinities > 0)
        else:
            flat = affinities.detach().reshape(-1, self.cfg.d_sae)
            require_no_nan_or_inf(flat)
            pairs = self.preview(KnownAffinities(flat), flat)
            mask = mask_of(pairs).view(affinities.shape)
        return self.hook_sae_acts_post(affinities * mask), affinities

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Output of the features, shape (..., d_out), from their dense or sparse activations."""
        return self._finish_decode(self._decode_dense(feature_acts))

    def _dense_affinities(self, inputs: torch.Tensor) -> torch.Tensor:
        require_all_features(self.shard)
        return dense_affinities(
            inputs,
            self.W_enc,
            self.b_enc,
            self._affinity_scale(),
            self.hook_sae_acts_pre,
        )

    def _decode_dense(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return decode_dense(feature_acts, self.W_dec, self._affinity_scale())

    def _finish_decode(self, without_bias: torch.Tensor) -> torch.Tensor:
        return self._norm_out(self.hook_sae_recons(without_bias + self.b_dec))

    def _norm_out(self, recons: torch.Tensor) -> torch.Tensor:
        return self.reshape_fn_out(
            self.run_time_activation_norm_fn_out(recons), self.d_head
        )

    @torch.no_grad()
    def autoencode_pairs(
        self, x: torch.Tensor, by_threshold: bool
    ) -> tuple[SparseActivations, torch.Tensor]:
        """
        Active pairs and reconstruction of tokens x of shape (B, d_in), without a dense
        activation matrix and without hooks on the activations.

        Args:
            x: Activations as the SAE takes them.
            by_threshold: By the thresholds, as inference does, rather than as one training
                batch.
        """

        def above_threshold(encoder: Encoder, inputs: torch.Tensor):
            return encode_thresholds(encoder, inputs, self.allocation.threshold)

        return self.autoencode_selected(
            x, above_threshold if by_threshold else self.preview
        )

    @torch.no_grad()
    def autoencode_selected(
        self,
        x: torch.Tensor,
        select: Callable[[Encoder, torch.Tensor], SparseActivations],
    ) -> tuple[SparseActivations, torch.Tensor]:
        """
        The same as `autoencode_pairs`, for the pairs that `select` gives for the encoder and
        its inputs of shape (B, d_in).
        """
        encoder = self.encoder()
        inputs = self.process_sae_in(x)
        pairs = select(encoder, inputs)
        weights = Weights(self.W_enc, self.b_enc, self.W_dec, ranks=self.shard.ranks)
        (recons,), _ = reconstruct(weights, encoder, inputs, [pairs])
        return pairs, with_past(self, self._finish_decode(recons), x)

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "Folding W_dec_norm is not safe when rescale_acts_by_decoder_norm is "
                "False, as this would change which pairs are selected."
            )
        super().fold_W_dec_norm()

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # affinities are in units of the decoder norm, which was just divided (#763)
            self.allocation.threshold /= scaling_factor
            self.allocation.cut /= scaling_factor

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: torch.Tensor,
        whitening_matrix: torch.Tensor,
        unwhitening_matrix: torch.Tensor,
    ) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            # Unwhitening changes the decoder norms and with them the affinities. With the
            # norms folded first, affinities are pre-activations, which it does not change.
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        self.checks.report(wait=True)
        super().process_state_dict_for_saving_inference(state_dict)
        remove_statistics(state_dict, STATISTICS)
        scale = self._affinity_scale()
        if scale is not None:
            state_dict["W_enc"] = (state_dict["W_enc"] * scale).to(self.dtype)
            state_dict["b_enc"] = (state_dict["b_enc"] * scale).to(self.dtype)
            state_dict["W_dec"] = (state_dict["W_dec"] / scale[:, None]).to(self.dtype)
        state_dict["threshold"] = self.allocation.threshold.clamp(min=0.0).clone()

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        self.checks.report(wait=True)
        super().process_state_dict_for_saving(state_dict)
        # row_sparse_adam stores it by features, and safetensors by rows
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()
        self.allocation.write_checkpoint(state_dict, STATISTICS)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self.allocation.read_checkpoint(state_dict, STATISTICS)

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Loads what a checkpoint of one process, or of any number of ranks, has of the features."""
        checkpoint = Path(checkpoint_path)
        if self.shard.is_whole and not holds_stored_tensors(checkpoint):
            super().load_weights_from_checkpoint(checkpoint)
        else:
            together(self.shard.ranks, lambda: load_own_weights(self, checkpoint))
