"""`compare` on one's own activations, which stay where they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE

from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.comparison.own_stream import OwnStream, open_stream
from sae_lens_alloc.comparison.shared_activations import make_subject
from tests.cli.commands import invoke
from tests.comparison.conftest import small_settings, write_config

N = {"train": 1500, "validation": 400, "test": 300}


def rows(split: str) -> np.ndarray:
    draw = np.random.default_rng(list(N).index(split))
    directions = np.random.default_rng(9).normal(size=(20, 8))
    shape = (N[split], 20)
    codes = draw.random(shape) * (draw.random(shape) < 0.15)
    return (codes @ directions).astype(np.float16)


def write_rows(folder: Path) -> dict[str, str]:
    """Each split in two files."""
    for split in N:
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "0.npy", rows(split)[:250])
        np.save(folder / split / "1.npy", rows(split)[250:])
    return {split: str(folder / split) for split in N}


def own_settings(folder: Path) -> dict[str, Any]:
    settings = small_settings()
    compare = settings["compare"]
    del compare["synthetic"]
    compare |= {"activations": write_rows(folder), "k": [2], "seeds": [0]}
    compare["rows"]["stock"] = {"architecture": "topk"}
    return settings


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    config = write_config(own_settings(folder / "acts"), folder)
    result = invoke("compare", str(config), "--output", str(folder / "output"))
    assert result.exit_code == 0, result.output
    return folder / "output"


def test_figures_are_those_of_the_saved_sae_on_the_test_split(output: Path):
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    assert results["subject"] == {
        "kind": "own_activations",
        "activations": "acts/train",  # not where that is on this machine
        "d_in": 8,
        "d_sae": 16,
        "tokens": {"train": 2560, "validation": 400, "test": 300},
    }
    test = torch.from_numpy(rows("test").astype(np.float32))
    for key, cell in results["cells"].items():
        sae = SAE.load_from_disk(output / "cells" / key / "l0-2")
        ev = (
            1 - (sae(test) - test).square().sum() / (test - test.mean(0)).square().sum()
        )
        measured = cell["measured"]["test"]["2"]
        assert measured["explained_variance"] == pytest.approx(ev.item(), abs=1e-5)
        assert ev > 0.2
    assert "variance explained" in (output / "report.html").read_text()


def test_saved_saes_say_which_activations_they_are_of(output: Path):
    saved = list(output.glob("cells/*/l0-2"))
    assert saved
    for path in saved:
        metadata = SAE.load_from_disk(path).cfg.metadata
        assert Path(metadata.activations).parts[-2:] == ("acts", "train")
        assert metadata.model_name is None


def test_activations_are_not_copied(output: Path):
    (folder,) = output.glob("activations-*")
    assert [path.name for path in folder.iterdir()] == ["stream.json"]
    stream = open_stream(folder)
    assert isinstance(stream, OwnStream)
    batches = stream.training_batches(50)
    served = torch.cat([next(batches) for _ in range(30)])
    train = torch.from_numpy(rows("train").astype(np.float32))
    # an epoch, each row once, in the same order for whoever reads it
    assert torch.equal(_sorted(served), _sorted(train))
    assert not torch.equal(served, train)
    again = open_stream(folder)
    assert again is not None
    assert torch.equal(next(again.training_batches(1500)), served)
    assert stream.split("test").tolist() == rows("test").tolist()


def _sorted(found: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(found.tolist()))


def test_a_comparison_on_other_rows_under_the_same_path_is_refused(tmp_path: Path):
    config = write_config(own_settings(tmp_path / "acts"), tmp_path)
    subject = make_subject(load_comparison(config)[0])
    stream = subject.write(tmp_path / "stream")
    stream.verify()
    file = tmp_path / "acts" / "test" / "1.npy"
    np.save(file, rows("test")[250:] + 1)
    with pytest.raises(ValueError, match=r"test/1.npy' is not what it was when"):
        stream.verify()
    np.save(file, rows("test")[251:])
    with pytest.raises(ValueError, match="is not what it was"):
        open_stream(tmp_path / "stream")


def test_no_more_than_wanted_is_measured(tmp_path: Path):
    settings = own_settings(tmp_path / "acts")
    settings["compare"]["eval_samples"] = 350
    subject = make_subject(load_comparison(write_config(settings, tmp_path))[0])
    stream = subject.write(tmp_path / "stream")
    assert stream.counts == {"train": 2560, "validation": 350, "test": 300}
    assert stream.split("validation").shape == (350, 8)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"heldout_path": "x"}, "compare needs one of heldout_path"),
        (
            {"activations": {"train": "a", "test": "b"}},
            "must have a path each for train",
        ),
        (
            {"activations": {"train": "a", "validation": "b", "test": "./a"}},
            "and no path twice",
        ),
        (
            {"activations": None, "heldout_path": "x", "activations_column": "y"},
            "leave it",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    compare: dict[str, Any], message: str, tmp_path: Path
):
    settings = own_settings(tmp_path / "acts")
    settings["compare"] |= compare
    with pytest.raises(ValueError, match=message):
        load_comparison(write_config(settings, tmp_path))


def test_a_language_model_beside_them_is_refused(tmp_path: Path):
    settings = {**own_settings(tmp_path / "acts"), "model_name": "gpt2"}
    with pytest.raises(ValueError, match="model_name is 'gpt2', but the run is on"):
        load_comparison(write_config(settings, tmp_path))


def test_activations_that_do_not_fit_are_refused_before_any_training(tmp_path: Path):
    settings = own_settings(tmp_path / "acts")
    settings["sae"]["d_in"] = 9
    subject = make_subject(load_comparison(write_config(settings, tmp_path))[0])
    with pytest.raises(
        ValueError, match="train: .* rows of 8 numbers, but the SAEs take 9"
    ):
        subject.write(tmp_path / "stream")
    damaged = rows("test").astype(np.float32)
    damaged[3, 3] = np.inf
    np.save(tmp_path / "acts" / "test" / "0.npy", damaged)
    settings["sae"]["d_in"] = 8
    subject = make_subject(load_comparison(write_config(settings, tmp_path))[0])
    with pytest.raises(ValueError, match=r"row 3 of '.*test/0.npy'"):
        subject.write(tmp_path / "stream")
    assert not (tmp_path / "stream").exists()
