from pathlib import Path
from typing import Any

import pytest

from sae_lens_alloc.comparison.config import load_comparison
from tests.comparison.conftest import write_config


def test_the_grid_is_rows_by_sparsities_by_learning_rates_by_seeds(
    tmp_path: Path, settings: dict[str, Any]
):
    settings["compare"]["lr"] = [1e-2, 1e-3]
    cells = load_comparison(write_config(settings, tmp_path))[0].cells()
    assert [(c.row, c.sparsity, c.lr, c.seed) for c in cells] == [
        (row, sparsity, lr, seed)
        for seed in (0, 1)
        for row, sparsities in (("ours", (2, 3)), ("stock", (0.01, 0.02)))
        for sparsity in sparsities
        for lr in (1e-2, 1e-3)
    ]
    # an SAE with a k is used at its k, one without at every k
    assert [cell.target_l0s for cell in cells[:8]] == [
        *((2,), (2,), (3,), (3,)),
        *((2, 3), (2, 3), (2, 3), (2, 3)),
    ]


def test_a_row_may_have_learning_rates_of_its_own(
    tmp_path: Path, settings: dict[str, Any]
):
    settings["compare"]["lr"] = [1e-2, 1e-3]
    before = load_comparison(write_config(settings, tmp_path))[0].cells()
    settings["compare"]["rows"]["stock"]["lr"] = [1e-3, 1e-4]
    after = load_comparison(write_config(settings, tmp_path))[0].cells()
    lrs = {row: {c.lr for c in after if c.row == row} for row in ("ours", "stock")}
    assert lrs == {"ours": {1e-2, 1e-3}, "stock": {1e-3, 1e-4}}
    # what was trained with one of them is trained already
    assert {c.key for c in before if c.lr == 1e-3} < {c.key for c in after}


def test_a_row_may_have_more_seeds_than_all(tmp_path: Path, settings: dict[str, Any]):
    before = load_comparison(write_config(settings, tmp_path))[0].cells()
    settings["compare"]["rows"]["stock"]["seeds"] = [0, 1, 5]
    after = load_comparison(write_config(settings, tmp_path))[0].cells()
    # the common seeds before the others, and what was trained is trained already
    assert [c.key for c in after[: len(before)]] == [c.key for c in before]
    more = [(c.row, c.sparsity, c.seed) for c in after[len(before) :]]
    assert more == [("stock", 0.01, 5), ("stock", 0.02, 5)]


def test_cells_differ_in_the_sae_the_learning_rate_and_the_seed_alone(
    tmp_path: Path, settings: dict[str, Any]
):
    """So the same tokens in the same batches, for as many steps."""
    cells = load_comparison(write_config(settings, tmp_path))[0].cells()
    assert len({cell.stream for cell in cells}) == 1
    runs = [cell.runner_config().to_dict() for cell in cells]
    for run in runs:
        for key in ("sae", "lr", "lr_end", "seed", "logger", "checkpoint_path"):
            del run[key]
    assert all(run == runs[0] for run in runs)


def test_other_settings_give_another_folder(tmp_path: Path, settings: dict[str, Any]):
    before = load_comparison(write_config(settings, tmp_path))[0].cells()
    settings["compare"]["rows"]["ours"]["aux_loss"] = "none"
    settings["compare"]["rows"]["topk"] = {"architecture": "topk"}
    after = load_comparison(write_config(settings, tmp_path))[0].cells()
    kept = {cell.key for cell in before} & {cell.key for cell in after}
    assert kept == {cell.key for cell in before if cell.row == "stock"}


def test_other_activations_give_other_cells(tmp_path: Path, settings: dict[str, Any]):
    before = load_comparison(write_config(settings, tmp_path))[0].cells()
    settings["compare"]["synthetic"]["seed"] = 2
    after = load_comparison(write_config(settings, tmp_path))[0].cells()
    assert not {cell.key for cell in before} & {cell.key for cell in after}


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        (
            (),
            "kl_finish",
            "5%",
            "kl_finish runs the language model, but a comparison trains on stored activations: "
            "remove it.",
        ),
        ((), "lr", 1e-3, "lr must not be set for all rows: give compare.lr."),
        (("sae",), "k", 4, "sae.k must not be set for all rows: give compare.k."),
        (
            ("compare",),
            "kk",
            [2],
            "the key of compare 'kk' is unknown, did you mean 'k'?",
        ),
        (
            ("compare",),
            "k",
            2,
            "compare.k must be a list with each item a number, got 2.",
        ),
        (("compare",), "seeds", [], "compare.seeds is missing."),
        (("compare",), "heldout_path", "x", "compare needs one of heldout_path, "),
        (
            ("compare", "rows", "stock"),
            "l1_coefficient",
            [0.1],
            "compare.rows.stock: 'standard' has no k, so one of its sparsity coefficients "
            "must be a list of 2 values, as many as compare.k has.",
        ),
        *(
            (
                ("compare", "rows", "ours"),
                "lr",
                value,
                "compare.rows.ours.lr must be a list of 1 learning rates, as many as "
                "compare.lr has, so that all rows have as many tries, got ",
            )
            for value in (1e-3, ["fast"], [1e-3, 1e-4])
        ),
        *(
            (
                ("compare", "rows", "ours"),
                "seeds",
                value,
                "compare.rows.ours.seeds must be a list of different seeds that begins "
                "with compare.seeds, [0, 1], which all rows share, got ",
            )
            for value in (3, ["many"], [1, 0], [0], [0, 1, 1])
        ),
        (
            ("compare", "rows", "ours"),
            "aux_los",
            "none",
            "compare.rows.ours: unknown key 'sae.aux_los', did you mean 'sae.aux_loss'?",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    tmp_path: Path,
    settings: dict[str, Any],
    section: tuple[str, ...],
    key: str,
    value: Any,
    sentence: str,
):
    place = settings
    for name in section:
        place = place[name]
    place[key] = value
    path = write_config(settings, tmp_path)
    with pytest.raises(ValueError) as error:
        load_comparison(path)
    assert str(error.value).startswith(f"{path}: {sentence}")
