"""Folders of results: held by one process, written whole, and nothing of others touched."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_alloc.training.output_folder import (
    LOCK_FILENAME,
    PARTIAL_PREFIX,
    READY_PREFIX,
    locked_folder,
    new_files,
    require_empty,
    require_other_folder,
)

HOLD = """
import sys
from pathlib import Path
from sae_lens_alloc.training.output_folder import locked_folder
with locked_folder(Path(sys.argv[1]), "output_path"):
    print("held", flush=True)
    sys.stdin.read()
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path: Path):
    folder, link = tmp_path / "out", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with held_by_another_process(folder) as process:
        for name in (folder, link):
            with (
                pytest.raises(ValueError, match="output_path .* is in use by another"),
                locked_folder(name, "output_path"),
            ):
                pass
        process.kill()
        process.wait()
    assert (folder / LOCK_FILENAME).exists()  # a killed process leaves it
    with locked_folder(folder, "output_path"), locked_folder(link, "output_path"):
        pass  # once more by the same thread
    assert list(folder.iterdir()) == []


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path):
    with locked_folder(tmp_path / "a" / "b", "output_path"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked_folder(tmp_path / "mine" / "b", "output_path"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []
    with locked_folder(tmp_path / "c", "output_path"):
        (tmp_path / "c" / "sae").write_text("")
    assert contents(tmp_path / "c") == {"sae": b""}


@pytest.mark.parametrize("way", ["file", "file/below", "dangling"])
def test_what_cannot_be_made_is_one_sentence(way: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "for good")
    with (
        pytest.raises(OSError, match=f"^output_path '{tmp_path / way}' cannot be writ"),
        locked_folder(tmp_path / way, "output_path"),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


def test_files_are_replaced_when_all_are_written(tmp_path: Path):
    (tmp_path / "cfg.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path.with_name(f"{tmp_path.name}.partial")).mkdir()
    with new_files(tmp_path, "the SAE") as folder:
        # the output's own file system, whatever it is linked to or mounted on
        assert folder.parent == tmp_path
        for name in ("cfg.json", "weights"):
            (folder / name).write_text("new")
        assert (tmp_path / "cfg.json").read_text() == "old"
    assert contents(tmp_path) == {
        "cfg.json": b"new",
        "weights": b"new",
        "notes.txt": b"mine",
    }
    assert tmp_path.with_name(f"{tmp_path.name}.partial").is_dir()


def test_files_stay_where_writing_fails(tmp_path: Path):
    (tmp_path / "cfg.json").write_text("old")
    with pytest.raises(KeyError), new_files(tmp_path, "the SAE") as folder:
        (folder / "cfg.json").write_text("new")
        raise KeyError
    assert contents(tmp_path) == {"cfg.json": b"old"}


@pytest.mark.parametrize("by", ["python", "safetensors", "torch"])
def test_a_limit_of_the_size_is_one_sentence(by: str, tmp_path: Path):
    (tmp_path / "weights").write_text("old")
    large = torch.zeros(100_000)
    with (
        file_size_limit(10_000),
        pytest.raises(OSError, match=f"^the SAE cannot be written to '{tmp_path}': "),
        new_files(tmp_path, "the SAE") as folder,
    ):
        if by == "python":
            (folder / "weights").write_bytes(bytes(400_000))
        elif by == "safetensors":
            save_file({"large": large}, folder / "weights")
        else:
            torch.save(large, folder / "weights")
    assert contents(tmp_path) == {"weights": b"old"}


def test_an_error_that_is_not_about_writing_stays_what_it_is(tmp_path: Path):
    with (
        pytest.raises(RuntimeError, match="^shapes$"),
        new_files(tmp_path, "the SAE"),
    ):
        raise RuntimeError("shapes")


def test_what_a_killed_process_left_is_completed(tmp_path: Path):
    """Killed while its files were moved to their place, and while it wrote others."""
    ready, partial = tmp_path / f"{READY_PREFIX}1", tmp_path / f"{PARTIAL_PREFIX}2"
    for folder in (ready, partial):
        folder.mkdir()
        (folder / "cfg.json").write_text(folder.name)
    (tmp_path / "weights").write_text("new")  # moved already
    with locked_folder(tmp_path, "output_path"):
        pass
    assert contents(tmp_path) == {"weights": b"new", "cfg.json": ready.name.encode()}


def test_a_folder_name_may_be_as_long_as_the_system_allows(tmp_path: Path):
    folder = tmp_path / ("x" * 255)
    with locked_folder(folder, "output_path"), new_files(folder, "the SAE") as new:
        (new / "cfg.json").write_text("")
    assert contents(folder) == {"cfg.json": b""}


def test_empty_is_what_holds_nothing_but_what_is_expected(tmp_path: Path):
    require_empty(tmp_path / "nowhere", "output_path", False)
    (tmp_path / LOCK_FILENAME).write_text("")
    require_empty(tmp_path, "output_path", False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_path .* is not empty: give --overwr"):
        require_empty(tmp_path, "output_path", False)
    require_empty(tmp_path, "output_path", False, frozenset({"notes.txt"}))
    require_empty(tmp_path, "output_path", True)


def test_the_source_is_no_output_by_any_name(tmp_path: Path):
    source, link = tmp_path / "source", tmp_path / "link"
    source.mkdir()
    link.symlink_to(source)
    for output in (source, link, os.path.relpath(source)):
        with pytest.raises(ValueError, match="is the folder of the SAE itself"):
            require_other_folder(output, source, "the SAE itself")
    require_other_folder(tmp_path, source, "the SAE itself")
    require_other_folder(None, source, "the SAE itself")
    require_other_folder(tmp_path, "release:id", "the SAE itself")


def test_a_file_system_without_locks_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As some network file systems, none of which is here."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked_folder(tmp_path / "out", "output_path"):
        (tmp_path / "out" / "sae").write_text("")
    assert "cannot be locked" in caplog.text
    assert contents(tmp_path / "out") == {"sae": b""}
