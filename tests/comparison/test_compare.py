"""The command, run for real on a tiny synthetic comparison."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from sae_lens import SAE
from typer.testing import CliRunner

from sae_lens_alloc.comparison.finished import known_cells
from sae_lens_alloc.comparison.results import SCHEMA, summary
from sae_lens_alloc.comparison.stream import StoredStream
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc_cli import app
from tests.comparison.conftest import small_settings, write_config

pytestmark = pytest.mark.slow


def without_ids(page: str) -> str:
    """A page without what plotly makes up anew each time."""
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "", page)


def compare(config: Path, output: Path, *args: str) -> Any:
    return CliRunner().invoke(
        app, ["compare", str(config), "--output", str(output), *args]
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = small_settings()
    settings["compare"]["k"] = [2]
    settings["compare"]["rows"]["stock"]["l1_coefficient"] = [0.01]
    return write_config(settings, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def output(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compare") / "output"
    result = compare(config, output, "--jobs", "2")
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_the_results_are_of_their_schema(results: dict[str, Any]):
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(results)
    cell = results["cells"][results["points"][0]["runs"][0]["cell"]]
    del cell["measured"]["test"]["2"]["l0"]
    assert not validator.is_valid(results)


def test_every_row_has_every_seed(output: Path):
    points = json.loads((output / "results.json").read_text())["points"]
    assert [
        (point["row"], point["k"], [run["seed"] for run in point["runs"]])
        for point in points
    ] == [("ours", 2, [0, 1]), ("stock", 2, [0, 1])]


def test_saved_saes_have_the_wanted_l0_on_the_validation_split(output: Path):
    """500 samples, 2 features each."""
    (folder,) = output.glob("activations-*")
    validation = StoredStream(folder).split("validation")
    saved = sorted(output.glob("cells/*/l0-2"))
    assert len(saved) == 4
    for path in saved:
        sae = SAE.load_from_disk(path)
        assert sae.cfg.architecture() == "jumprelu"
        l0 = measure_usage(as_user(sae), validation).l0
        assert l0 == pytest.approx(2.0, rel=0.01)
        assert sae.cfg.metadata.l0 == pytest.approx(l0)  # not that of training


def test_saved_saes_of_samples_name_no_language_model(output: Path):
    for path in output.glob("cells/*/l0-2"):
        metadata = SAE.load_from_disk(path).cfg.metadata
        assert metadata.model_name is None
        assert metadata.activations is None
        assert metadata.provenance["seed"] in (0, 1)


def test_test_figures_are_those_of_the_saved_sae(output: Path):
    (folder,) = output.glob("activations-*")
    test = StoredStream(folder).split("test")
    cells = json.loads((output / "results.json").read_text())["cells"]
    assert len(cells) == 4
    for key, cell in cells.items():
        sae = SAE.load_from_disk(output / "cells" / key / "l0-2")
        x_hat = sae(test)
        ev = 1 - (x_hat - test).square().sum() / (test - test.mean(0)).square().sum()
        measured = cell["measured"]["test"]["2"]
        assert measured["explained_variance"] == pytest.approx(ev.item(), abs=1e-5)
        firings = (sae.encode(test) > 0).sum(0).sort(descending=True).values
        # few features, so every rank is a point of the curve
        assert measured["density_curve"]["firings"] == firings[firings > 0].tolist()


def test_other_seeds_train_with_the_best_learning_rate(tmp_path: Path):
    """Of 1e-2 and 1e-6 the larger one is better at every k."""
    settings = small_settings()
    settings["compare"]["lr"] = [1e-6, 1e-2]
    del settings["compare"]["rows"]["stock"]
    output = tmp_path / "output"
    result = compare(write_config(settings, tmp_path), output, "--jobs", "2")
    assert result.exit_code == 0, result.output
    trained = {path.parent.name[:-9] for path in output.glob("cells/*/cell.json")}
    assert trained == {
        *(f"ours-k{k}-lr{lr}-seed0" for k in (2, 3) for lr in ("1e-06", "0.01")),
        *(f"ours-k{k}-lr0.01-seed1" for k in (2, 3)),
    }
    points = json.loads((output / "results.json").read_text())["points"]
    assert [(p["k"], p["chosen"]["lr"], len(p["tried"])) for p in points] == [
        (2, 1e-2, 2),
        (3, 1e-2, 2),
    ]


def test_an_experiment_leaves_the_test_split_unseen(config: Path, tmp_path: Path):
    output = tmp_path / "output"
    settings = ("compare.measured_on=validation", "compare.seeds=[0]")
    result = compare(config, output, *settings, "--jobs", "2")
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert len(results["cells"]) == 2
    for cell in results["cells"].values():
        (measured,) = cell["measured"]["validation"].values()
        (validation,) = cell["validation"].values()
        assert measured["explained_variance"] == pytest.approx(
            validation["explained_variance"], abs=1e-6
        )
    assert "measured on the validation split" in (output / "report.html").read_text()
    assert not list(output.rglob("test*.json"))


def test_what_has_finished_is_not_done_again(config: Path, output: Path):
    trained = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*/*")}
    (lost,) = output.glob("cells/stock-*-seed1-*/cell.json")
    lost.unlink()
    (output / "results.json").unlink()
    result = compare(config, output)
    assert result.exit_code == 0, result.output
    again = {
        path.parts[-3]
        for path, time in trained.items()
        if path.stat().st_mtime_ns != time
    }
    assert again == {lost.parent.name}


def test_what_has_finished_is_compared(config: Path, output: Path, tmp_path: Path):
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    (lost,) = partial.glob("cells/stock-*-seed1-*/cell.json")
    lost.unlink()
    (partial / "results.json").unlink()
    (partial / "comparison.yaml").write_text("of a run that goes on")
    result = compare(config, partial, "--finished")
    assert result.exit_code == 0, result.output
    assert not lost.exists()
    assert (partial / "comparison.yaml").read_text() == "of a run that goes on"
    before, after = (
        json.loads((folder / "results.json").read_text())
        for folder in (output, partial)
    )
    jsonschema.validate(after, json.loads(SCHEMA.read_text()))
    assert (before["complete"], after["complete"]) == (True, False)
    ours, stock = after["points"]
    assert ours == before["points"][0]
    assert stock["runs"] == before["points"][1]["runs"][:1]
    page = (partial / "report.html").read_text()
    assert "This is what had finished so far" in page
    assert (
        "This is what had finished so far" not in (output / "report.html").read_text()
    )


def test_results_are_enough_to_draw_the_report_again(
    config: Path, output: Path, tmp_path: Path
):
    shutil.copy(output / "results.json", tmp_path)
    result = compare(config, tmp_path, "--finished")
    assert result.exit_code == 0, result.output
    for name in ("results.json", "report.html"):
        assert without_ids((tmp_path / name).read_text()) == without_ids(
            (output / name).read_text()
        )


def test_results_are_enough_to_go_on_from(config: Path, output: Path, tmp_path: Path):
    """As on another machine: one cell is unknown, the others' SAEs are not there."""
    results = json.loads((output / "results.json").read_text())
    (lost,) = (
        key
        for key in results["cells"]
        if key.startswith("stock-l1_coefficient0.01-lr0.01-seed1-")
    )
    known = results["cells"].pop(lost)
    (tmp_path / "results.json").write_text(json.dumps(results))
    result = compare(config, tmp_path, "--jobs", "3")
    assert result.exit_code == 0, result.output
    assert [path.parent.name for path in tmp_path.glob("cells/*/cell.json")] == [lost]
    after = json.loads((tmp_path / "results.json").read_text())
    assert after["complete"]
    assert after["machine"]["jobs"] == 3
    again = after["cells"].pop(lost)
    assert after["cells"] == results["cells"]
    # trained anew, on the same activations from the same weights
    assert again["measured"] == known["measured"]


def test_saes_may_be_deleted_to_save_room(config: Path, output: Path, tmp_path: Path):
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    for folder in partial.glob("cells/*/l0-*"):
        shutil.rmtree(folder)
    result = compare(config, partial, "--jobs", "3")
    assert result.exit_code == 0, result.output
    before, after = (
        json.loads((folder / "results.json").read_text())
        for folder in (output, partial)
    )
    assert after["cells"] == before["cells"]
    assert after["machine"] == before["machine"]  # nothing was trained on this one
    assert not list(partial.glob("cells/*/l0-*"))


def test_figures_of_an_earlier_training_are_not_those_of_a_later_one(
    config: Path, output: Path, tmp_path: Path
):
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    for figures in partial.glob("cells/*/l0-*/test.json"):
        figures.unlink()
    (again,) = partial.glob("cells/ours-*-seed0-*/cell.json")
    facts = json.loads(again.read_text())
    again.write_text(json.dumps({**facts, "seconds": facts["seconds"] + 1}))
    cells = known_cells(partial)
    assert [key for key, cell in cells.items() if not cell["measured"]] == [
        again.parent.name
    ]


def test_cells_of_other_settings_stay_in_the_results(
    config: Path, output: Path, tmp_path: Path
):
    shutil.copy(output / "results.json", tmp_path)
    before = json.loads((tmp_path / "results.json").read_text())["cells"]
    result = compare(config, tmp_path, "--finished", "compare.seeds=[0]")
    assert result.exit_code == 0, result.output
    after = json.loads((tmp_path / "results.json").read_text())
    assert after["cells"] == before
    assert [[run["seed"] for run in point["runs"]] for point in after["points"]] == [
        [0],
        [0],
    ]


def test_figures_on_another_split_need_the_sae(
    config: Path, output: Path, tmp_path: Path
):
    shutil.copy(output / "results.json", tmp_path)
    before = (tmp_path / "results.json").read_text()
    result = compare(config, tmp_path, "compare.measured_on=validation")
    assert result.exit_code == 1
    assert "only its figures are left" in result.stderr
    assert (tmp_path / "results.json").read_text() == before


def test_nothing_has_finished(config: Path, tmp_path: Path):
    result = compare(config, tmp_path / "output", "--finished")
    assert result.exit_code == 1
    assert "no SAE of this comparison has finished in" in result.stderr
    assert not (tmp_path / "output").exists()


def test_a_folder_of_something_else_is_left_alone(config: Path, tmp_path: Path):
    (tmp_path / "results.json").write_text("mine")
    result = compare(config, tmp_path)
    assert result.exit_code == 1
    assert "holds something that is not a comparison" in result.stderr
    assert (tmp_path / "results.json").read_text() == "mine"
    (tmp_path / "results.json").rename(tmp_path / "notes")
    result = compare(config, tmp_path)
    assert result.exit_code == 1
    assert "holds something that is not a comparison" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(tmp_path: Path):
    """A learning rate of 1e15 diverges; a bfloat16 row is measured as any other."""
    settings = small_settings()
    settings["compare"] |= {
        "k": [2],
        "seeds": [0],
        "rows": {
            "bad": {"architecture": "batchtopk", "lr": [1e15]},
            "bf16": {"architecture": "mutual_choice", "dtype": "bfloat16"},
        },
    }
    config, output = write_config(settings, tmp_path), tmp_path / "output"
    result = compare(config, output, "--jobs", "2")
    assert result.exit_code == 1
    results = json.loads((output / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    ((key, why),) = results["failed"].items()
    assert key.startswith("bad-k2-lr1e+15-seed0")
    assert result.stderr.splitlines()[-1].startswith(
        "error: 1 of 2 SAEs failed, which the same command tries again "
    )
    assert result.stderr.endswith(f"says more): {key}: {why}.\n")
    assert not results["complete"]
    bad, bf16 = results["points"]
    assert (bad["chosen"], bad["runs"], bad["tried"][0]["failed"]) == (None, [], why)
    assert bf16["over_seeds"]["mcc"]["mean"] > 0
    assert "What failed" in (output / "report.html").read_text()

    logs = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/log.txt")}
    result = compare(config, output)
    assert result.exit_code == 1
    again = [path for path, time in logs.items() if path.stat().st_mtime_ns != time]
    assert [path.parent.name for path in again] == [key]


def test_figures_that_are_no_numbers_are_had_again(
    config: Path, output: Path, tmp_path: Path
):
    """As earlier versions wrote them for a training that had diverged."""
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    (partial / "results.json").unlink()
    (path,) = partial.glob("cells/ours-*-seed0-*/cell.json")
    facts = json.loads(path.read_text())
    facts["validation"]["2"]["explained_variance"] = math.nan
    path.write_text(json.dumps(facts))
    result = compare(config, partial, "--finished")
    assert result.exit_code == 1
    assert f"{path.parent.name}: its explained variance on the" in result.stderr
    result = compare(config, partial)
    assert result.exit_code == 0, result.output
    results = json.loads((partial / "results.json").read_text())
    assert (results["complete"], results["failed"]) == (True, {})


def test_an_sae_that_cannot_be_measured_leaves_the_others(
    config: Path, output: Path, tmp_path: Path
):
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    (partial / "results.json").unlink()
    (folder,) = partial.glob("cells/ours-*-seed1-*/l0-2")
    (folder / "test.json").unlink()
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    result = compare(config, partial)
    assert result.exit_code == 1
    assert f"{folder.parent.name}: l0-2 on the test split: " in result.stderr
    assert f"{str(weights)!r} is damaged" in result.stderr
    results = json.loads((partial / "results.json").read_text())
    assert [len(point["runs"]) for point in results["points"]] == [1, 2]
    weights.write_bytes(whole)
    assert compare(config, partial).exit_code == 0
    results = json.loads((partial / "results.json").read_text())
    assert [len(point["runs"]) for point in results["points"]] == [2, 2]


@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_activations_that_have_changed_are_not_trained_on(
    harm: str, config: Path, output: Path, tmp_path: Path
):
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    (lost,) = partial.glob("cells/ours-*-seed1-*/cell.json")
    lost.unlink()
    (partial / "results.json").unlink()
    (train,) = partial.glob("activations-*/train.bin")
    content = bytearray(train.read_bytes())
    content[1000] ^= 1
    {
        "cut": lambda: train.write_bytes(content[:5000]),
        "changed": lambda: train.write_bytes(content),
        "gone": train.unlink,
    }[harm]()
    result = compare(config, partial)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the stored activations are damaged, since ")
    assert f"remove the folder {str(train.parent)!r}, and the same" in result.stderr
    assert not lost.exists()
    if harm == "cut":  # what the sentence says to do is what helps
        shutil.rmtree(train.parent)
        assert compare(config, partial).exit_code == 0


def test_a_damaged_cell_is_named(config: Path, output: Path, tmp_path: Path):
    partial = tmp_path / "partial"
    shutil.copytree(output, partial)
    (path,) = partial.glob("cells/ours-*-seed1-*/cell.json")
    for text, said in (("{", "holds no JSON"), ("{}", "does not say its seconds")):
        path.write_text(text)
        result = compare(config, partial)
        assert result.exit_code == 1
        assert f"error: {str(path)!r} is damaged, since it {said}" in result.stderr


def test_a_summary_is_mean_and_range_over_the_seeds():
    runs = [
        {
            "seconds": seconds,
            "peak_memory_bytes": 10,
            "l0": l0,
            "l0_histogram": [1],
            "zipf": zipf,
        }
        for seconds, l0, zipf in ((1.0, 8.0, {"alpha": 1.0}), (3.0, 9.0, None))
    ]
    assert summary(runs) == {
        "seconds": {"mean": 2.0, "min": 1.0, "max": 3.0},
        "peak_memory_bytes": {"mean": 10, "min": 10, "max": 10},
        "l0": {"mean": 8.5, "min": 8.0, "max": 9.0},
    }


def test_samples_are_the_same_whatever_was_drawn_before(output: Path, config: Path):
    from sae_lens_alloc.comparison.config import load_comparison
    from sae_lens_alloc.comparison.synthetic import SyntheticSubject

    torch.manual_seed(123)
    folder = output.parent / "again"
    again = SyntheticSubject(load_comparison(config)[0]).write(folder)
    (stored,) = output.glob("activations-*")
    for split in ("train", "validation", "test"):
        assert torch.equal(again.split(split), StoredStream(stored).split(split))
    assert not torch.equal(again.split("validation"), again.split("test"))
