"""
Damaged SAE folders given to `calibrate`, `finetune` and `compare`, and how each of them ends.

    python -m scripts.faults.sae_folders [--json COUNTS.json] [--every N] [--only TEXT]

Each damage is done to a fresh copy of a whole SAE of the demo's language model. The commands run
in this process, with a time limit each. A case is

- refused: in one sentence, and nothing was written;
- worked: what was written, if anything, is an SAE of finite figures;
- traceback: any other exception, or more than one line;
- endless: not over in time;
- lost: the damaged folder was changed, or something was left where the result goes.

Exits with 1 unless all cases were refused or worked.
"""

import json
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from typer.testing import CliRunner

import sae_lens_alloc
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc_cli import app
from scripts.faults.counting import Outcome, chosen, finish, read_options
from scripts.faults.sae_damages import CFG, Damage, damages

ROOT = Path(__file__).parents[2]
DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
SECONDS = 60
SIZES: dict[str, Any] = {"d_in": 192, "d_sae": 64}


class OutOfTime(BaseException):
    """Not to be caught as an error."""


def whole_saes(folder: Path) -> list[Path]:
    """A jumprelu and a topk SAE as SAELens saves them, and a checkpoint of ours."""
    torch.manual_seed(0)
    metadata = {
        "model_name": str(DEMO / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "dataset_path": str(DEMO / "corpus"),
        "hook_name": "transformer.h.0",
        "context_size": 256,
        "training_architecture_details": {"k": 4},
    }
    saes: dict[str, Any] = {
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**SIZES)),
        "topk": TopKSAE(TopKSAEConfig(**SIZES, k=4)),
        "checkpoint": sae_lens_alloc.MutualChoiceTrainingSAE(
            sae_lens_alloc.MutualChoiceTrainingSAEConfig(
                **SIZES, k=4, feature_choice_steps=0
            )
        ),
    }
    for name, sae in saes.items():
        with torch.no_grad():
            sae.W_dec.mul_(0.1)
            if name == "jumprelu":
                sae.threshold.fill_(0.1)
        sae.cfg.metadata = SAEMetadata(**metadata)
        sae.save_model(folder / name)
    return [folder / name for name in saes]


def contents(folder: Path) -> dict[str, bytes | str]:
    """What is in a folder, links and folders by their kind."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "other"
        for path in sorted(folder.rglob("*"))
    }


def commands(folder: Path, output: Path) -> dict[str, Callable[[], None]]:
    """What is run on a folder; each raises ValueError for a sentence."""
    return {
        "calibrate": lambda: invoke(
            *("calibrate", str(folder), "--output", str(output)),
            *("--l0", "4", "--tokens", "2048"),
        ),
        "finetune": lambda: invoke(
            *("finetune", str(ROOT / "configs" / "finetune_demo.yaml")),
            *("--from", str(folder), "--dry-run", "sae={architecture: mutual_choice}"),
        ),
        # what `compare` does with the SAEs in its cells
        "compare": lambda: torch.isfinite(
            load_sae(folder).eval().encode(torch.ones(2, 192))
        ).all(),  # type: ignore[func-returns-value]
    }


def invoke(*args: str) -> None:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        said = [
            line for line in result.stderr.splitlines() if "Loading weights" not in line
        ]
        last = said[-1] if said else ""
        if not last.startswith("error: ") or any(
            x.startswith("error") for x in said[:-1]
        ):
            raise RuntimeError(f"not one sentence: {result.stderr[-300:]!r}")
        if "to see where" in last:  # an exception that nobody foresaw
            raise RuntimeError(last)
        raise ValueError(last)


def outcome_of(
    run: Callable[[], object], folder: Path, output: Path
) -> tuple[str, str]:
    """How a command ends, and what it said."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = contents(folder)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        run()
        outcome, said = "worked", ""
    except ValueError as error:
        said = str(error)
        outcome = "refused" if "\n" not in said else "traceback"
    except OutOfTime:
        outcome, said = "endless", ""
    except BaseException as error:
        outcome, said = "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if contents(folder) != before or (outcome != "worked" and output.exists()):
        outcome = "lost"
    if outcome == "worked" and output.exists():
        figures = json.loads(
            (output / CFG).read_text(), parse_constant=lambda name: [name] * 99
        )["metadata"]["calibration"]
        if any(isinstance(figure, list) for figure in figures.values()):
            outcome, said = "lost", f"figures that are no numbers: {figures}"
    return outcome, said


def main() -> int:
    """Runs all cases, prints counts, and returns the exit code."""
    options = read_options(__doc__)
    warnings.simplefilter("ignore")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary) / "damaged", Path(temporary) / "output"
        damaged = [
            (f"{sae.name}, {name}", (sae, damage))
            for sae in whole_saes(Path(temporary) / "whole")
            for name, damage in [("nothing", lambda _: None), *damages()]
        ]
        for name, (sae, damage) in chosen(damaged, options):
            shutil.copytree(sae, folder)
            possible = can(damage, folder)
            for command, run in commands(folder, output).items() if possible else ():
                outcome, said = outcome_of(run, folder, output)
                outcomes.append(Outcome(f"{command}: {name}", outcome, said[:300]))
                if outcome not in ("refused", "worked"):
                    print(outcomes[-1], flush=True)
                shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(folder)
    return finish(outcomes, options.json)


def can(damage: Damage, folder: Path) -> bool:
    """Does a damage, and says whether it could be done to this kind of SAE."""
    try:
        damage(folder)
    except IndexError:  # a byte that the file has not
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
