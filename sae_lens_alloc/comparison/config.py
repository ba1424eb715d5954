"""The config file of a comparison: SAELens' keys for what all rows share, and `compare:`."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_type_hints

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.comparison.cell import Cell
from sae_lens_alloc.comparison.stream import SPLITS
from sae_lens_alloc.config.run_file import (
    check_choice,
    named_errors,
    read_settings,
    sae_config_class,
)
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.typed_values import convert, in_words

# The grid sets these, so a file must not.
GRID_KEYS = {
    "lr": "compare.lr",
    "sae.k": "compare.k",
    "sae.architecture": "compare.rows",
}
# The activations depend on these.
WIDTHS = ("d_in", "d_out")
# What a row may set for itself besides its SAE.
ROW_KEYS = ("lr", "seeds", "optimizer", "stock_form_of")
# A comparison has an output folder of its own, and is resumed cell by cell.
UNUSED_KEYS = (
    *("output_path", "checkpoint_path", "n_checkpoints", "save_final_checkpoint"),
    *("resume_from_checkpoint", "from_pretrained_path", "logger", "verbose"),
)
KL_KEYS = ("kl_finish", "kl_weight")


@dataclass(frozen=True)
class ComparisonConfig:
    """
    The grid of a comparison, and the settings that all rows share.

    Args:
        k: Features per token at which the rows are compared.
        lr: Learning rates that every row tries with the first seed. The best one at each k on
            the validation split trains the other seeds.
        seeds: Seeds of the SAEs' weights. The activations and their order do not depend on it.
        rows: SAE settings by name of the row, on top of the shared ones under `sae:`. A row
            whose architecture has no k gives a list for its sparsity coefficient, with one
            value for each `k`. A row may also have learning rates of its own (`lr`, as many as
            the other rows), more seeds (`seeds`, the shared ones first) and an `optimizer`. A
            row with `stock_form_of`, the name of another row, has the SAEs of that one in their
            stock form.
        heldout_path: Parquet file with a column `text`, for a language model. Its contexts
            go to the validation and the test split in turn.
        synthetic: Fields of SAELens' SyntheticModelConfig, for synthetic activations.
        activations: Paths of one's own activations, by split: `train`, `validation` and `test`.
        activations_column: Their column, if they have several.
        eval_samples: Size of the validation and of the test split of synthetic activations, and the
            most of either of one's own.
        stored_dtype: Data type of the activations on disk.
        measured_on: Split of the figures. It is "validation" for experiments whose outcome
            decides about settings, so that the test split stays unseen.
        shared: The rest of the file.
    """

    k: tuple[float, ...]
    lr: tuple[float, ...]
    seeds: tuple[int, ...]
    rows: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any]
    heldout_path: str | None = None
    synthetic: dict[str, Any] | None = None
    activations: dict[str, str] | None = None
    activations_column: str | None = None
    eval_samples: int = 100_000
    stored_dtype: Literal["float16", "float32"] = "float16"
    measured_on: Literal["test", "validation"] = "test"

    def cells(self) -> list[Cell]:
        """Every cell of the grid, the first seed before the others."""
        seeds = {row: self.rows[row].get("seeds", self.seeds) for row in self.rows}
        return [
            self._cell(row, sparsity, lr, seed)
            for seed in dict.fromkeys(chain(*seeds.values()))
            for row in self.rows
            if seed in seeds[row]
            for sparsity in self.sparsities(row)
            for lr in self.rows[row].get("lr", self.lr)
        ]

    def sparsity_key(self, row: str) -> str:
        """The SAE setting that gives a row its sparsity: k, or a coefficient."""
        hints = get_type_hints(sae_config_class(self.rows[row]["architecture"]))
        if "k" in hints:
            return "k"
        grids = [
            name
            for name, value in self.rows[row].items()
            if isinstance(value, list) and float in _options(hints.get(name))
        ]
        if len(grids) != 1 or len(self.rows[row][grids[0]]) != len(self.k):
            raise ValueError(
                f"compare.rows.{row}: {self.rows[row]['architecture']!r} has no k, so one "
                f"of its sparsity coefficients must be a list of {len(self.k)} values, as "
                "many as compare.k has."
            )
        return grids[0]

    def sparsities(self, row: str) -> Sequence[float]:
        """Values of the sparsity setting that a row trains with."""
        key = self.sparsity_key(row)
        return self.k if key == "k" else self.rows[row][key]

    def stream_run(self) -> LanguageModelSAERunnerConfig[Any]:
        """The run that the activations come from: that of the first cell, with the shared seed."""
        seed = self.shared.get("seed", LanguageModelSAERunnerConfig.seed)
        return replace(self.cells()[0].runner_config(), seed=seed)

    def stream_settings(self) -> dict[str, Any]:
        """The settings that the activations depend on."""
        return {
            **{key: value for key, value in self.shared.items() if key != "sae"},
            **{
                key: value for key, value in self.shared["sae"].items() if key in WIDTHS
            },
            "heldout_path": self.heldout_path,
            "synthetic": self.synthetic,
            "eval_samples": self.eval_samples,
            "stored_dtype": self.stored_dtype,
            **self._own_activations(),
        }

    def _own_activations(self) -> dict[str, Any]:
        """Nothing for other activations, whose digests are as before."""
        if self.activations is None:
            return {}
        column = self.activations_column
        return {"activations": self.activations, "activations_column": column}

    def _source(self) -> dict[str, Any]:
        """What a run says of one's own activations."""
        own = self._own_activations()
        return {**own, "activations": own["activations"]["train"]} if own else {}

    def _cell(self, row: str, sparsity: float, lr: float, seed: int) -> Cell:
        key = self.sparsity_key(row)
        sae = {**self.shared["sae"], **self.rows[row], key: sparsity}
        own: dict[str, Any] = {name: sae.pop(name) for name in ROW_KEYS if name in sae}
        run = {name: own[name] for name in ("optimizer",) if name in own}
        return Cell(
            row=row,
            sparsity_key=key,
            sparsity=sparsity,
            lr=lr,
            seed=seed,
            target_l0s=(sparsity,) if key == "k" else self.k,
            settings={
                **self.shared,
                **self._source(),
                **run,
                **{"sae": sae, "lr": lr, "seed": seed},
            },
            stream=digest(self.stream_settings()),
            stock_form_of=own.get("stock_form_of"),
        )


def load_comparison(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[ComparisonConfig, dict[str, Any]]:
    """
    Reads a comparison from a YAML file and checks every cell of it.

    The file has SAELens' keys for what all rows share, as in `load_runner_config`, and the
    fields of ComparisonConfig under `compare:`. `seed` is the seed of the activations.

    Args:
        path: The YAML file.
        overrides: Settings that replace the file's, such as "device=cuda".

    Returns:
        The comparison, and the settings it was read from.

    Raises:
        ValueError: if the comparison could not work, in one sentence that names the file and
            the setting.
        FileNotFoundError: if there is no such file.
    """
    with named_errors(path, overrides):
        settings = read_settings(path, overrides)
        return _build(settings), settings


def _build(settings: dict[str, Any]) -> ComparisonConfig:
    compare = _mapping(settings.get("compare"), "compare")
    shared = {key: value for key, value in settings.items() if key != "compare"}
    sae = _mapping(shared.get("sae"), "sae")
    flat = {*shared, *(f"sae.{key}" for key in sae)}
    for key, instead in GRID_KEYS.items():
        if key in flat:
            raise ValueError(f"{key} must not be set for all rows: give {instead}.")
    for key in shared:
        if key in UNUSED_KEYS:
            raise ValueError(f"{key} has no effect in a comparison: remove it.")
        if key in KL_KEYS:
            raise ValueError(
                f"{key} runs the language model, but a comparison trains on stored activations: "
                "remove it."
            )
    for name in ("d_in", "d_sae"):
        if name not in sae:
            raise ValueError(f"sae.{name} is missing.")

    hints = get_type_hints(ComparisonConfig)
    allowed = [f.name for f in fields(ComparisonConfig) if f.name != "shared"]
    values: dict[str, Any] = {}
    for key, value in compare.items():
        check_choice("the key of compare", key, allowed)
        hint = dict if key == "rows" else hints[key]
        try:
            values[key] = convert(value, hint)
        except TypeError:
            raise ValueError(
                f"compare.{key} must be {in_words(hint)}, got {value!r}."
            ) from None
    for f in fields(ComparisonConfig):
        if f.default is MISSING and f.name != "shared" and not values.get(f.name):
            raise ValueError(f"compare.{f.name} is missing.")
    for name, row in values["rows"].items():
        _mapping(row, f"compare.rows.{name}")
    values["rows"] = {
        name: _with_stock_form(name, row, values["rows"])
        for name, row in values["rows"].items()
    }
    for name, row in values["rows"].items():
        sae_config_class(row.get("architecture"))
        if "lr" in row:
            _require_lrs(name, row["lr"], len(values["lr"]))
        if "seeds" in row:
            _require_seeds(name, row["seeds"], list(values["seeds"]))
    config = ComparisonConfig(shared=shared, **values)
    sources = (config.heldout_path, config.synthetic, config.activations)
    if sum(source is not None for source in sources) != 1:
        raise ValueError(
            "compare needs one of heldout_path, the held-out text of a language model, synthetic, "
            "the description of synthetic activations, and activations, the paths of one's own."
        )
    _require_own_activations(config)
    for cell in config.cells():
        try:
            cell.runner_config()
        except ValueError as error:
            raise ValueError(f"compare.rows.{cell.row}: {error}") from error
    return config


def digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that identify settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _require_own_activations(config: ComparisonConfig) -> None:
    """Raises ValueError if the activations of a split are missing or those of another one."""
    paths = config.activations
    if paths is None:
        if config.activations_column is not None:
            raise ValueError(
                f"compare.activations_column is {config.activations_column!r}, but "
                "compare.activations is missing: leave it out."
            )
        return
    if set(paths) != set(SPLITS) or len({*map(os.path.abspath, paths.values())}) < 3:
        raise ValueError(
            f"compare.activations must have a path each for {', '.join(SPLITS)}, and no path "
            f"twice, got {paths!r}."
        )


def _require_lrs(row: str, value: Any, n: int) -> None:
    if len(_list_or_nothing(value, list[float])) != n:
        raise ValueError(
            f"compare.rows.{row}.lr must be a list of {n} learning rates, as many as "
            f"compare.lr has, so that all rows have as many tries, got {value!r}."
        )


def _with_stock_form(
    name: str, row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """A row, with the settings of the row whose stock form it is."""
    if "stock_form_of" not in row:
        return row
    trained = rows.get(row["stock_form_of"], {})
    if (
        len(row) > 1
        or trained.get("architecture")
        != RefinedMutualChoiceTrainingSAEConfig.architecture()
    ):
        raise ValueError(
            f"compare.rows.{name}.stock_form_of must be the name of a row of "
            f"refined_mutual_choice, and nothing else may be set, got {dict(row)!r}."
        )
    return {**trained, **row}


def _require_seeds(row: str, value: Any, shared: list[int]) -> None:
    seeds = _list_or_nothing(value, list[int])
    if seeds[: len(shared)] != shared or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"compare.rows.{row}.seeds must be a list of different seeds that begins with "
            f"compare.seeds, {shared}, which all rows share, got {value!r}."
        )


def _list_or_nothing(value: Any, hint: Any) -> list[Any]:
    try:
        return convert(value, hint)
    except TypeError:
        return []


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", (hint,))
