"""Which checkpoint a run is resumed from."""

import json
import logging
from pathlib import Path

import pytest

from sae_lens_alloc.training.checkpoint import (
    MANIFEST_FILENAME,
    PARTIAL_PREFIX,
    find_checkpoint,
    partial_path,
    publish_checkpoint,
)

FILES = ("cfg.json", "runner_cfg.json", "sae_weights.safetensors", "trainer_state.pt")


def write(folder: Path, content: str = "{}") -> Path:
    """The files of a checkpoint, as SAELens leaves them."""
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(content)
    return folder


def save(base: Path, n_tokens: int, content: str = "{}") -> Path:
    """A whole checkpoint of ours."""
    checkpoint = base / str(n_tokens)
    write(partial_path(checkpoint), content)
    publish_checkpoint(checkpoint, n_tokens)
    return checkpoint


def test_last_one_is_found_in_the_folder_that_holds_them(tmp_path: Path):
    for n_tokens in (512, 1024, 256):
        save(tmp_path, n_tokens)
    assert find_checkpoint(tmp_path) == tmp_path / "1024"
    assert find_checkpoint(str(tmp_path / "512")) == tmp_path / "512"


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILENAME])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_one_is_skipped_with_a_message(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(tmp_path, 256)
    file = save(tmp_path, 512) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (b"?" if damage == "changed" else b""))
    if (name, damage) == (MANIFEST_FILENAME, "missing"):
        # what is left cannot be told from a checkpoint of SAELens
        assert find_checkpoint(tmp_path) == tmp_path / "512"
        return
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == tmp_path / "256"
    state = "missing" if damage == "missing" else "damaged"
    assert (
        f"Skipping the checkpoint {tmp_path / '512'}: {name} is {state}" in caplog.text
    )
    with pytest.raises(ValueError, match=f"512 cannot be resumed from: {name} is"):
        find_checkpoint(tmp_path / "512")


def test_half_written_one_is_skipped_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(tmp_path, 256)
    # all that SAELens writes is there, but the checksums are not
    partial = write(partial_path(tmp_path / "512"))
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == tmp_path / "256"
    assert f"{partial}: it was not written to the end" in caplog.text
    save(tmp_path, 768)
    assert not partial.exists()


def test_folder_without_a_whole_one_is_refused(tmp_path: Path):
    (tmp_path / "256").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint in .* start anew"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        find_checkpoint(tmp_path / "nowhere")


def test_final_one_is_not_resumed_from(tmp_path: Path):
    save(tmp_path, 256)
    write(partial_path(tmp_path / "final_512"))
    publish_checkpoint(tmp_path / "final_512", 512)
    assert find_checkpoint(tmp_path) == tmp_path / "256"
    (tmp_path / "final_512").rename(partial_path(tmp_path / "final_512"))
    assert find_checkpoint(tmp_path) == tmp_path / "256"


def test_one_of_the_same_name_is_replaced(tmp_path: Path):
    save(tmp_path, 256, content='{"old": 1}')
    save(tmp_path, 256, content='{"new": 1}')
    assert (tmp_path / "256" / "cfg.json").read_text() == '{"new": 1}'
    assert [path.name for path in tmp_path.iterdir()] == ["256"]


def test_killed_before_the_last_one_was_renamed(tmp_path: Path):
    save(tmp_path, 256)
    partial = partial_path(tmp_path / "512")
    save(tmp_path, 512).rename(partial)
    # one of the same name was being removed to make place
    (tmp_path / "512").mkdir()
    assert find_checkpoint(tmp_path) == partial
    # it stays until there is a later one
    write(partial_path(tmp_path / "768"))
    assert find_checkpoint(tmp_path) == partial


def test_one_of_sae_lens_is_whole_if_its_last_file_is(tmp_path: Path):
    write(tmp_path / "256")
    assert find_checkpoint(tmp_path) == tmp_path / "256"
    write(tmp_path / "512")
    (tmp_path / "512" / "runner_cfg.json").write_text('{"sae": ')
    assert find_checkpoint(tmp_path) == tmp_path / "256"


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILENAME])
def test_a_folder_in_place_of_a_file_does_not_stop_the_search(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(tmp_path, 256)
    file = save(tmp_path, 512) / name
    file.unlink()
    file.mkdir()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == tmp_path / "256"
    assert f"Skipping the checkpoint {tmp_path / '512'}: {name} is " in caplog.text


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        None,
        {},
        {"n_training_samples": "many", "sha256": {}},
        {"n_training_samples": 512, "sha256": ["cfg.json"]},
    ],
)
def test_a_manifest_that_is_none_does_not_stop_the_search(
    manifest: object, tmp_path: Path
):
    save(tmp_path, 256)
    (save(tmp_path, 512) / MANIFEST_FILENAME).write_text(json.dumps(manifest))
    assert find_checkpoint(tmp_path) == tmp_path / "256"


def test_a_file_that_is_called_as_a_half_written_one_stays(tmp_path: Path):
    mine = tmp_path / f"{PARTIAL_PREFIX}notes"
    mine.write_text("mine")
    save(tmp_path, 256)
    assert mine.read_text() == "mine"
