"""Commands in forks of this process, interrupted or hindered on the way, and what comes of them."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sae_lens_alloc_cli as cli
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.thresholds import recalibration
from sae_lens_alloc.training import (
    after_training,
    checkpointing_trainer,
    final_sae,
    fine_tuning_run,
    output_folder,
    runner,
    sourced_runner,
    trainer,
)

SECONDS_PER_CASE = 120
UNCAUGHT = 99  # exit code after an exception that nobody made a sentence of

# Where a run can be: the function that is called there.
PHASES: dict[str, tuple[Any, str]] = {
    "model": (sourced_runner, "load_language_model"),
    "held-out contexts": (ResumableActivationsStore, "hold_out"),
    "step": (trainer.AllocSAETrainer, "step"),
    "metrics": (trainer, "append_row"),
    "checkpoint": (checkpointing_trainer, "publish_checkpoint"),
    "first save": (final_sae, "write_sae"),
    "moving": (output_folder, "_move_to_their_place"),
    "replacing": (os, "replace"),
    "calibration": (after_training, "calibrate_thresholds"),
    "held-out metrics": (after_training, "held_out_metrics"),
    "second save": (after_training, "write_sae"),
    "check": (after_training, "check_saved_sae"),
}
OTHER_PHASES: dict[str, tuple[Any, str]] = {
    "recalibration": (recalibration, "recalibrate"),
    "report": (fine_tuning_run, "write_report"),
}

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
        run_child(list(args), {}, os.open("other.txt", os.O_WRONLY | os.O_CREAT))
    deadline = time.monotonic() + SECONDS_PER_CASE
    while not list(Path().glob(wait_for)) and time.monotonic() < deadline:
        time.sleep(0.01)


def run_child(command: list[str] | Action, at: dict[str, Action], output: int) -> None:
    """In a fork: runs the command with all it says to a descriptor, and ends the process."""
    code = UNCAUGHT
    try:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        # ignored where a shell started this in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = str(Path("tmp").absolute())
        runner.CALIBRATION_TOKENS = fine_tuning_run.EVALUATION_TOKENS = 1024
        for phase, action in at.items():
            owner, name = (PHASES | OTHER_PHASES)[phase]
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


def read(pipe: int) -> bytes:
    """What there is to read."""
    content = b""
    try:
        while part := os.read(pipe, 65536):
            content += part
    except BlockingIOError:
        pass
    return content


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """What came of a case, one of `counting.OUTCOMES`, and the details."""
    os.chdir(folder)
    try:
        case.prepare()
        # a pipe, since a limit of the size of files is one of the log, too
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        child = os.fork()
        if child == 0:
            run_child(case.command, case.at, writing)
        os.close(writing)
        deadline = time.monotonic() + SECONDS_PER_CASE
        said = b""
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            said += read(reading)
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "endless", ""
            time.sleep(0.02)
        said = (said + read(reading)).decode(errors="replace")
        os.close(reading)
        code = os.waitstatus_to_exitcode(ended[1])
        if code == UNCAUGHT or "Traceback" in said:
            return "traceback", said[said.find("Traceback") :]
        lost = case.check(code, said)
        words = ("error: ", "interrupted", "saved in")
        last = "".join([x for x in said.splitlines() if x.startswith(words)][-1:])
        last = last or f"ended with {code}"
        if lost:
            return "lost", f"{lost}; {last}"
        return "refused" if last.startswith("error: ") else "worked", last
    finally:
        case.clean_up()
