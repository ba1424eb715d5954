"""`sae-lens-alloc features`, on an SAE of the shipped language model."""

import json
from pathlib import Path

import pytest
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from tests.cli.commands import CONFIG, DEMO, contents, invoke
from tests.features.reading import data_of

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")


def test_features_writes_a_page(saved: Path, tmp_path: Path):
    before = contents(saved)
    output = tmp_path / "new" / "page.html"
    options = ("--tokens", "2000", "--features", "0-9,63")
    result = invoke("features", str(saved), "--output", str(output), *options)
    assert result.exit_code == 0, result.stderr
    assert f"saved in {output} (" in result.stdout
    assert contents(saved) == before
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    data = data_of(output)
    assert list(data["features"]) == [*range(10), 63]
    assert data["title"] == saved.name
    assert data["no_lens"] is None
    # the text of the SAE's training, in whole contexts of its length
    context_size = SAE.load_from_disk(saved).cfg.metadata.context_size
    assert data["length"] == context_size
    assert 2000 <= data["n_tokens"] < 2000 + context_size

    # again: refused, unless it is asked for
    written = output.read_bytes()
    result = invoke("features", str(saved), "--output", str(output), *options)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: --output '{output}' exists: give --overwrite to replace it, or another "
        "--output.\n"
    )
    assert output.read_bytes() == written
    options = ("--tokens", "600", "--features", "5", "--overwrite")
    result = invoke("features", str(saved), "--output", str(output), *options)
    assert result.exit_code == 0, result.stderr
    assert list(data_of(output)["features"]) == [5]


def test_a_stock_sae_with_a_config_and_short_text(tmp_path: Path):
    """Of SAELens' standard architecture, which says nothing of its text."""
    StandardSAE(StandardSAEConfig(d_in=192, d_sae=16)).save_model(tmp_path / "sae")
    text = tmp_path / "text"
    text.mkdir()
    (text / "text.jsonl").write_text(
        json.dumps({"text": "value = compute(value)\n" * 200})
    )
    output = tmp_path / "page.html"
    options = ("--config", CONFIG, "--dataset", str(text), "--output", str(output))
    options += ("--model", str(DEMO / "model"))
    result = invoke("features", str(tmp_path / "sae"), *options)
    assert result.exit_code == 0, result.stderr
    assert "the text ended after " in result.stdout
    assert " of 100,000 tokens\n" in result.stdout
    assert len(data_of(output)["features"]) == 16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--features", "0-64"),
            "names feature 64, but the features of this SAE are 0 to 63.",
        ),
        (("--features", "a"), "--features is 'a', but must be numbers and ranges"),
        (
            ("--dataset", "/no/such"),
            "dataset_path is '/no/such', but there is no such folder.",
        ),
        (
            ("--model", "/no/such"),
            "model_name is '/no/such', but there is no such folder.",
        ),
        (("--device", "gpu"), "--device must be a torch device"),
    ],
)
def test_bad_options_are_one_sentence(
    saved: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
):
    output = tmp_path / "page.html"
    result = invoke("features", str(saved), "--output", str(output), *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sae", "output", "sentence"),
    [
        ("/no/such", "page.html", "'/no/such' is neither a folder nor RELEASE:ID"),
        ("no-such-release:0", "page.html", "there is no release 'no-such-release'"),
        (".", "page.html", "holds no SAE of SAELens: cfg.json is missing."),
        (".", "", "is a folder: give the name of a file."),
        (".", "file/page.html", "is not a folder that can be written to."),
    ],
)
def test_no_sae_or_no_place_is_one_sentence(
    tmp_path: Path, sae: str, output: str, sentence: str
):
    (tmp_path / "file").write_text("")
    name = str(tmp_path) if sae == "." else sae
    result = invoke("features", name, "--output", str(tmp_path / output))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_sae_of_another_width_is_refused_before_the_model_is_loaded(
    saved: Path, tmp_path: Path
):
    sae = StandardSAE(StandardSAEConfig(d_in=100, d_sae=16))
    sae.save_model(tmp_path / "narrow")
    output = ("--output", str(tmp_path / "page.html"))
    result = invoke("features", str(tmp_path / "narrow"), *output, "--config", CONFIG)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the SAE takes activations of 100 dimensions, but sae.d_in of "
        f"'{CONFIG}' is 192: give the config of a run on its activations.\n"
    )
    # the metadata of an SAE of the language model, and weights of another
    cfg = json.loads((tmp_path / "narrow" / "cfg.json").read_text())
    known = json.loads((saved / "cfg.json").read_text())
    cfg["metadata"] = known["metadata"]
    (tmp_path / "narrow" / "cfg.json").write_text(json.dumps(cfg))
    result = invoke("features", str(tmp_path / "narrow"), *output)
    assert result.exit_code == 1
    assert "has 192 dimensions" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
