"""Synthetic activations with known features (SAELens' `sae_lens.synthetic`)."""

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.synthetic import (
    SyntheticModel,
    SyntheticModelConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.util import temporary_seed
from typing_extensions import override

from sae_lens_alloc.comparison.config import ComparisonConfig
from sae_lens_alloc.comparison.stream import (
    SPLITS,
    StoredStream,
    Stream,
    write_stream,
)
from sae_lens_alloc.comparison.subject import Subject
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage

SAMPLES_PER_BATCH = 4096


class SyntheticSubject(Subject):
    """
    A SAELens SyntheticModel. Samples are drawn once, each split with a seed of its own. SAELens'
    `eval_sae_on_synthetic_data` compares an SAE with the known features on further samples, also
    with a seed for each split.
    """

    def __init__(self, config: ComparisonConfig) -> None:
        assert config.synthetic is not None
        self.cfg = config.stream_run()
        self.stored_dtype = config.stored_dtype
        self.n_evaluated = config.eval_samples
        try:
            self.model_cfg = SyntheticModelConfig.from_dict(config.synthetic)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"compare.synthetic does not describe a SyntheticModelConfig: {error}."
            ) from error
        if self.model_cfg.hidden_dim != self.cfg.sae.d_in:
            raise ValueError(
                f"compare.synthetic.hidden_dim ({self.model_cfg.hidden_dim}) must be "
                f"sae.d_in ({self.cfg.sae.d_in})."
            )

    @override
    def write(self, folder: Path) -> StoredStream:
        return write_stream(
            folder,
            {split: self._samples(seed) for seed, split in enumerate(SPLITS)},
            {
                "train": self.cfg.training_tokens,
                "validation": self.n_evaluated,
                "test": self.n_evaluated,
            },
            self.cfg.sae.d_in,
            self.stored_dtype,
        )

    @override
    def evaluate(
        self, sae: SAE[Any], stream: Stream, split: str
    ) -> tuple[Usage, dict[str, Any]]:
        usage = measure_usage(as_user(sae), stream.split(split).to(sae.device))
        with temporary_seed(self._seed(len(SPLITS) + SPLITS.index(split))):
            found = known_feature_metrics(sae, self.model, self.n_evaluated)
        return usage, {**usage.to_dict(), **found}

    @override
    def facts(self) -> dict[str, Any]:
        return {
            "kind": "synthetic",
            "activations": f"{self.model_cfg.num_features:,} known features in "
            f"{self.model_cfg.hidden_dim} dimensions",
        }

    @cached_property
    def model(self) -> SyntheticModel:
        """The model that samples are drawn from."""
        return SyntheticModel(self.model_cfg, device=self.cfg.device)

    def _samples(self, split: int) -> Iterator[torch.Tensor]:
        # a generator may never be continued, so it must not keep a seed set between batches
        batch = 0
        while True:
            with temporary_seed(self._seed(split, batch)):
                samples = self.model.sample(SAMPLES_PER_BATCH)
            yield samples
            batch += 1

    def _seed(self, split: int, batch: int = 0) -> int:
        """A seed for each batch, of 32 bits, since torch's CPU generator ignores further bits."""
        entropy = (self.cfg.seed, split, batch)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def known_feature_metrics(
    sae: SAE[Any], model: SyntheticModel, n_samples: int
) -> dict[str, Any]:
    """
    How well the features of an SAE match the known ones, by SAELens'
    `eval_sae_on_synthetic_data` on new samples.

    Args:
        sae: A saved SAE.
        model: The model with the known features.
        n_samples: Number of samples.
    """
    # SAELens compares the SAE's output with float32, and fails for other dtypes
    in_float32 = copy.deepcopy(sae).to(torch.float32)
    result = eval_sae_on_synthetic_data(
        in_float32,
        model.feature_dict,
        model.activation_generator,
        n_samples,
        SAMPLES_PER_BATCH,
    )
    return {
        "mcc": result.mcc,
        "uniqueness": result.uniqueness,
        "f1": result.classification.f1_score,
        "precision": result.classification.precision,
        "recall": result.classification.recall,
        "true_l0": result.true_l0,
    }
