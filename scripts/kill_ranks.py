"""
Kills processes of a training by several, and compares what comes of it with the uninterrupted run.

    python -m scripts.kill_ranks --kills 10 --folder /tmp/kill-ranks

trains a small SAE on the shipped language model by torchrun, once undisturbed, and then again and
again while a random rank is killed (kill -9) at its start, between steps, within a checkpoint and
within the final save. `--max-restarts` lets the run go on by itself. Whatever a kill leaves of the
other processes must end within 60 seconds, and each run must end with the same files, byte by byte.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import sae_lens_alloc

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
N_STEPS, BATCH = 40, 240
MAX_RESTARTS = 3
# All others must have ended so long after a kill.
SECONDS_TO_END = 60
# In which something must happen.
PATIENCE = 300
SETTINGS = {
    "model_name": DEMO / "model",
    "dataset_path": DEMO / "corpus",
    "hook_name": "transformer.h.0",
    "context_size": 64,
    "sae.d_sae": 72,
    "sae.k": 4,
    "training_tokens": N_STEPS * BATCH,
    "train_batch_size_tokens": BATCH,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 16,
    "n_checkpoints": N_STEPS // 4,
    "save_final_checkpoint": "true",
    "logger.wandb_id": "run",
    "logger.wandb_log_frequency": 1,
}
RESULTS = (
    "sae/sae_weights.safetensors",
    "sae/sparsity.safetensors",
    "sae/metrics.jsonl",
)


def start(
    folder: Path, n_ranks: int, n_restarts: int = MAX_RESTARTS, **overrides: Any
) -> subprocess.Popen[bytes]:
    """Starts torchrun with a run to a new folder, where its output goes to `log.txt`."""
    folder.mkdir(parents=True)
    settings = {
        **SETTINGS,
        "output_path": folder / "sae",
        "checkpoint_path": folder / "checkpoints",
        **overrides,
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(n_ranks), "--max-restarts", str(n_restarts)),
        *("-m", "sae_lens_alloc", "train", str(DEMO / "mutual_choice.yaml")),
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def results(folder: Path) -> dict[str, Any]:
    """Everything that must be equal."""
    files = {name: folder / name for name in RESULTS}
    (final,) = (folder / "checkpoints" / "run").glob("final_*")
    for pattern in ("*.distcp", "activations_store_state*", "rng_state*"):
        files.update({f"final/{path.name}": path for path in final.glob(pattern)})
    found: dict[str, Any] = {name: path.read_bytes() for name, path in files.items()}
    # whose keys SAELens writes in any order, and which says whether somebody edits the code meanwhile
    cfg = json.loads((folder / "sae" / "cfg.json").read_text())
    del cfg["metadata"]["provenance"]["git_commit"]
    return {**found, "sae/cfg.json": cfg}


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train, and not what they have started themselves."""
    try:
        return psutil.Process(launcher.pid).children()
    except psutil.NoSuchProcess:
        return []


def wait_for(what: Callable[[], Any], launcher: subprocess.Popen[bytes]) -> Any:
    """Waits until something is true; None if the run has ended before."""
    end = time.monotonic() + PATIENCE
    while launcher.poll() is None and time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.002)
    return None


def moments(folder: Path, draws: random.Random) -> dict[str, Callable[[], bool]]:
    """When to kill, by name; each is true once it has come."""
    n_rows = draws.randrange(1, N_STEPS)
    begins = time.monotonic() + draws.uniform(0, 10)
    metrics, run = folder / "sae" / "metrics.jsonl", folder / "checkpoints" / "run"
    n_saved = draws.randrange(0, N_STEPS // 4)

    def in_checkpoint() -> bool:
        saved = sum(path.name.isdecimal() for path in run.glob("*"))
        return saved >= n_saved and any(run.glob(".partial-*"))

    return {
        "at the start": lambda: time.monotonic() > begins,
        "between steps": lambda: (
            metrics.exists() and len(metrics.read_bytes().splitlines()) >= n_rows
        ),
        "in a checkpoint": in_checkpoint,
        "in the final save": lambda: any(
            (folder / "sae").glob(".sae-lens-alloc-partial-*")
        ),
        "after the first save": lambda: (folder / "sae" / "cfg.json").exists(),
    }


def kill_one(
    folder: Path,
    launcher: subprocess.Popen[bytes],
    when: str,
    n_ranks: int,
    draws: random.Random,
) -> float | None:
    """
    Kills a random rank.

    Returns:
        The seconds after which the last of the others had ended, None if the run ended first.
    """
    ranks = wait_for(
        lambda: found if len(found := ranks_of(launcher)) == n_ranks else None, launcher
    )
    if ranks is None or not wait_for(moments(folder, draws)[when], launcher):
        return None
    time.sleep(draws.uniform(0, 0.02))
    try:
        draws.choice(ranks).kill()
    except psutil.NoSuchProcess:
        return None
    began = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=SECONDS_TO_END)
    assert not alive, f"{len(alive)} processes still run in {folder}"
    return time.monotonic() - began


def main() -> None:
    """Prints what was killed when, and exits with 1 where a result differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("kill-ranks"))
    args = parser.parse_args()
    draws = random.Random(args.seed)
    shutil.rmtree(args.folder, ignore_errors=True)
    undisturbed = args.folder / "undisturbed"
    assert start(undisturbed, args.ranks).wait() == 0, undisturbed / "log.txt"
    expected = results(undisturbed)
    names = sorted(moments(undisturbed, draws))
    n_kills = n_runs = n_different = 0
    while n_kills < args.kills:
        folder = args.folder / f"run {n_runs}"
        launcher = start(folder, args.ranks)
        for _ in range(MAX_RESTARTS):
            when = names[n_kills % len(names)]
            seconds = kill_one(folder, launcher, when, args.ranks, draws)
            if seconds is None:
                break
            n_kills += 1
            print(f"{folder.name}: killed {when}, others ended after {seconds:.1f} s")
        assert launcher.wait(PATIENCE) == 0, folder / "log.txt"
        found = results(folder)
        different = sorted(
            name for name in expected if found.get(name) != expected[name]
        )
        n_different += bool(different)
        n_runs += 1
        print(
            f"{folder.name}: {'different: ' + ', '.join(different) if different else 'the same'}"
        )
    print(
        f"{n_kills} kills in {n_runs} runs, {n_different} with another result",
        flush=True,
    )
    sys.exit(n_different > 0)


if __name__ == "__main__":
    main()
