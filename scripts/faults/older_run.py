"""The run whose results the cases find in their folder, and what must hold of them afterwards."""

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from sae_lens import SAE

import sae_lens_alloc
from sae_lens_alloc.training import output_folder
from scripts.faults.counting import Outcome, chosen
from scripts.faults.forks import Case, Check, outcome, run_child

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
CONFIG = str(DEMO / "mutual_choice.yaml")
FINE_TUNING = str(Path(__file__).parents[2] / "configs" / "finetune_demo.yaml")
# 4 steps of 256 tokens
TINY = [
    f"model_name={DEMO / 'model'}",
    f"dataset_path={DEMO / 'corpus'}",
    "hook_name=transformer.h.0",
    "training_tokens=1024",
    "train_batch_size_tokens=256",
    "store_batch_size_prompts=4",
    "n_batches_in_buffer=4",
    "logger.wandb_log_frequency=1",
]
CHECKPOINTS = ["checkpoint_path=checkpoints", "n_checkpoints=1"]
SIZES = ["sae.d_sae=64", "sae.k=4"]
NO_CHECKPOINTS = ["checkpoint_path=null", "n_checkpoints=0"]
RUN = [*TINY, *SIZES, *CHECKPOINTS]
# The older run: 40 steps, so that its SAE is worth to be trained further.
OLD = ["training_tokens=10240", "output_path=out", "logger.wandb_id=run"]
OLD_CHECKPOINT = "checkpoints/run/5376"


def make_template(folder: Path) -> None:
    (folder / "tmp").mkdir(parents=True)
    os.chdir(folder)
    child = os.fork()
    if child == 0:
        run_child(train(*OLD), {}, os.open("said.txt", os.O_WRONLY | os.O_CREAT))
    os.waitpid(child, 0)
    Path("out/notes.txt").write_text("mine")


def outcomes_of(cases: Iterable[Case], options: Namespace) -> list[Outcome]:
    """What came of the cases that the options ask for, each printed when it has ended."""
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        make_template(base / "template")
        named = [(case.name, case) for case in cases]
        for number, (name, case) in enumerate(chosen(named, options)):
            folder = base / str(number)
            shutil.copytree(base / "template", folder, symlinks=True)
            outcomes.append(Outcome(name, *outcome(case, folder)))
            print(outcomes[-1], flush=True)
            os.chdir(base)
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


# What must hold afterwards.


def contents(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def kept(*folders: str) -> Check:
    """Every file of the older run is as it was."""

    def check(code: int, said: str) -> str | None:
        for folder in folders:
            found = contents(folder)
            for name, content in contents(f"../template/{folder}").items():
                if found.get(name) != content:
                    return f"{folder}/{name} is another"
        return None

    return check


def refused(*folders: str, naming: str = "") -> Check:
    """As `kept`, and the run said in one sentence, with a name in it, why it did not start."""

    def check(code: int, said: str) -> str | None:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code != 1 or len(errors) != 1:
            return f"not refused: exit code {code}"
        if naming not in errors[0]:
            return f"refused for something else than {naming}"
        return kept(*folders)(code, said)

    return check


def saved(folder: str = "new") -> Check:
    """There is an SAE that SAELens loads, once what a killed run left is completed."""

    def check(code: int, said: str) -> str | None:
        try:
            with output_folder.locked_folder(Path(folder), "output_path"):
                weights = SAE.load_from_disk(folder).W_dec
        except Exception as error:
            return f"{folder} holds no SAE: {error!r}"
        return None if torch.isfinite(weights).all() else "the weights are not finite"

    return check


def old_or_new(code: int, said: str) -> str | None:
    """The output holds the older SAE with its metrics, or a whole new one."""
    if (lost := saved("out")(code, said)) is not None:
        return lost
    found, old = contents("out"), contents("../template/out")
    if found["notes.txt"] != b"mine":
        return "notes.txt is another"
    is_old = found["sae_weights.safetensors"] == old["sae_weights.safetensors"]
    if is_old and kept("out")(code, said):
        return "a mixture of old and new"
    if not is_old and found["metrics.jsonl"] == old["metrics.jsonl"]:
        return "a new SAE with old metrics"
    return None


def train(*settings: str) -> list[str]:
    return ["train", CONFIG, *RUN, *settings]


def finetune(*settings: str) -> list[str]:
    return ["finetune", FINE_TUNING, *TINY, *settings]
