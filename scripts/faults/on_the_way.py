"""What happens to a run on its way: full disks, limits, signals, failures after the last step."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sae_lens_alloc_cli as cli
from sae_lens_alloc.training import after_training
from scripts.faults.forks import (
    PHASES,
    Action,
    Case,
    fill,
    limit_files,
    mount,
    send,
    unmount,
)
from scripts.faults.older_run import (
    DEMO,
    NO_CHECKPOINTS,
    finetune,
    kept,
    old_or_new,
    refused,
    saved,
    train,
)

AFTER_TRAINING = ("calibration", "held-out metrics", "second save", "check")


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
        at={"recalibration": limit_files(1000)},
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

    fresh = train("output_path=new", *NO_CHECKPOINTS)
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
            if phase in ("checkpoint", "second save"):
                return saved("disk/sae")(code, said)
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
    for number in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(number).name
        yield Case(
            f"{name} in calibrate",
            ["calibrate", "out", "--output", "new", "--tokens", "4096"],
            check=kept("out"),
            at={"recalibration": send(number)},
        )
        yield Case(
            f"{name} in the report of finetune",
            finetune("--from", "out", "output_path=new", "checkpoint_path=null"),
            check=saved(),
            at={"report": send(number)},
        )


def last_step() -> Iterator[Case]:
    def calibrated_on(change: Callable[[torch.Tensor], object]) -> Action:
        def act() -> None:
            calibrate = after_training.calibrate_thresholds

            def changed(sae: Any, x: torch.Tensor) -> Any:
                change(x)
                return calibrate(sae, x)

            after_training.calibrate_thresholds = changed
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
