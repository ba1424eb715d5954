"""`sae-lens-alloc push`, by the real client of the hub to a stand-in for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from sae_lens import StandardSAE, StandardSAEConfig

from tests.cli.commands import contents, invoke
from tests.sharing.hub_stand_in import TOKEN, Hub, Repo, running_hub
from tests.training.source_saes import make_source

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")


def refused(*args: str) -> str:
    """The sentence with which a command ends."""
    result = invoke(*args)
    assert result.exit_code == 1
    assert TOKEN not in result.stdout + result.stderr
    sentence = result.stderr.splitlines()[-1]  # behind the bar of an upload
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")


def text_files(repo: Repo) -> str:
    return "".join(
        content.decode()
        for name, content in repo.files.items()
        if not name.endswith(".safetensors")
    )


def test_what_is_pushed_is_what_the_dry_run_writes(
    hub: Hub, saved: Path, tmp_path: Path
):
    before = contents(saved)
    dry = tmp_path / "dry"
    result = invoke(
        "push", str(saved), "--to", "me/saes", "--dry-run", "--output", str(dry)
    )
    assert result.exit_code == 0, result.stderr
    assert hub.asked == []
    result = invoke("push", str(saved), "--to", "me/saes")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(f"uploaded to {hub.address}/me/saes\n")
    repo = hub.repos["me/saes"]
    assert not repo.private
    assert repo.commits == ["Upload SAE sae", "Add the model card"]
    written = {
        path.relative_to(dry).as_posix(): path.read_bytes()
        for path in dry.rglob("*")
        if path.is_file()
    }
    assert repo.files == {".gitattributes": b"", **written}
    assert set(written) == {
        *("README.md", "density.svg", "sae/cfg.json", "sae/runner_cfg.json"),
        *("sae/sae_weights.safetensors", "sae/sparsity.safetensors"),
    }
    assert written["sae/sae_weights.safetensors"] == before["sae_weights.safetensors"]
    assert contents(saved) == before
    assert TOKEN not in result.stdout + result.stderr + text_files(repo)


def test_another_process_pushes_and_another_one_loads(saved: Path, tmp_path: Path):
    """With nothing but HF_ENDPOINT and HF_TOKEN set."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.getcwd(),
                "HF_ENDPOINT": hub.address,
                "HF_TOKEN": TOKEN,
                "HF_HOME": str(tmp_path),
                "HF_HUB_DISABLE_XET": "1",
            },
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    with running_hub() as hub:
        command = ("-m", "sae_lens_alloc_cli", "push", str(saved), "--to", "me/saes")
        run(*command, "--private")
        assert hub.repos["me/saes"].private
        loads = "from sae_lens import SAE; sae = SAE.from_pretrained('me/saes', 'sae')"
        shown = run("-c", f"{loads}; print(type(sae).__name__, sae.cfg.metadata.l0)")
    l0 = json.loads((saved / "cfg.json").read_text())["metadata"]["l0"]
    assert shown.split() == ["JumpReLUSAE", str(l0)]


def test_a_folder_with_several_saes(hub: Hub, saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "all" / "ours")
    StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(
        tmp_path / "all" / "theirs" / "standard"
    )
    training = make_source("batchtopk", training=True)
    training.save_model(tmp_path / "all" / "checkpoint")
    result = invoke("push", str(tmp_path / "all"), "--to", "me/saes")
    assert result.exit_code == 0, result.stderr
    files = hub.repos["me/saes"].files
    weights = {name for name in files if name.endswith("sae_weights.safetensors")}
    folders = ("checkpoint", "ours", "theirs/standard")
    assert weights == {f"{folder}/sae_weights.safetensors" for folder in folders}
    # as the SAE that anyone can load, and not the training SAE, which SAELens would upload
    config = json.loads(files["checkpoint/cfg.json"])
    assert config["architecture"] == "jumprelu"
    card = files["README.md"].decode()
    for folder in folders:
        assert f'SAE.from_pretrained("me/saes", "{folder}")' in card
        assert f'SAE.load_from_disk("saes/{folder}")' in card


def test_a_repository_that_holds_something_is_left_alone(hub: Hub, saved: Path):
    hub.repos["me/saes"] = Repo(False, {"README.md": b"mine", "other/cfg.json": b"{}"})
    command = ("push", str(saved), "--to", "me/saes")
    assert refused(*command) == (
        "me/saes is there already and holds 2 files: give --overwrite to add to it and replace "
        "files of the same name, or another name."
    )
    assert refused(*command, "--overwrite", "--private") == (
        "me/saes is there already and public: make it private on the hub, or give another name."
    )
    assert hub.repos["me/saes"].commits == []
    result = invoke(*command, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert hub.repos["me/saes"].files["other/cfg.json"] == b"{}"
    assert hub.repos["me/saes"].files["README.md"].startswith(b"---\n")
    # an empty one that was made on the web is written to
    hub.repos["me/new"] = Repo(True, {".gitattributes": b""})
    assert invoke("push", str(saved), "--to", "me/new", "--private").exit_code == 0
    assert hub.repos["me/new"].private


def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ("push", str(saved), "--to", "me/saes")
    assert refused("push", str(saved), "--to", "org/saes") == (
        "your token may not write to org/saes: run `hf auth login` with a token that may "
        "write, or set HF_TOKEN."
    )
    hub.fails_at = "/commit/"
    assert refused(*command) == (
        "the Hugging Face hub has refused to take me/saes (500, out of order): try again, with "
        "--overwrite if a part of it is there already."
    )
    hub.fails_at = None
    monkeypatch.setenv("HF_TOKEN", "hf_outdatedTokenOfAnotherPerson0")
    sentence = refused(*command)
    assert sentence == (
        "the Hugging Face hub does not accept your token: run `hf auth login` with a token "
        "that may write, or set HF_TOKEN."
    )
    monkeypatch.delenv("HF_TOKEN")
    assert refused(*command).startswith(
        "you are not logged in to the Hugging Face hub: "
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refused(*command) == (
        "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or give --dry-run."
    )


def test_without_a_network_it_is_one_sentence(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # nothing listens there
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    sentence = refused("push", str(saved), "--to", "me/saes")
    assert sentence.startswith("the Hugging Face hub cannot be reached (ConnectError: ")
    assert sentence.endswith(
        "): try again where there is a network, or give --dry-run."
    )


@pytest.mark.parametrize("name", ["saes", "me/saes/x", "me/", "/saes", "me/s aes"])
def test_a_name_that_is_none_is_refused_before_anything_is_read(
    tmp_path: Path, name: str
):
    assert refused("push", str(tmp_path), "--to", name) == (
        f"--to must be ORG/NAME or USER/NAME of the Hugging Face hub, got {name!r}."
    )


def test_a_folder_without_an_sae_is_one_sentence(hub: Hub, tmp_path: Path):
    (tmp_path / "inner").mkdir()
    command = ("push", str(tmp_path), "--to", "me/saes")
    assert refused(*command) == (
        f"'{tmp_path}' holds no SAE of SAELens, nor does a folder below it: cfg.json is missing."
    )
    (tmp_path / "inner" / "cfg.json").write_text("{}")
    assert "holds no SAE of SAELens: sae_weights.safetensors is missing" in refused(
        *command
    )
    assert hub.asked == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            (),
            "give one of --to ORG/NAME, --to-sparsify FOLDER and --to-dictionary-learning "
            "FOLDER.",
        ),
        (
            ("--to", "me/saes", "--to-sparsify", "x"),
            "give one of --to ORG/NAME, --to-sparsify FOLDER and --to-dictionary-learning "
            "FOLDER.",
        ),
        (
            ("--to-sparsify", "x", "--private"),
            "--private, --dry-run and --output go with --to ORG/NAME.",
        ),
        (
            ("--to", "me/saes", "--output", "x"),
            "--output is the folder of --dry-run: give that, too.",
        ),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, options: tuple[str, ...], sentence: str
):
    assert refused("push", str(tmp_path), *options) == sentence


def test_a_dry_run_loses_nothing(saved: Path, tmp_path: Path):
    command = ("push", str(saved), "--to", "me/saes", "--dry-run", "--output")
    assert "which must not change" in refused(*command, str(saved))
    (tmp_path / "mine").write_text("")
    assert "is not empty: give --overwrite" in refused(*command, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "secret",
    [
        {"model_from_pretrained_kwargs": {"token": "something"}},
        {"notes": ["copied: hf_abcdefghijklmnopqrstuvwxyz012345"]},
    ],
)
def test_a_token_in_a_config_is_refused_and_not_said(
    hub: Hub, saved: Path, tmp_path: Path, secret: dict[str, object]
):
    folder = tmp_path / "sae"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"].update(secret)
    (folder / "cfg.json").write_text(json.dumps(config))
    sentence = refused("push", str(folder), "--to", "me/saes")
    assert f"'{folder / 'cfg.json'}' holds a token or key under " in sentence
    assert "something" not in sentence and "hf_abc" not in sentence
    assert hub.asked == []
