"""From what torchrun tells a process to the ranks of a training, each on its own device."""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sae_lens_alloc.distributed.meeting import meet
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.speaking import speak_over

# How long processes wait for each other: at the start, and in a training, where one may read
# its text again to its place after a restart.
START_SECONDS = 300
PATIENCE = timedelta(minutes=30)
HINT = "start with torchrun, which sets it"

_hosts: Ranks | None = None
_on_devices: Ranks | None = None


def is_launched() -> bool:
    """Whether this process is one of several that torchrun, or its like, has started."""
    return os.environ.get("WORLD_SIZE", "1").strip() != "1" or _is_initialized()


def ranks_on_this_machine() -> int:
    """How many of the processes are on this machine, as far as torchrun has said so."""
    return _number("LOCAL_WORLD_SIZE", 1)


def launch_id() -> str | None:
    """
    A name of this launch, the same after torchrun has started the processes anew; None if
    torchrun did not start them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = psutil.Process().parent()
    if agent is None:
        return None
    return f"{socket.gethostname()}-{agent.pid}-{agent.create_time():.2f}"


def training_ranks() -> Ranks:
    """
    The processes that train together, whose hosts can speak to each other from now on; `ALONE`
    where there is one. torch.distributed is then not touched.

    Raises:
        ValueError: in one sentence, if the processes cannot find each other.
    """
    global _hosts
    if _hosts is None and is_launched():
        if not _is_initialized():
            _start()
        group: Any = dist.group.WORLD
        if dist.get_backend(group) != "gloo":
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
        _hosts = Ranks(group)
    return ALONE if _hosts is None else _hosts


def leave() -> None:
    """Ends the group of processes that `training_ranks` has started, after their last message."""
    global _hosts, _on_devices
    if _hosts is not None:
        _hosts = _on_devices = None
        dist.destroy_process_group()


def on_device(hosts: Ranks, device: str | torch.device) -> Ranks:
    """
    The same ranks, which send tensors of a device: by NCCL on CUDA, by gloo elsewhere. All ranks
    must call it.

    Raises:
        ValueError: if two of them have the same GPU.
    """
    global _on_devices
    device = torch.device(device)
    if hosts.is_alone or device.type != "cuda":
        return hosts
    if _on_devices is None:
        torch.cuda.set_device(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        require_own_gpus(hosts.objects((socket.gethostname(), gpu)))
        group: Any = dist.new_group(backend="nccl", timeout=PATIENCE)
        _on_devices = Ranks(group, hosts.group)
    return _on_devices


def device_of_rank(device: str, n_gpus: int) -> str:
    """
    The device of this rank for one that a config names: its own GPU for any of CUDA. A process
    that is shown one GPU alone, as Slurm may do, has that.

    Args:
        device: The device of the config.
        n_gpus: How many GPUs this process is shown.

    Raises:
        ValueError: if there are fewer GPUs than processes.
    """
    if torch.device(device).type != "cuda":
        return device
    local_rank = _number("LOCAL_RANK", 0)
    if n_gpus == 1:
        return "cuda:0"
    if not 0 <= local_rank < n_gpus:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, but this machine shows {n_gpus} GPUs: start as many "
            f"processes as it has GPUs, with --nproc-per-node {n_gpus}."
        )
    return f"cuda:{local_rank}"


def require_own_gpus(places: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError if two ranks, by (host, GPU) of each, have the same GPU."""
    (place, n), *_ = Counter(places).most_common()
    if n > 1:
        ranks = " and ".join(str(i) for i, p in enumerate(places) if p == place)
        raise ValueError(
            f"ranks {ranks} are on one GPU of {place[0]}: start as many processes as there are "
            "GPUs, or, without torchrun, set LOCAL_RANK to the number of each GPU."
        )


def _is_initialized() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _start() -> None:
    """Makes the processes of the environment variables a group of torch.distributed."""
    world_size, rank = _number("WORLD_SIZE"), _number("RANK")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks count from 0 to "
            f"{world_size - 1}."
        )
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError(f"MASTER_ADDR is missing: {HINT}.")
    _number("MASTER_PORT")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    patience = timedelta(seconds=START_SECONDS)
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=patience)))
    except (dist.DistError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"rank {rank} of {world_size} has not met the others at MASTER_ADDR:MASTER_PORT "
            f"{where} within {START_SECONDS} s ({_first_line(error)}): see to it that "
            "WORLD_SIZE processes are started, and that this address is the host of rank 0."
        ) from error
    on_one_machine = _number("GROUP_WORLD_SIZE", 1) == 1
    launch = launch_id() if on_one_machine else os.environ.get("TORCHELASTIC_RUN_ID")
    store = meet(store, rank, world_size, patience, launch or "")
    speak_over(store)
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE
        )
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(
            f"the processes cannot speak to each other ({_first_line(error)}): set "
            "GLOO_SOCKET_IFNAME to a network interface by which they can."
        ) from error


def _number(key: str, default: int | None = None) -> int:
    """An environment variable that is a whole number."""
    value = os.environ.get(key)
    if value is None and default is not None:
        return default
    if not value:
        raise ValueError(f"{key} is missing: {HINT}.")
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"{key} must be a whole number, got {value!r}: {HINT}."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
