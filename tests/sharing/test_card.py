"""The model card: figures, thresholds, picture and front matter."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import save_file

from sae_lens_alloc.evaluation.figures import figures_of
from sae_lens_alloc.evaluation.usage import Usage
from sae_lens_alloc.sharing.card import write_card
from sae_lens_alloc.sharing.known_figures import (
    KnownFigures,
    calibration_in_words,
    known_curve,
    known_figures,
)
from sae_lens_alloc.sharing.picture import BOTTOM, LEFT, RIGHT, density_svg
from sae_lens_alloc.sharing.saes_to_share import SharedSAE


def make(folder: Path, **metadata: Any) -> SharedSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8))
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(folder)
    return SharedSAE(folder.name, folder, folder, SAE.load_from_disk(folder))


def card_of(folder: Path, *shared: SharedSAE) -> str:
    folder.mkdir()
    write_card(folder, shared, "me/saes")
    return (folder / "README.md").read_text()


def test_an_sae_that_says_nothing_has_a_card_with_dashes(tmp_path: Path):
    card = card_of(tmp_path / "card", make(tmp_path / "plain"))
    assert "| plain | standard | 8 | – | – | – | – | – |" in card
    assert "density" not in card and "Thresholds" not in card
    assert not (tmp_path / "card" / "density.svg").exists()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "saelens"
    assert "base_model" not in front and "datasets" not in front


def test_the_card_names_models_of_the_hub_and_no_folder_of_this_machine(tmp_path: Path):
    known = make(
        tmp_path / "known",
        model_name="org/model",
        dataset_path="org/text",
        hook_name="blocks.3.hook_resid_post",
        training_architecture_details={"k": 16, "note": "a|b\nc"},
        provenance={"seed": 3, "git_commit": None, "versions": {"torch": "2.6"}},
    )
    local = make(tmp_path / "local", model_name="/home/someone/secret/gpt/model")
    card = card_of(tmp_path / "card", known, local)
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["org/model"]
    assert front["datasets"] == ["org/text"]
    assert "of org/model, gpt/model at `blocks.3.hook_resid_post`" in card
    assert "someone" not in card
    assert "| model_name | `gpt/model` |" in card
    assert "| note | `a\\|b c` |" in card
    assert "| seed | `3` |\n| torch | `2.6` |" in card
    rows = [line for line in card.splitlines() if line.startswith("| local ")]
    assert len(rows) == 1


def test_figures_that_were_measured_come_before_those_of_the_metadata(tmp_path: Path):
    held_out = {
        "explained_variance": 0.5,
        "l0": 17.0,
        "dead_features": 0,
        "n_tokens": 90,
    }
    one = make(tmp_path / "sae", held_out=held_out)
    assert known_figures(one.sae, one.given) == KnownFigures(
        17.0, 0.5, 0, 90, "held-out tokens", None
    )
    measured = {"l0": 16.0, "explained_variance": 0.25, "ce_recovered_mean": 0.75}
    measured |= {"dead_features": 2, "n_tokens": 4000}
    (one.given / "held_out.json").write_text(json.dumps(measured))
    expected = KnownFigures(16.0, 0.25, 2, 4000, "held-out text", 0.75)
    assert known_figures(one.sae, one.given) == expected
    (one.given / "test.json").write_text(json.dumps({**measured, "l0": None}))
    expected = KnownFigures(None, 0.25, 2, 4000, "test text", 0.75)
    assert known_figures(one.sae, one.given) == expected
    row = "| sae | standard | 8 | – | 0.2500 | 0.7500 | 2 | 4,000: test text |"
    assert row in card_of(tmp_path / "card", one)


def test_thresholds_of_a_training_and_of_calibrate(tmp_path: Path):
    by_training = {"target_l0": 16, "n_tokens": 65536, "l0_before": 17.386, "l0": 16.0}
    one = make(tmp_path / "one", calibration=by_training)
    assert calibration_in_words(one.sae) == (
        "The thresholds were set for 16 features per token on 65,536 tokens of text. "
        "Features per token there: 17.39 before, 16.00 after."
    )
    by_command = {
        **{"target_l0": 12.5, "n_tokens": 1000, "l0_before": 20.0, "l0_after": 12.5},
        **{"per_feature": True, "l0_held_out_after": 12.25, "ev_held_out_after": 0.75},
        "dead_held_out_after": 3,
    }
    two = make(tmp_path / "two", calibration=by_command)
    assert calibration_in_words(two.sae) == (
        "The thresholds were set for 12.5 features per token on 1,000 tokens of text. One "
        "factor moved the densities of all features. Features per token there: 20.00 before, "
        "12.50 after."
    )
    assert known_figures(two.sae, two.given) == KnownFigures(
        12.25, 0.75, 3, 1000, "tokens that did not set the thresholds", None
    )
    assert calibration_in_words(make(tmp_path / "three").sae) is None


def test_densities_as_measured_or_of_the_training(tmp_path: Path):
    one = make(tmp_path / "sae")
    assert known_curve(one.given) is None
    # features 0 and 1 on a half and a tenth of the tokens, the others on none
    densities = torch.tensor([0.1, 0.5, 0.0, 0.0])
    save_file(
        {"sparsity": torch.log10(densities + 1e-10)}, one.given / "sparsity.safetensors"
    )
    curve = known_curve(one.given)
    assert curve is not None
    assert curve[0] == [1, 2]
    assert curve[1] == pytest.approx([0.5, 0.1], rel=1e-5)
    usage = Usage(
        explained_variance=0.5,
        features_per_token=torch.full((100,), 3),
        densities=torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64),
    )
    measured = figures_of(usage, usage.to_dict())
    (one.given / "held_out.json").write_text(json.dumps(measured))
    assert known_curve(one.given) == ([1, 2], [1.0, 0.25])
    card = card_of(tmp_path / "card", one)
    assert "![Density of each feature by rank](density.svg)" in card


def test_the_picture_has_both_axes_logarithmic():
    curves = {"a": ([1, 10, 100], [1.0, 0.1, 0.01]), "<b>": ([1], [0.5])}
    root = ElementTree.fromstring(density_svg(curves))
    svg = "{http://www.w3.org/2000/svg}"
    lines = [line.attrib["points"] for line in root.iter(f"{svg}polyline")]
    points = [tuple(map(float, point.split(","))) for point in lines[0].split()]
    middle = (LEFT + RIGHT) / 2
    assert [x for x, _ in points] == [LEFT, middle, RIGHT]
    top = 20 + 2 * 20  # below two lines of legend
    assert [y for _, y in points] == [top, (top + BOTTOM) / 2, BOTTOM]
    texts = {text.text for text in root.iter(f"{svg}text")}
    assert {"a", "<b>", "1", "10", "100", "100%", "10%", "1%"} <= texts
    assert not re.search(r"https?://(?!www\.w3\.org)", density_svg(curves))
