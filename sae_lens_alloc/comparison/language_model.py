"""Activations of a language model, and how well it runs on the reconstructions of an SAE."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sae_lens import SAE
from sae_lens.util import get_special_token_ids, temporary_seed
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.activations.contexts import held_out_contexts
from sae_lens_alloc.activations.held_out_store import require_ordinary_tokens
from sae_lens_alloc.activations.hook_names import hook_name_out_of
from sae_lens_alloc.activations.language_model import load_language_model
from sae_lens_alloc.activations.local_dataset import override_for_local_dataset
from sae_lens_alloc.activations.names import name_for_others
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.comparison.config import ComparisonConfig
from sae_lens_alloc.comparison.stream import StoredStream, Stream, write_stream
from sae_lens_alloc.comparison.subject import Subject
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.evaluation.baseline import Baseline, measure_baseline
from sae_lens_alloc.evaluation.metrics import evaluate_sae
from sae_lens_alloc.evaluation.splicing import Site, spliced_loss
from sae_lens_alloc.evaluation.usage import Usage
from sae_lens_alloc.saes.rows import row_width


class LanguageModelSubject(Subject):
    """
    A language model at one hook. Training activations come from SAELens' ActivationsStore,
    shuffled as in any training. The contexts of the held-out text go to the validation and the
    test split in turn, since L0 differs between documents. The validation split decides only a
    learning rate and one number for the thresholds.
    """

    def __init__(self, config: ComparisonConfig) -> None:
        assert config.heldout_path is not None
        self.heldout_path = Path(config.heldout_path)
        self.stored_dtype = config.stored_dtype
        self.cfg = config.stream_run()
        self._baselines: dict[str, Baseline] = {}

    @override
    def write(self, folder: Path) -> StoredStream:
        held_out_texts(self.heldout_path)  # before the model is loaded
        held_out = {
            split: self._held_out_activations(split) for split in ("validation", "test")
        }
        training = ResumableActivationsStore.from_config(
            self.model, self.cfg, override_for_local_dataset(self.cfg)
        )
        require_ordinary_tokens(training)
        with temporary_seed(self.cfg.seed):
            return write_stream(
                folder,
                {
                    "train": training,
                    **held_out,
                },
                {
                    "train": self.cfg.training_tokens,
                    **{split: sum(map(len, held_out[split])) for split in held_out},
                },
                row_width(self.cfg.sae),
                self.stored_dtype,
            )

    @override
    def evaluate(
        self,
        sae: SAE[Any],
        stream: Stream,  # not used: the model has to run on text
        split: str,
    ) -> tuple[Usage, dict[str, Any]]:
        evaluation = evaluate_sae(
            sae,
            self.model,
            self.contexts[split],
            self.cfg.hook_name,
            self._baseline(split),
            self.special_token_ids,
            hook_name_out=hook_name_out_of(self.cfg),
        )
        return evaluation, evaluation.to_dict()

    @override
    def facts(self) -> dict[str, Any]:
        return {
            "kind": "language_model",
            "activations": f"{name_for_others(self.cfg.model_name)} at {self.cfg.hook_name}",
        }

    @cached_property
    def model(self) -> HookedRootModule:
        """The language model."""
        return load_language_model(self.cfg)

    @cached_property
    def special_token_ids(self) -> list[int]:
        """Ids of the tokens that are left out, as in training."""
        excluded = self.cfg.exclude_special_tokens
        if isinstance(excluded, list):
            return excluded
        return get_special_token_ids(self.model.tokenizer) if excluded else []  # type: ignore[arg-type]

    @cached_property
    def contexts(self) -> dict[str, torch.Tensor]:
        """Token ids of the held-out splits, each of shape (contexts, context_size)."""
        contexts = held_out_contexts(
            held_out_texts(self.heldout_path),
            self.model.tokenizer,  # type: ignore[arg-type]
            self.cfg.context_size,
        ).to(str(self.cfg.llm_device))
        if len(contexts) < 2:
            raise ValueError(
                f"{str(self.heldout_path)!r} has text for {len(contexts)} contexts of "
                f"{self.cfg.context_size} tokens, but each of two splits needs one: give more "
                "text, or a smaller context_size."
            )
        return {"validation": contexts[::2], "test": contexts[1::2]}

    def _baseline(self, split: str) -> Baseline:
        """Measurements of the model without an SAE."""
        if split not in self._baselines:
            self._baselines[split] = measure_baseline(
                self.model,
                self.contexts[split],
                self.cfg.hook_name,
                self.special_token_ids,
                hook_name_out=hook_name_out_of(self.cfg),
            )
        return self._baselines[split]

    def _held_out_activations(self, split: str) -> list[torch.Tensor]:
        taken: list[torch.Tensor] = []
        out = hook_name_out_of(self.cfg)

        def take(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            rows = x if out is None else torch.cat([x.to(y.device), y], dim=-1)
            taken.append(rows.float().cpu())
            return y

        spliced_loss(
            self.model,
            self.contexts[split],
            Site(self.cfg.hook_name, out or self.cfg.hook_name),
            take,
            self.special_token_ids,
            contexts_per_batch=8,
        )
        return taken


def held_out_texts(path: Path) -> list[str]:
    """
    The texts of a parquet file with a column `text`, without empty and missing ones.

    Raises:
        ValueError: if it is no such file or holds no text.
    """
    try:
        texts = pq.read_table(path, columns=["text"])["text"]
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"compare.heldout_path {str(path)!r} is no parquet file with a column text: "
            f"{as_reason(error)}."
        ) from error
    if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
        raise ValueError(
            f"compare.heldout_path {str(path)!r} has a column text of {texts.type}, not of "
            "strings."
        )
    given = [text for text in texts.to_pylist() if text]
    if not given:
        raise ValueError(f"compare.heldout_path {str(path)!r} holds no text.")
    return given
