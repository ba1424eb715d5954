"""
Damaged SAE folders given to `calibrate`, `finetune` and `compare`, and how each of them ends.

    python scripts/faults/sae_folders.py [--json COUNTS.json]

Each damage is done to a fresh copy of a whole SAE of the demo's language model. The commands run
in this process, with a time limit each. A case is

- refused: in one sentence, and nothing was written;
- worked: what was written, if anything, is an SAE of finite figures;
- traceback: any other exception, or more than one line;
- endless: not over in time;
- lost: the damaged folder was changed, or something was left where the result goes.

Exits with 1 unless all cases were refused or worked.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sae_lens_alloc
from sae_lens_alloc.cli import app
from sae_lens_alloc.evaluation.saved_sae import load_sae

ROOT = Path(__file__).parents[2]
DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SECONDS = 60
SIZES = {"d_in": 192, "d_sae": 64}
OUTCOMES = ("refused", "worked", "traceback", "endless", "lost")
Damage = Callable[[Path], object]


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


def damages() -> Iterator[tuple[str, Damage]]:
    """Every damage by its name, done to a copy of a whole SAE."""
    yield from config_damages()
    yield from weight_damages()
    for name in (CFG, WEIGHTS):
        yield f"{name} missing", lambda f, name=name: (f / name).unlink()
        yield f"{name} empty", lambda f, name=name: (f / name).write_bytes(b"")
        yield f"{name} a folder", lambda f, name=name: as_folder(f / name)
        yield f"{name} unreadable", lambda f, name=name: (f / name).chmod(0)
        yield f"{name} a link to itself", lambda f, name=name: as_loop(f / name)
        yield (
            f"{name} random bytes",
            lambda f, name=name: (f / name).write_bytes(bytes(range(7, 251)) * 9),
        )
    yield "folder empty", lambda f: [path.unlink() for path in f.iterdir()]
    for text in ("[]", "{", '{"scaling_factor": "x"}', '{"scaling_factor": -1}'):
        yield (
            f"activation_scaler.json {text}",
            lambda f, text=text: (f / "activation_scaler.json").write_text(text),
        )


def config_damages() -> Iterator[tuple[str, Damage]]:
    texts = [
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        "[[" * 50_000,
        "\x00\x01",
        '{"d_in": 8}',
    ]
    for text in texts:
        yield f"cfg.json {text[:12]!r}", lambda f, t=text: (f / CFG).write_text(t)
    for share in range(1, 16):
        yield f"cfg.json cut at {share}/16", lambda f, s=share: cut(f / CFG, s / 16)
    values: dict[str, list[Any]] = {
        "architecture": [
            *("standard", "gated", "topk", "jumprelu", "batchtopk", "transcoder"),
            *("temporal", "rbf", None, 3, ["topk"], {}),
        ],
        "d_in": [0, -1, 8, 193, 1e30, 10**400, "192", None, 1.5, [192], True],
        "d_sae": [0, -1, 8, 65, 1e30, 10**15, "64", None, 1.5, [64]],
        "k": [0, -1, 65, 10**30, "4", None, [4]],
        "dtype": ["float33", None, 16, "int64", "bfloat16", ["float32"]],
        "device": [7, None, "nowhere"],
        "apply_b_dec_to_input": ["yes", None, 2],
        "normalize_activations": ["always", 3, None],
        "reshape_activations": ["hook_q", 3],
        "metadata": [None, [], "text", 7, {}, {"self": 1}],
        "decoder_init_norm": ["big", None],
    }
    for key, of_key in values.items():
        for value in of_key:
            yield (
                f"cfg.json {key} {str(value)[:20]}",
                lambda f, k=key, v=value: change_json(f / CFG, {k: v}),
            )
        yield f"cfg.json without {key}", lambda f, k=key: change_json(f / CFG, {}, k)
    metadata: dict[str, list[Any]] = {
        "context_size": ["256", 0, -4, None, 1.5, 10**30],
        "hook_name": ["nowhere", 3, ["a"], ""],
        "model_name": ["/no/such/model", 3, ""],
        "model_class_name": ["NoSuchClass", 3],
        "dataset_path": ["/no/such/text", 3, ["a"]],
        "seqpos_slice": [3, "1", [1, 2, 3, 4], [0, 8, 0], ["a"]],
        "prepend_bos": ["no", 3],
        "exclude_special_tokens": ["no", [1.5]],
        "model_from_pretrained_kwargs": [[], "x"],
        "training_architecture_details": [[], "x", {"k": "4"}, {"k": -1}],
        "l0": ["many", -3, [1]],
        "sae_lens_version": ["x", 6, ""],
    }
    for key, of_key in metadata.items():
        for value in of_key:
            yield (
                f"metadata {key} {str(value)[:20]}",
                lambda f, k=key, v=value: change_metadata(f / CFG, {k: v}),
            )


def weight_damages() -> Iterator[tuple[str, Damage]]:
    for share in range(1, 33):
        yield f"weights cut at {share}/33", lambda f, s=share: cut(f / WEIGHTS, s / 33)
    for byte in (1, 7, 8, 9, 20):
        yield f"weights cut at byte {byte}", lambda f, n=byte: cut_at(f / WEIGHTS, n)
    for byte in (*range(12), *range(16, 140, 9)):
        yield f"weights byte {byte} flipped", lambda f, n=byte: flip(f / WEIGHTS, n)
    yield (
        "weights a pickle",
        lambda f: torch.save({"W_enc": torch.ones(2)}, f / WEIGHTS),
    )
    yield "weights a text", lambda f: (f / WEIGHTS).write_text("weights\n" * 50)
    yield "weights of no tensor", lambda f: save_file({}, f / WEIGHTS)
    yield "a tensor more", lambda f: change(f, "more", lambda _: torch.ones(3))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        for what, make in TENSORS.items():
            yield (
                f"{name} {what}",
                lambda f, n=name, make=make: change(f, n, make),
            )
    yield "threshold inf", lambda f: change(f, "threshold", lambda t: t + torch.inf)


TENSORS: dict[str, Callable[[Any], Any]] = {
    "missing": lambda _: None,
    "transposed": lambda t: t.t().contiguous() if t.ndim == 2 else t[:, None],
    "of a row less": lambda t: t[1:].contiguous(),
    "of no row": lambda t: t[:0].contiguous(),
    "a scalar": lambda t: t.flatten()[0].clone(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "float16": lambda t: t.half(),
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "with one inf": lambda t: t.index_fill(0, torch.tensor([1]), torch.inf),
    "1e30": lambda t: torch.full_like(t, 1e30),
    "zero": torch.zeros_like,
    "times 1000": lambda t: t * 1000,
}


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def cut(path: Path, share: float) -> None:
    cut_at(path, int(path.stat().st_size * share))


def cut_at(path: Path, n_bytes: int) -> None:
    os.truncate(path, n_bytes)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x15
    path.write_bytes(content)


def change_json(path: Path, values: dict[str, Any], without: str | None = None) -> None:
    content = {**json.loads(path.read_text()), **values}
    content.pop(without, None)
    path.write_text(json.dumps(content))


def change_metadata(path: Path, values: dict[str, Any]) -> None:
    metadata = json.loads(path.read_text())["metadata"]
    change_json(path, {"metadata": {**metadata, **values}})


def change(folder: Path, name: str, make: Callable[[Any], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = make(tensors.get(name, torch.ones(64)))
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--json", type=Path, help="where to write counts and cases")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {}
    cases: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        saes = whole_saes(Path(temporary) / "whole")
        for sae in saes:
            for name, damage in [("nothing", lambda _: None), *damages()]:
                folder = Path(temporary) / "damaged"
                shutil.copytree(sae, folder)
                if not can(damage, folder):
                    shutil.rmtree(folder)
                    continue
                output = Path(temporary) / "output"
                for command, run in commands(folder, output).items():
                    outcome, said = outcome_of(run, folder, output)
                    counts.setdefault(command, Counter())[outcome] += 1
                    case = {"sae": sae.name, "damage": name, "command": command}
                    cases.append({**case, "outcome": outcome, "said": said[:300]})
                    if outcome not in ("refused", "worked"):
                        print(f"{outcome}: {sae.name}, {name}, {command}: {said[:300]}")
                    shutil.rmtree(output, ignore_errors=True)
                shutil.rmtree(folder)
    n_folders = len({(case["sae"], case["damage"]) for case in cases}) - len(saes)
    print(f"{n_folders} damaged folders")
    for command, of_command in counts.items():
        print(command, {name: of_command[name] for name in OUTCOMES})
    if args.json:
        totals = {
            command: {name: of_command[name] for name in OUTCOMES}
            for command, of_command in counts.items()
        }
        document = {"damaged_folders": n_folders, "counts": totals, "cases": cases}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(case["outcome"] not in ("refused", "worked") for case in cases))


def can(damage: Damage, folder: Path) -> bool:
    """Does a damage, and says whether it could be done to this kind of SAE."""
    try:
        damage(folder)
    except IndexError:  # a byte that the file has not
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
