"""What a run of refined_mutual_choice leaves, and what becomes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_alloc import (
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
    RefinedJumpReLUSAE,
    RefinedMutualChoiceTrainingSAEConfig,
    convert_sae,
    train_on_activations,
)
from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.saes.refined_jumprelu_sae import STOCK_FOLDER
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAE,
)
from sae_lens_alloc.thresholds.recalibration import load_saved_sae, recalibrate
from sae_lens_alloc.training.source_sae import load_source_sae
from tests.cli.commands import invoke
from tests.comparison.conftest import small_settings, write_config
from tests.training.test_own_activations import (
    D_IN,
    D_SAE,
    activations,
    assert_same,
    config,
)

pytestmark = pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")


def refined_config(**settings: Any) -> RefinedMutualChoiceTrainingSAEConfig:
    return RefinedMutualChoiceTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=3, feature_choice_steps=4, **settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refined")
    train_on_activations(activations(), config(folder, refined_config()))
    return folder / "sae"


def test_a_run_leaves_both_forms_and_their_figures(folder: Path):
    saved, stock = (
        SAE.load_from_disk(path) for path in (folder, folder / STOCK_FOLDER)
    )
    assert isinstance(saved, RefinedJumpReLUSAE) and type(stock) is JumpReLUSAE
    rows = activations()
    order = RowOrder(len(rows), 16, 1, config().seed)
    held_out = torch.cat([rows[start:stop] for start, stop in order.held_out])
    metadata: Any = saved.cfg.metadata
    assert metadata.stock_form["folder"] == STOCK_FOLDER
    for sae, figures in ((saved, metadata.held_out), (stock, metadata.stock_form)):
        usage = measure_usage(as_user(sae), held_out)
        assert figures["l0"] == pytest.approx(usage.l0, rel=1e-5)
        ev = figures["explained_variance"]
        assert ev == pytest.approx(usage.explained_variance, rel=1e-4)
        assert figures["dead_features"] == usage.dead_features
    assert metadata.held_out["explained_variance"] > 0.1
    # of the stock form its own, and nothing of the other
    own: Any = stock.cfg.metadata
    figures = {k: v for k, v in metadata.stock_form.items() if k != "folder"}
    assert own.held_out == figures and figures["n_tokens"] == len(held_out)
    assert own.l0 == figures["l0"]
    assert own.calibration is None and own.stock_form is None
    assert metadata.calibration["l0"] == pytest.approx(3, rel=0.01)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path):
    rows = activations()
    whole = train_on_activations(rows, config(None, refined_config()))
    first = config(
        None,
        refined_config(),
        checkpoint_path=str(tmp_path / "checkpoints"),
        n_checkpoints=1,
    )
    train_on_activations(rows, first)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/[0-9]*")
    second = config(None, refined_config(), resume_from_checkpoint=str(checkpoint))
    assert_same(train_on_activations(rows, second), whole)


def test_overwriting_it_removes_its_stock_form(tmp_path: Path):
    rows = activations()

    def run(sae: TrainingSAEConfig) -> None:
        cfg = config(tmp_path, sae)
        AllocSAETrainingRunner(cfg, override_activations=rows, overwrite=True).run()

    for _ in range(2):  # a folder replaces a folder
        run(refined_config())
        assert (tmp_path / "sae" / STOCK_FOLDER / "cfg.json").exists()
    run(MutualChoiceTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3))
    assert not (tmp_path / "sae" / STOCK_FOLDER).exists()


def test_it_is_fine_tuned_from_its_stock_form_alone(folder: Path):
    source = load_source_sae(str(folder), "cpu")
    for sae in (source.sae, RefinedMutualChoiceTrainingSAE(refined_config())):
        with pytest.raises(ValueError, match=f"encodes twice: .* {STOCK_FOLDER}"):
            convert_sae(sae, "mutual_choice", k=3)
    stock = load_source_sae(str(folder / STOCK_FOLDER), "cpu").sae
    converted = convert_sae(stock, "refined_mutual_choice", k=3)
    assert isinstance(converted, RefinedMutualChoiceTrainingSAE)
    x = activations(64)
    torch.testing.assert_close(converted.W_enc, stock.W_enc)
    # until there was a first pass it is the stock form
    torch.testing.assert_close(converted.eval()(x), stock(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_feature", [False, True])
def test_recalibrated_it_still_encodes_twice(folder: Path, per_feature: bool):
    saved = load_saved_sae(folder)
    assert isinstance(saved, RefinedJumpReLUSAE)
    first = saved.first_threshold.clone()
    found = recalibrate(saved, activations(), 2.0, per_feature)
    assert isinstance(found.sae, RefinedJumpReLUSAE)
    assert torch.equal(found.sae.first_threshold, first)
    half = activations()[:1500]
    l0 = (found.sae.encode(half) != 0).sum() / len(half)
    assert float(l0) == pytest.approx(2.0, abs=0.01)


def comparison(folder: Path, **row: Any) -> Path:
    settings = small_settings()
    compare = settings["compare"]
    compare |= {"k": [2], "seeds": [0]}
    compare["rows"] = {
        "refined": {"architecture": "refined_mutual_choice", "feature_choice_steps": 0},
        "stock": {"stock_form_of": "refined", **row},
    }
    return write_config(settings, folder)


def test_a_row_in_the_stock_form(tmp_path: Path):
    path = comparison(tmp_path)
    output = tmp_path / "output"
    result = invoke("compare", str(path), "--output", str(output))
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    of_row = {cell["row"]: key for key, cell in results["cells"].items()}
    refined, stock = (
        SAE.load_from_disk(output / "cells" / of_row[row] / "l0-2")
        for row in ("refined", "stock")
    )
    assert isinstance(refined, RefinedJumpReLUSAE) and type(stock) is JumpReLUSAE
    # it was not trained again
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(refined, name), getattr(stock, name))
    assert not list(output.rglob("trained"))


def test_a_row_in_the_stock_form_has_nothing_of_its_own(tmp_path: Path):
    sentence = "compare.rows.stock.stock_form_of must be the name of a row of refined"
    for row in ({"lr": [1e-3]}, {"stock_form_of": "stock"}, {"stock_form_of": "none"}):
        with pytest.raises(ValueError, match=sentence):
            load_comparison(comparison(tmp_path, **row))
