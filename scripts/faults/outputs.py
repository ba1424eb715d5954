"""
Runs into what lies in the way of a result, and counts what comes of it.

    python -m scripts.faults.outputs --output faults_outputs.json

Every case is a fork of this process in a folder of its own, with an SAE of an older run in
`out` and checkpoints of that run in `checkpoints/run`. A good outcome is one sentence or a
finished run, without a file lost. Cases that need root or a file system to mount are left out
where there is none.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import torch  # noqa: E402
from sae_lens import SAE, llm_sae_training_runner  # noqa: E402

import sae_lens_alloc  # noqa: E402
from sae_lens_alloc import cli, load_runner_config  # noqa: E402
from sae_lens_alloc.training import (  # noqa: E402
    final_sae,
    fine_tuning_run,
    output_folder,
    runner,
    trainer,
)
from sae_lens_alloc.training.activations_store import (  # noqa: E402
    ResumableActivationsStore,
)

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
CONFIG = str(DEMO / "mutual_choice.yaml")
FINE_TUNING = str(Path(__file__).parents[2] / "configs" / "finetune_demo.yaml")
SECONDS_PER_CASE = 120
# 4 steps of 256 tokens, with a checkpoint after the second
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
RUN = [*TINY, *SIZES, *CHECKPOINTS]

# Where a run can be: the function that is called there.
PHASES: dict[str, tuple[Any, str]] = {
    "model": (llm_sae_training_runner, "load_model"),
    "held-out contexts": (ResumableActivationsStore, "hold_out"),
    "step": (trainer.AllocSAETrainer, "step"),
    "metrics": (trainer, "append_row"),
    "checkpoint": (trainer, "publish_checkpoint"),
    "first save": (final_sae, "write_sae"),
    "moving": (output_folder, "_move_to_their_place"),
    "replacing": (os, "replace"),
    "calibration": (runner, "calibrate_thresholds"),
    "held-out metrics": (runner, "held_out_metrics"),
    "second save": (runner, "write_sae"),
    "check": (runner, "check_saved_sae"),
}
AFTER_TRAINING = ("calibration", "held-out metrics", "second save", "check")

Action = Callable[[], Any]
# Given the exit code and what was said: what was lost, or nothing.
Check = Callable[[int, str], str | None]


def no_check(code: int, said: str) -> str | None:
    return None


@dataclass
class Case:
    name: str
    command: list[str] | Action
    prepare: Action = lambda: None
    check: Check = no_check
    at: dict[str, Action] = field(default_factory=dict)
    clean_up: Action = lambda: None


# What is done on the way. The current folder is the case's own.


def send(number: int) -> Action:
    return lambda: os.kill(os.getpid(), number)


def limit_files(n_bytes: int) -> Action:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def fill(folder: str) -> Action:
    def act() -> None:
        try:
            with open(f"{folder}/filler", "wb") as file:
                while True:
                    file.write(bytes(65536))
        except OSError:
            pass

    return act


def mount(folder: str, size: str) -> None:
    os.makedirs(folder)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    subprocess.run(command, check=True)


def unmount(folder: str) -> None:
    subprocess.run(["umount", "-l", folder], check=True)


def start(*args: str, wait_for: str) -> None:
    """The same in another process, up to a file that it makes; it runs on beside the case."""
    if os.fork() == 0:
        run_child(list(args), {}, Path("other.txt"))
    deadline = time.monotonic() + SECONDS_PER_CASE
    while not list(Path().glob(wait_for)) and time.monotonic() < deadline:
        time.sleep(0.01)


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


def refused(*folders: str) -> Check:
    """As `kept`, and the run said in one sentence why it did not start."""

    def check(code: int, said: str) -> str | None:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code != 1 or len(errors) != 1:
            return f"not refused: exit code {code}"
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


def overwriting() -> Iterator[Case]:
    bad = {
        "hook": "hook_name=nowhere",
        "dataset": "dataset_path=/no/such",
        "hub dataset": "dataset_path=nobody/nothing",
        "model": "model_name=/no/such",
        "d_in": "sae.d_in=100",
        "device": "device=cuda:7",
        "learning rate": "lr=1e30",
    }
    for name, setting in bad.items():
        args = train("output_path=out", "checkpoint_path=null", setting, "--overwrite")
        yield Case(f"overwrite with bad {name}", args, check=kept("out"))
        args = finetune("output_path=out", "checkpoint_path=null", "--overwrite")
        if not setting.startswith("sae."):
            args = [*args, "--from", "source", setting]
            yield Case(
                f"finetune over with bad {name}",
                args,
                lambda: shutil.copytree("out", "source"),
                kept("out"),
            )
    args = train("output_path=out", "--overwrite")
    yield Case("overwrite with good settings", args, check=old_or_new)
    yield Case(
        "not empty",
        train("output_path=out", "checkpoint_path=null"),
        check=refused("out"),
    )


def own_sources() -> Iterator[Case]:
    link = partial(os.symlink, "out", "link")
    for output, prepare in {"out": lambda: None, "link": link}.items():
        yield Case(
            f"finetune into its source as {output}",
            finetune("--from", "out", f"output_path={output}", "--overwrite"),
            prepare,
            refused("out"),
        )
        yield Case(
            f"calibrate into its source as {output}",
            ["calibrate", "out", "--output", output, "--overwrite"],
            prepare,
            refused("out"),
        )
        yield Case(
            f"train into what it starts from as {output}",
            train(f"output_path={output}", "from_pretrained_path=out", "--overwrite"),
            prepare,
            refused("out"),
        )
        checkpoint = "checkpoints/run/512"
        yield Case(
            f"train into the checkpoint it resumes as {output}",
            train(
                "output_path=other",
                f"resume_from_checkpoint={checkpoint}",
                "--overwrite",
            ),
            lambda: os.symlink("checkpoints/run/512", "other"),
            refused("out", checkpoint),
        )


def places() -> Iterator[Case]:
    def beside() -> None:
        os.makedirs("new.partial")
        Path("new.partial/notes.txt").write_text("mine")

    def check_beside(code: int, said: str) -> str | None:
        if contents("new.partial") != {"notes.txt": b"mine"}:
            return "new.partial is another"
        return saved()(code, said)

    fresh = train("output_path=new")
    yield Case("a folder of the user's named .partial", fresh, beside, check_beside)
    long = "x" * 255
    yield Case("a long name", train(f"output_path={long}"), check=saved(long))

    def empty_folder() -> None:
        os.makedirs("new")
        os.chdir("new")

    def from_inside() -> None:
        os.chdir("new")
        cli.app(train("output_path=."))

    yield Case("the current folder", from_inside, partial(os.makedirs, "new"), saved())
    for name, prepare in {
        "a file": lambda: Path("new").write_text("mine"),
        "a dangling link": lambda: os.symlink("gone/for/good", "new"),
    }.items():
        yield Case(f"{name} as output", fresh, prepare, refused("out"))
        args = train("output_path=other", "checkpoint_path=new")
        yield Case(f"{name} as checkpoint folder", args, prepare, refused("out"))
    for name in ("cfg.json", "metrics.jsonl", "sae_weights.safetensors"):
        prepare = partial(os.makedirs, f"new/{name}")
        args = [*fresh, "--overwrite"]
        yield Case(f"a folder named {name}", args, prepare, refused("out"))
    args = train("output_path=new", "resume_from_checkpoint=checkpoints/run")
    for row in ("no row", "[]", '{"stp": 1}'):

        def damaged(row: str = row) -> None:
            os.makedirs("new")
            Path("new/metrics.jsonl").write_text(f"{row}\n")

        yield Case(f"resumed with metrics {row}", args, damaged, refused("out"))

    def folder_for_a_file() -> None:
        shutil.copytree("checkpoints/run/512", "checkpoints/run/768")
        path = Path("checkpoints/run/768/sae_weights.safetensors")
        path.unlink()
        path.mkdir()

    yield Case("a folder in a checkpoint", args, folder_for_a_file, saved())
    yield Case(
        "checkpoints of another run",
        train("output_path=new", "logger.wandb_id=run"),
        check=refused("out", "checkpoints/run/512"),
    )
    yield Case(
        "no room",
        train(
            "output_path=new",
            "training_tokens=1000000000000",
            "n_checkpoints=1000000000",
        ),
        check=refused("out"),
    )


def at_once() -> Iterator[Case]:
    hold = partial(start, *train("output_path=new"), wait_for="new/metrics.jsonl")
    yield Case(
        "two runs into one output", train("output_path=new"), hold, refused("out")
    )
    args = train("output_path=other", "logger.wandb_id=shared")
    hold = partial(
        start,
        *train("output_path=new", "logger.wandb_id=shared", "training_tokens=10240"),
        wait_for="checkpoints/shared/.sae*",
    )
    yield Case("two runs with one checkpoint folder", args, hold, refused("out"))

    def twice() -> None:
        overrides = [*RUN, "output_path=new", "checkpoint_path=null"]
        for seed in (1, 2):
            cfg = load_runner_config(CONFIG, [*overrides, f"seed={seed}"])
            try:
                runner.AllocSAETrainingRunner(cfg).run()
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)

    yield Case("the Python runner twice", twice, check=saved())


def limits() -> Iterator[Case]:
    fresh = train("output_path=new", "save_final_checkpoint=true")
    for phase in ("metrics", "checkpoint", "first save", "second save"):
        # no file may grow to more, from there on
        at = {phase: limit_files(1000)}
        check = saved() if phase == "second save" else kept("out")
        yield Case(f"size limit from {phase} on", fresh, check=check, at=at)
        args = train("output_path=out", "--overwrite")
        name = f"size limit from {phase} on, overwriting"
        yield Case(name, args, check=old_or_new, at=at)
    yield Case(
        "size limit in calibrate",
        ["calibrate", "out", "--output", "new", "--tokens", "4096"],
        check=refused("out"),
        at={"load": limit_files(1000)},
    )
    yield Case(
        "size limit in the report of finetune",
        finetune("--from", "out", "output_path=new", "checkpoint_path=null"),
        check=saved(),
        at={"report": limit_files(1000)},
    )


def other_disks() -> Iterator[Case]:
    link = partial(os.symlink, "disk", "new")
    end = partial(unmount, "disk")

    def with_link() -> None:
        mount("disk", "20m")
        link()

    fresh = train("output_path=new", "checkpoint_path=null")
    yield Case("a link to another disk", fresh, with_link, saved(), clean_up=end)
    yield Case(
        "a mount",
        train("output_path=disk"),
        partial(mount, "disk", "20m"),
        saved("disk"),
        clean_up=end,
    )
    yield Case(
        "a disk that is too small",
        train("output_path=disk"),
        partial(mount, "disk", "100k"),
        refused("out"),
        clean_up=end,
    )
    for phase in ("metrics", "checkpoint", "first save", "second save"):

        def check(code: int, said: str, phase: str = phase) -> str | None:
            if phase == "second save":
                return saved("disk/sae")(code, said)
            if phase == "checkpoint":
                return kept("out")(code, said)
            (elsewhere,) = Path("tmp").glob("sae-lens-alloc-*")
            return saved(str(elsewhere))(code, said)

        yield Case(
            f"a disk that fills up at {phase}",
            train("output_path=disk/sae", "checkpoint_path=disk/checkpoints"),
            partial(mount, "disk", "20m"),
            check,
            {phase: fill("disk")},
            end,
        )

    def unwritable() -> None:
        os.makedirs("parent/new")
        subprocess.run(["chattr", "+i", "parent"], check=True)

    yield Case(
        "a parent that is not writable",
        train("output_path=parent/new"),
        unwritable,
        saved("parent/new"),
        clean_up=lambda: subprocess.run(["chattr", "-i", "parent"], check=True),
    )


def signals() -> Iterator[Case]:
    for phase in PHASES:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            at = {phase: send(number)}
            name = f"{signal.Signals(number).name} at {phase}"
            check = saved() if phase in AFTER_TRAINING else kept("out")
            yield Case(name, train("output_path=new"), check=check, at=at)
            args = train("output_path=out", "--overwrite")
            yield Case(f"{name}, overwriting", args, check=old_or_new, at=at)


def last_step() -> Iterator[Case]:
    def calibrated_on(change: Callable[[torch.Tensor], None]) -> Action:
        def act() -> None:
            calibrate = runner.calibrate_thresholds

            def changed(sae: Any, x: torch.Tensor) -> Any:
                change(x)
                return calibrate(sae, x)

            runner.calibrate_thresholds = changed
            cli.app(train("output_path=new"))

        return act

    nan = calibrated_on(lambda x: x[3].fill_(torch.nan))
    yield Case("NaN in the calibration", nan, check=saved())
    high = calibrated_on(lambda x: x.fill_(0))
    yield Case("no affinities in the calibration", high, check=saved())

    def named() -> None:
        shutil.copytree(DEMO / "model", "my model")

    yield Case(
        "a name that W&B refuses",
        train("output_path=new", "model_name=my model", "logger.log_to_wandb=true"),
        named,
        refused("out"),
    )


PHASES["load"] = (cli, "recalibrate")
PHASES["report"] = (fine_tuning_run, "write_report")


def cases() -> Iterator[Case]:
    yield from overwriting()
    yield from own_sources()
    yield from places()
    yield from at_once()
    yield from limits()
    yield from last_step()
    yield from signals()
    if os.geteuid() == 0 and sys.platform == "linux":
        yield from other_disks()


def run_child(command: list[str] | Action, at: dict[str, Action], log: Path) -> None:
    """In a fork: runs the command line with all it says in a file, and ends the process."""
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        tempfile.tempdir = str(Path("tmp").absolute())
        runner.CALIBRATION_TOKENS = fine_tuning_run.EVALUATION_TOKENS = 1024
        for phase, action in at.items():
            owner, name = PHASES[phase]
            setattr(owner, name, before_first_call(getattr(owner, name), action))
        if callable(command):
            command()
        else:
            cli.app(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def before_first_call(function: Callable[..., Any], action: Action) -> Any:
    done = False

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if not done:
            done = True
            action()
        return function(*args, **kwargs)

    return wrapped


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """What came of a case, and the details."""
    os.chdir(folder)
    try:
        case.prepare()
        child = os.fork()
        if child == 0:
            run_child(case.command, case.at, Path("said.txt"))
        deadline = time.monotonic() + SECONDS_PER_CASE
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "endless", ""
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        said = Path("said.txt").read_text(errors="replace")
        if "Traceback" in said:
            return "traceback", said[said.index("Traceback") :]
        lost = case.check(code, said)
        last = [line for line in said.splitlines() if line.strip()][-1:]
        return ("loss", f"{lost}; {last}") if lost else ("ok", "".join(last))
    finally:
        case.clean_up()


def make_template(folder: Path) -> None:
    (folder / "tmp").mkdir(parents=True)
    os.chdir(folder)
    child = os.fork()
    if child == 0:
        args = train("output_path=out", "logger.wandb_id=run", "training_tokens=768")
        run_child(args, {}, Path("said.txt"))
    os.waitpid(child, 0)
    Path("out/notes.txt").write_text("mine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("faults_outputs.json"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    output = args.output.absolute()
    torch.set_num_threads(1)
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        make_template(base / "template")
        for number, case in enumerate(cases()):
            if args.only not in case.name:
                continue
            folder = base / str(number)
            shutil.copytree(base / "template", folder, symlinks=True)
            what, details = outcome(case, folder)
            results[case.name] = {"outcome": what, "details": details}
            print(f"{what:<10} {case.name}: {details[-300:]}", flush=True)
            os.chdir(base)
            shutil.rmtree(folder, ignore_errors=True)
    counts = Counter(result["outcome"] for result in results.values())
    counts = {key: counts[key] for key in ("ok", "traceback", "endless", "loss")}
    print(counts)
    output.write_text(json.dumps({"counts": counts, "cases": results}, indent=1) + "\n")
    sys.exit(counts["ok"] != len(results))


if __name__ == "__main__":
    main()
