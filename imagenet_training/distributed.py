"""The processes of a run: the process group, sums over all ranks, and notes that ranks leave each other."""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig

from ffcv_ops import machine
from ffcv_ops.errors import UserError
from imagenet_training.planning.recipe import Recipe

Value = TypeVar("Value")
_MEETING_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Failure:
    """The error of the first rank that failed."""

    rank: int
    message: str


class RankStore:
    """Notes that the ranks of a job leave each other.

    The notes are kept in the store that torchrun shares with its workers, so they outlive a restart of the workers.
    Only the failure belongs to one start of the ranks; see `_agree_on_start`. A single process keeps its notes to
    itself.
    """

    def __init__(self, store: dist.Store | None = None, start_name: str = ""):
        self._store = dist.HashStore() if store is None else dist.PrefixStore("notes of ranks", store)
        self._failure = f"failure in {start_name}"

    def read(self, key: str) -> str:
        """Return a note, "" if there is none."""
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def write(self, key: str, text: str) -> None:
        """Leave a note, and replace an earlier one of that key."""
        self._store.set(key, text)

    def announce(self, failure: Failure) -> Failure:
        """Announce a failure to the other ranks. Return the first one announced, which all ranks take for the cause."""
        text = json.dumps(asdict(failure))
        return Failure(**json.loads(self._store.compare_set(self._failure, "", text)))

    def failure(self) -> Failure | None:
        """Return the first failure since the ranks were started last, if there is one and the store is reachable."""
        try:
            text = self.read(self._failure)
        except RuntimeError:  # torchrun is ending, and this process with it
            return None
        return Failure(**json.loads(text)) if text else None


@dataclass(frozen=True)
class World:
    """The place of this process among the processes of the run, as torchrun counts them.

    The device is the GPU of this process, or the CPU if there is no GPU. By default the process is alone.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    store: RankStore = field(default_factory=RankStore, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def planned_world_size(recipe: Recipe) -> int:
    """Return the number of processes a run would have: torchrun's if it runs, else what the recipe asks for."""
    if machine.is_launched():
        return machine.world_size()
    return recipe.dist.world_size if recipe.training.distributed else 1


def join(recipe: Recipe) -> World:
    """Become one rank of the run. If no launcher runs and the recipe asks for several processes, start a launcher."""
    if not machine.is_launched() and planned_world_size(recipe) > 1:
        _relaunch(recipe.dist.world_size, recipe.dist.address, recipe.dist.port)
    return start()


def _relaunch(world_size: int, address: str, port: int) -> None:
    """Replace this process by torchrun with ``world_size`` processes of the same command on this node."""
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < world_size:
        raise UserError(
            f"dist.world_size={world_size}, but {num_gpus} GPU(s) are visible: pass --dist.world_size={num_gpus}"
            + (", or --training.distributed=0" if num_gpus == 1 else "")
        )
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}"]
    if hasattr(LaunchConfig, "signals_to_handle"):  # else SIGUSR1 would end torchrun and leave its workers running
        launcher.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.allowed_cpus() // world_size)))
    os.execv(
        sys.executable,
        [*launcher, f"--master_addr={address}", f"--master_port={port}", os.path.abspath(sys.argv[0]), *sys.argv[1:]],
    )


def start() -> World:
    """Join the run that torchrun's environment describes; without torchrun, be the only process.

    If there are several processes, the process group uses NCCL on GPUs and Gloo on CPUs.

    Raises
    ------
    UserError
        If the node has fewer GPUs than processes.
    """
    rank, local_rank, world_size = machine.rank(), machine.local_rank(), machine.world_size()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU, for it has {torch.cuda.device_count()}: "
                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    # torchrun shares its store with its workers.
    store = _launcher_store() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    start_name = ""
    if machine.is_launched() and world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if store is not None:
            start_name = _agree_on_start(store, rank, world_size)
            group_store = dist.PrefixStore(start_name, store)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size)
        else:
            dist.init_process_group(backend)
            store = _launcher_store()
    return World(rank, world_size, device, RankStore(store, start_name))


def _launcher_store() -> dist.TCPStore:
    """Return the store that all ranks share: torchrun's, or rank 0's without torchrun."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=_MEETING_TIMEOUT)


def _agree_on_start(store: dist.Store, rank: int, world_size: int) -> str:
    """Agree with the other ranks on a name for this start of theirs.

    torchrun restarts its workers after a failure, but keeps its store. All notes of the earlier start are still there,
    such as the addresses of ranks that are gone. The nodes may count restarts differently, so the environment does not
    distinguish old notes from new ones. Therefore each rank asks a question with a random name, rank 0 answers the
    questions with the name of this start, and each rank confirms the answer. An old answer never fits a new question.

    Raises
    ------
    UserError
        If a rank does not ask in time.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question of rank {rank}", question)
        start_name = store.get(f"answer to {question}").decode()
        store.set(f"{start_name} has rank {rank}", "")
        return start_name
    start_name, missing = uuid.uuid4().hex, set(range(1, world_size))
    end_s = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"question of rank {other}"]):
                question = store.get(f"question of rank {other}").decode()
                store.set(f"answer to {question}", start_name)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"{start_name} has rank {other}"])}
        if time.monotonic() > end_s:
            raise UserError(f"{len(missing)} of {world_size} processes did not come, the first of them {min(missing)}")
    return start_name


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks; the tensor itself if there is one process."""
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
    """Return on every rank what rank 0 decides; the value must be picklable.

    Raises
    ------
    UserError
        On every rank, if it is raised on rank 0.
    """
    if not dist.is_initialized():
        return decide()
    decision: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            decision[0] = decide()
        except UserError as error:
            decision[1] = error
    dist.broadcast_object_list(decision, src=0)
    value, user_error = decision
    if user_error is not None:
        raise user_error
    return value


def of_all_ranks(value: Value) -> list[Value]:
    """Return on every rank the values of all ranks, in their order. The values must be picklable."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all(world: World) -> None:
    """Wait until every rank has called this function."""
    sum_over_ranks(torch.zeros((), device=world.device)).item()  # barrier() warns unless it is given the device


def may_follow_from_another(error: BaseException) -> bool:
    """Return True if an error may only be the consequence of another rank's failure.

    A collective operation fails if a rank is gone. Gloo, NCCL and autograd then raise a DistError or a plain
    RuntimeError, and nothing but its English text distinguishes the latter from an error of this rank.
    """
    return isinstance(error, dist.DistError) or type(error) is RuntimeError
