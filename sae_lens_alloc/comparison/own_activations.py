"""Activations of one's own as the subject of a comparison, without a language model."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from typing_extensions import override

from sae_lens_alloc.activations.names import name_for_others
from sae_lens_alloc.activations.own_activations import buffer_rows_of
from sae_lens_alloc.comparison.config import ComparisonConfig
from sae_lens_alloc.comparison.own_stream import describe_own_stream, open_split
from sae_lens_alloc.comparison.stream import SPLITS, Stream
from sae_lens_alloc.comparison.subject import Subject
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage
from sae_lens_alloc.saes.rows import encoded_and_target, row_width


class OwnActivationsSubject(Subject):
    """Activations in files, one for each split. They are read where they are, and not copied."""

    def __init__(self, config: ComparisonConfig) -> None:
        assert config.activations is not None
        self.paths = config.activations
        self.column = config.activations_column
        self.cfg = config.stream_run()
        self.n_evaluated = config.eval_samples

    @override
    def write(self, folder: Path) -> Stream:
        width = row_width(self.cfg.sae)
        rows = {split: open_split(self.paths[split], self.column) for split in SPLITS}
        for split, own in rows.items():
            if own.width != width:
                raise ValueError(
                    f"compare.activations.{split}: {own.name} has rows of {own.width} numbers, but "
                    f"the SAEs take {width}: give sae.d_in={own.width}, or other activations."
                )
        for own in rows.values():
            own.require_finite()
        evaluated = ("validation", "test")
        counts = {
            split: min(rows[split].n_rows, self.n_evaluated) for split in evaluated
        }
        return describe_own_stream(
            folder,
            rows,
            self.paths,
            self.column,
            {"train": self.cfg.training_tokens, **counts},
            self.cfg.seed,
            buffer_rows_of(self.cfg),
        )

    @override
    def evaluate(
        self, sae: SAE[Any], stream: Stream, split: str
    ) -> tuple[Usage, dict[str, Any]]:
        encoded, target = encoded_and_target(
            sae.cfg, stream.split(split).to(sae.device)
        )
        usage = measure_usage(as_user(sae), encoded, target=target)
        return usage, usage.to_dict()

    @override
    def facts(self) -> dict[str, Any]:
        return {
            "kind": "own_activations",
            "activations": name_for_others(self.paths["train"]),
        }
