"""Paths of a run mean the same from every folder."""

from pathlib import Path

import pytest

from sae_lens_alloc_cli import with_home
from tests.config.run_files import load


def test_a_tilde_is_the_home_folder(config_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("output_path", "resume_from_checkpoint", "from_pretrained_path")
    cfg = load(config_path, *(f"{key}=~/{key}" for key in (*keys, "checkpoint_path")))
    for key in keys:
        assert getattr(cfg, key) == f"/home/me/{key}"
    # SAELens adds a name of its own
    assert str(cfg.checkpoint_path).startswith("/home/me/checkpoint_path/")


def test_what_is_on_this_machine_is_recorded_by_its_whole_path(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    paths = ("dataset_path=text", "model_name=model")
    cfg = load(config_path, *paths, "model_class_name=AutoModelForCausalLM")
    assert cfg.dataset_path == str(tmp_path / "text")
    assert cfg.model_name == str(tmp_path / "model")
    # a name of TransformerLens' list, and a dataset of the hub
    cfg = load(config_path, "dataset_path=org/text", "model_name=model")
    assert (cfg.dataset_path, cfg.model_name) == ("org/text", "model")


def test_a_tilde_in_an_argument_is_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home(["train", "~/a.yaml", "output_path=~/sae", "--output=~/b"]) == [
        *("train", "/home/me/a.yaml", "output_path=/home/me/sae", "--output=/home/me/b")
    ]
    for words in (["train", "lr=1", "a~b", "--overwrite", "x="], ["run", "m", "~/a"]):
        assert with_home(words) == words
