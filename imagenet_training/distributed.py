"""The processes of a run: torchrun's environment, the process group, sums over all ranks, and who has failed."""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig

from ffcv_ops import machine
from ffcv_ops.machine import allowed_cpus, is_launched

Value = TypeVar("Value")
_MEETING_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """Where this process stands among the processes of the run.

    Attributes
    ----------
    rank, local_rank : int
        Number of this process in the run and on its node.
    world_size, local_world_size : int
        Number of processes in the run and on this node.
    device : torch.device
        The GPU of this process, or the CPU where there is none.
    meeting : str
        What these processes, since they were started last, call themselves; "" for one process.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    meeting: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def planned_world_size(distributed: bool, world_size: int) -> int:
    """Number of processes a run would have: torchrun's where it runs, else what the recipe asks for."""
    if is_launched():
        return machine.world_size()
    return world_size if distributed else 1


def relaunch(world_size: int, address: str, port: str | int) -> None:
    """Replace this process by torchrun with ``world_size`` processes of the same command on this node.

    Raises
    ------
    ValueError
        Where the node has GPUs, but fewer than processes asked for.
    """
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < world_size:
        raise ValueError(
            f"dist.world_size={world_size}, but {num_gpus} GPU(s) are visible: pass --dist.world_size={num_gpus}"
            + (", or --training.distributed=0" if num_gpus == 1 else "")
        )
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}"]
    if hasattr(LaunchConfig, "signals_to_handle"):  # without SIGUSR1 it would die of it, and leave its workers running
        launcher.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cpus() // world_size)))
    os.execv(
        sys.executable,
        [*launcher, f"--master_addr={address}", f"--master_port={port}", os.path.abspath(sys.argv[0]), *sys.argv[1:]],
    )


def start() -> World:
    """Join the run that torchrun's environment describes; without one, be the only process.

    Returns
    -------
    World
        With NCCL on GPUs and Gloo on CPUs as the process group, where there is more than one process.
    """
    world_size = machine.world_size()
    device = torch.device("cuda", machine.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if machine.local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"process {machine.local_rank()} of this node has no GPU, for it has {torch.cuda.device_count()}: "
                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    meeting = ""
    if is_launched() and world_size > 1:
        backend, rank = "nccl" if device.type == "cuda" else "gloo", machine.rank()
        if _has_agent_store():
            store = _launcher_store()
            meeting = _meet(store, rank, world_size)
            dist.init_process_group(backend, store=dist.PrefixStore(meeting, store), rank=rank, world_size=world_size)
        else:
            dist.init_process_group(backend)
    return World(
        rank=machine.rank(),
        local_rank=machine.local_rank(),
        world_size=world_size,
        local_world_size=machine.local_world_size(),
        device=device,
        meeting=meeting,
    )


def _has_agent_store() -> bool:
    """Whether torchrun shares its store with its workers."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launcher_store() -> dist.TCPStore:
    """The store that all ranks share: torchrun's, or without torchrun that of rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=_MEETING_TIMEOUT)


def _meet(store: dist.Store, rank: int, world_size: int) -> str:
    """Agree with the other ranks on a name for this start of theirs.

    torchrun's store outlives a restart of its workers with all that they wrote, such as the addresses at which they
    could be reached. The nodes do not count restarts alike, so nothing in the environment tells old from new. A rank
    believes the answer to a question that only it can have asked.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question of rank {rank}", question)
        meeting = store.get(f"answer to {question}").decode()
        store.set(f"{meeting} has rank {rank}", "")
        return meeting
    meeting, missing = uuid.uuid4().hex, set(range(1, world_size))
    end_s = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"question of rank {other}"]):
                question = store.get(f"question of rank {other}").decode()
                store.set(f"answer to {question}", meeting)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"{meeting} has rank {other}"])}
        if time.monotonic() > end_s:
            raise ValueError(f"{len(missing)} of {world_size} processes did not come, the first of them {min(missing)}")
    return meeting


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks; the tensor itself where there is one process."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def share_buffers(model: torch.nn.Module) -> None:
    """Give every rank the buffers (batch-norm statistics) of rank 0, in place."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def decided_by_main(decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on every rank; a value that can be pickled.

    Raises
    ------
    ValueError
        On every rank, where rank 0 finds something that the user can put right.
    """
    if not dist.is_initialized():
        return decide()
    decision: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            decision[0] = decide()
        except ValueError as error:
            decision[1] = error
    dist.broadcast_object_list(decision, src=0)
    value, mistake = decision
    if mistake is not None:
        raise mistake
    return value


def wait_for_all(world: World) -> None:
    """Wait until every rank has come here."""
    sum_over_ranks(torch.zeros((), device=world.device)).item()  # a barrier warns where it is not told the device


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    texts = ("connection closed", "connection reset", "broken pipe", "remote process exited", "timed out waiting")
    told = str(error).lower()
    return isinstance(error, dist.DistError) or ("gloo" in told and any(text in told for text in texts))


@dataclass(frozen=True)
class Failure:
    """What the first rank to fail says."""

    rank: int
    message: str


class Board:
    """Notes that the ranks of a job leave each other.

    They are kept in the store that torchrun shares with its workers, and so outlive a restart of the workers. Of a
    single process they are its own.
    """

    def __init__(self, world: World) -> None:
        self._store: dist.Store = dist.HashStore()
        if _has_agent_store() or dist.is_initialized():
            self._store = dist.PrefixStore("board", _launcher_store())
        self._failure = f"failure in {world.meeting}"

    def read(self, key: str) -> str:
        """A note, "" where there is none."""
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def write(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def announce(self, failure: Failure) -> Failure:
        """Tell the other ranks of a failure; returns the one that came first, which all believe to be the cause."""
        told = json.dumps(asdict(failure))
        return Failure(**json.loads(self._store.compare_set(self._failure, "", told)))

    def failure(self) -> Failure | None:
        """The first failure since the workers were started last, where there is one and its store can be reached."""
        try:
            told = self.read(self._failure)
        except RuntimeError:  # torchrun is ending, and with it this process
            return None
        return Failure(**json.loads(told)) if told else None
