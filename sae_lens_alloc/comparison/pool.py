"""Trains cells in processes of their own, several of them side by side."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from sae_lens_alloc.comparison.cell import (
    FAILURE_FILENAME,
    RESULT_FILENAME,
    Cell,
    cell_folder,
)
from sae_lens_alloc.json_files import write_json

LOG_FILENAME = "log.txt"
# glibc returns large blocks to the system after each use and gets them again, zeroed page by page. That
# would be a sixth of the time of SAELens' steps on the CPU.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def default_jobs(device: str) -> int:
    """Default number of processes side by side: one on the CPU, or one on each GPU."""
    return torch.cuda.device_count() if torch.device(device).type == "cuda" else 1


def threads_per_job(jobs: int) -> int:
    """PyTorch threads of each process: an equal share of the threads of this process."""
    return max(1, torch.get_num_threads() // jobs)


def train_cells(
    cells: Sequence[Cell],
    config: Path,
    stream: Path,
    output: Path,
    jobs: int,
    on_finished: Callable[[], None],
) -> None:
    """
    Trains cells. The output of each process goes to `log.txt` in the folder of the cell. If a
    cell fails, the reason goes to `failed.json` there, and the others continue. On several GPUs
    each process sees one of them.

    Args:
        cells: The cells to train.
        config: File of the comparison.
        stream: Folder of the activations.
        output: Folder of the comparison.
        jobs: Processes side by side.
        on_finished: Called after each cell.
    """
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    processes: list[subprocess.Popen[bytes]] = []
    ended = False

    def train(cell: Cell) -> str | None:
        """Returns the reason if the cell fails."""
        folder = cell_folder(output, cell.key)
        folder.mkdir(parents=True, exist_ok=True)
        slot = slots.get()
        try:
            with (folder / LOG_FILENAME).open("w") as log:
                process = subprocess.Popen(
                    _command(config, stream, folder, threads_per_job(jobs)),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(cell, slot),
                )
                processes.append(process)
                if ended:  # in the meantime
                    process.terminate()
                process.wait()
        finally:
            slots.put(slot)
        if process.returncode or not (folder / RESULT_FILENAME).exists():
            return _reason(process.returncode, folder / LOG_FILENAME)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                reason = future.result()
                if reason is not None:
                    folder = cell_folder(output, futures[future].key)
                    write_json(folder / FAILURE_FILENAME, {"reason": reason})
                on_finished()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            ended = True
            for process in processes:
                process.terminate()
            raise


def _command(config: Path, stream: Path, folder: Path, threads: int) -> list[str]:
    return [
        *(sys.executable, "-m", "sae_lens_alloc.comparison.worker"),
        *(str(config), str(stream), str(folder)),
        *("--threads", str(threads)),
    ]


def _environment(cell: Cell, slot: int) -> dict[str, str]:
    environment = KEEP_FREED_MEMORY | os.environ
    if torch.device(cell.runner_config().device) == torch.device("cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = _gpu(slot)
    return environment


def _reason(returncode: int, log: Path) -> str:
    """Why a process failed: the last line of its log, or the signal that ended it."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "its log is empty")
    return last.strip().rstrip(".")


def _gpu(slot: int) -> str:
    """The GPU for a slot, among those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    index = slot % torch.cuda.device_count()
    return names[index] if names else str(index)
