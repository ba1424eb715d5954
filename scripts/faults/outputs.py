"""
Runs into what lies in the way of a result, and counts what comes of it.

    python -m scripts.faults.outputs [--json COUNTS.json] [--every N] [--only TEXT]

Every case is a fork of this process in a folder of its own, with an SAE of an older run in
`out` and checkpoints of that run in `checkpoints/run`. A good outcome is one sentence or a
finished run, without a file lost. Cases that need root or a file system to mount are left out
where there is none.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # read where they are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"

import sae_lens_alloc_cli as cli  # noqa: E402
from sae_lens_alloc import load_runner_config  # noqa: E402
from sae_lens_alloc.training import runner  # noqa: E402
from scripts.faults.counting import finish, read_options  # noqa: E402
from scripts.faults.forks import Case, start  # noqa: E402
from scripts.faults.older_run import (  # noqa: E402
    CONFIG,
    NO_CHECKPOINTS,
    OLD_CHECKPOINT,
    RUN,
    contents,
    finetune,
    old_or_new,
    outcomes_of,
    refused,
    saved,
    train,
)
from scripts.faults.on_the_way import (  # noqa: E402
    last_step,
    limits,
    other_disks,
    signals,
)


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
        args = train("output_path=out", *NO_CHECKPOINTS, setting, "--overwrite")
        check = refused("out", naming=setting.split("=")[0])
        yield Case(f"overwrite with bad {name}", args, check=check)
        args = finetune("output_path=out", "checkpoint_path=null", "--overwrite")
        if not setting.startswith("sae."):
            args = [*args, "--from", "source", setting]
            yield Case(
                f"finetune over with bad {name}",
                args,
                lambda: shutil.copytree("out", "source"),
                check,
            )
    args = train("output_path=out", "--overwrite")
    yield Case("overwrite with good settings", args, check=old_or_new)
    yield Case(
        "not empty",
        train("output_path=out", *NO_CHECKPOINTS),
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
        yield Case(
            f"train into the checkpoint it resumes as {output}",
            train(
                "output_path=other",
                f"resume_from_checkpoint={OLD_CHECKPOINT}",
                "--overwrite",
            ),
            lambda: os.symlink(OLD_CHECKPOINT, "other"),
            refused("out", OLD_CHECKPOINT),
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
    args = train(
        "output_path=new",
        "resume_from_checkpoint=checkpoints/run",
        "training_tokens=6144",
    )
    for row in ("no row", "[]", '{"stp": 1}'):

        def damaged(row: str = row) -> None:
            os.makedirs("new")
            Path("new/metrics.jsonl").write_text(f"{row}\n")

        yield Case(f"resumed with metrics {row}", args, damaged, refused("out"))

    def folder_for_a_file() -> None:
        shutil.copytree(OLD_CHECKPOINT, "checkpoints/run/8000")
        path = Path("checkpoints/run/8000/sae_weights.safetensors")
        path.unlink()
        path.mkdir()

    yield Case("a folder in a checkpoint", args, folder_for_a_file, saved())
    yield Case(
        "checkpoints of another run",
        train("output_path=new", "logger.wandb_id=run"),
        check=refused("out", OLD_CHECKPOINT),
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
        overrides = [*RUN, "output_path=new", *NO_CHECKPOINTS]
        for seed in (1, 2):
            cfg = load_runner_config(CONFIG, [*overrides, f"seed={seed}"])
            try:
                runner.AllocSAETrainingRunner(cfg).run()
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)

    yield Case("the Python runner twice", twice, check=saved())


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


def main() -> int:
    """Runs the cases, prints what came of them, and returns the exit code."""
    options = read_options(__doc__)
    return finish(outcomes_of(cases(), options), options.json)


if __name__ == "__main__":
    sys.exit(main())
