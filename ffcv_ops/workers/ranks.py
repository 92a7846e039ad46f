"""The processes that torchrun started, on one machine or on several, as one run: rank 0 leads, the others lend workers.

Rank 0 does what it would do alone, with more workers: those of the other ranks connect to it over TCP and answer
messages as its own do. So there is one place that decides and one machine that writes, and the number of ranks is of no
consequence to what is made. Whoever loses the connection ends, and with it the run.
"""

import contextlib
import hmac
import ipaddress
import json
import multiprocessing.connection
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ffcv_ops.machine import rank, world_size
from ffcv_ops.workers.processes import WorkerKilled, fork_server, serve

_STORE_KEY = "ffcv_ops.ranks"
_TOKEN_BYTES = 32
# Interpreters and libraries may have to come from a slow file system.
_JOIN_S = 300.0
_GREETING_S = 10.0
_SILENCE_S = 60
# A launcher reports the process that ended first; it should be the one that knows why.
_AFTER_RANK_0_S = 2.0


@dataclass(frozen=True)
class _Hello:
    """What another rank says of itself."""

    rank: int
    host: str
    num_workers: int
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class _Job:
    """What another rank's workers are to be: `build(*args)` gives the function that answers messages."""

    build: Callable[..., Callable[[Any], Any]]
    args: tuple[Any, ...]
    preload: Sequence[str]


@dataclass(frozen=True)
class _Address:
    """Where rank 0 listens, and what a connection has to begin with."""

    host: str
    port: int
    token: bytes


class Leader:
    """Rank 0's side: the other ranks, each at the end of a connection. Made by `lead`.

    Attributes
    ----------
    ranks : list of (str, Connection)
        The name of every other rank, and a connection on which nothing comes as long as it is there.
    num_workers : int
        The workers that they lend, together.
    hosts : set of str
        The machines of the run.
    """

    def __init__(self) -> None:
        # Every worker of another rank is an open file here.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=4096)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._store = _store()  # it may end with its last user
        self._store.set(_STORE_KEY, json.dumps([_own_host(), self._server.getsockname()[1], self._token.hex()]))
        self.ranks: list[tuple[str, Connection]] = []
        self.num_workers, self.hosts = 0, {socket.gethostname()}

    def gather(self, versions: Mapping[str, str]) -> None:
        """Wait for all ranks to report."""
        deadline_s = time.monotonic() + _JOIN_S
        while len(self.ranks) < world_size() - 1:
            hello, connection = self._accept(deadline_s)
            self.ranks.append((str(hello), connection))
            for name, version in versions.items():
                if hello.versions.get(name) != version:
                    raise ValueError(
                        f"{hello} would make other bytes than rank 0 on {socket.gethostname()}: {name} is "
                        f"{hello.versions.get(name)} there and {version} here; give all machines the same environment"
                    )
            self.hosts.add(hello.host)
            self.num_workers += hello.num_workers

    def hire(
        self, build: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...], preload: Sequence[str]
    ) -> list[tuple[str, Connection]]:
        """Have the other ranks start their workers; return whose each is, and the connection to it."""
        for _, connection in self.ranks:
            connection.send(_Job(build, args, preload))
        deadline_s = time.monotonic() + _JOIN_S
        return [self._accept(deadline_s) for _ in range(self.num_workers)]

    def _accept(self, deadline_s: float) -> tuple[Any, Connection]:
        """Wait for the next connection of this run; return what it says first, and itself."""
        while True:
            waited_for: list[Any] = [self._server, *(connection for _, connection in self.ranks)]
            ready = multiprocessing.connection.wait(waited_for, max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise WorkerKilled(f"not all ranks and their workers reported within {_JOIN_S:.0f} s")
            self.check(ready)
            connected = self._server.accept()[0]
            with contextlib.suppress(EOFError, OSError):
                if hmac.compare_digest(_read_token(connected), self._token):
                    connection = _connection(connected)
                    return connection.recv(), connection
            connected.close()

    def check(self, ready: Sequence[Any]) -> None:
        """Raise WorkerKilled if a rank's connection is among those where there is something to read: it has ended."""
        for name, connection in self.ranks:
            if connection in ready:
                raise WorkerKilled(f"{name} ended")

    def end(self, done: bool) -> None:
        """Let the other ranks go, with success or without."""
        for _, connection in self.ranks:
            with contextlib.suppress(OSError):
                connection.send(done)
            connection.close()
        self._server.close()


@contextmanager
def lead(versions: Callable[[], Mapping[str, str]]) -> Iterator[Leader | None]:
    """Gather the other ranks for rank 0, and let them go at the end; None where there are none.

    Parameters
    ----------
    versions : callable
        Returns what must be the same on all machines, a text for each name.

    Raises
    ------
    ValueError
        If it is not the same.
    WorkerKilled
        If a rank does not report.
    """
    if world_size() == 1:
        yield None
        return
    leader = Leader()
    done = False
    try:
        leader.gather(versions())
        yield leader
        done = True
    finally:
        leader.end(done)


def lend_workers(num_workers: int, versions: Callable[[], Mapping[str, str]]) -> int:
    """Let rank 0 have workers of this rank until it is done; return the exit status to leave with."""
    hello = _Hello(rank(), socket.gethostname(), num_workers, versions())
    address, control = _report(hello)
    processes: dict[int, BaseProcess] = {}
    try:
        done = _work(control, processes, address, hello)
    except (EOFError, OSError):
        print(
            f"{hello}: rank 0 ended before its work was done, or cannot be reached any more",
            file=sys.stderr,
            flush=True,
        )
        done = False
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()
    if not done:
        time.sleep(_AFTER_RANK_0_S)
    return 0 if done else 1


def _work(control: Connection, processes: dict[int, BaseProcess], address: _Address, hello: _Hello) -> bool:
    """Do jobs until rank 0 says whether all was done; WorkerKilled if a worker ends before rank 0 has hung up on it."""
    while True:
        ready = multiprocessing.connection.wait([control, *processes])
        for sentinel in processes.keys() & set(ready):
            process = processes.pop(sentinel)
            process.join()
            if process.exitcode:
                raise WorkerKilled(f"a worker process of {hello} ended with exit code {process.exitcode}")
        if control in ready:
            message = control.recv()
            if isinstance(message, bool):
                return message
            context = fork_server(message.build, message.preload)
            for _ in range(hello.num_workers):
                args = address, str(hello), message.build, message.args
                process = context.Process(target=_serve_rank_0, args=args, daemon=True)
                process.start()
                processes[process.sentinel] = process


def _serve_rank_0(address: _Address, name: str, build: Callable[..., Callable[[Any], Any]], args: tuple) -> None:
    """Be a worker of rank 0's, on another rank."""
    with _dial(address) as connection:
        connection.send(name)
        serve(connection, build, args)


# ---------------------------------------------------------------------------------------------------------------------
# Finding each other


def _store() -> Any:
    """The key-value store that torchrun set up for its processes."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN_S)))[0]


def _own_host() -> str:
    """The name or address under which the other ranks reach this one: torchrun's master is not always rank 0's host."""
    master = os.environ["MASTER_ADDR"]
    family, kind, _, _, peer = socket.getaddrinfo(master, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(peer)  # sends nothing
        own = probe.getsockname()[0]
    return master if own == peer[0] or ipaddress.ip_address(own.split("%")[0]).is_loopback else own


def _report(hello: _Hello) -> tuple[_Address, Connection]:
    """Connect to rank 0. Where torchrun has restarted the ranks, the store may still know the rank 0 of before."""
    store, deadline_s = _store(), time.monotonic() + _JOIN_S
    while True:
        host, port, token = json.loads(store.get(_STORE_KEY))
        address = _Address(host, port, bytes.fromhex(token))
        try:
            control = _dial(address)
            control.send(hello)
            return address, control
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise WorkerKilled(f"{hello}: rank 0 cannot be reached at {host}, port {port} ({error})") from None
            time.sleep(0.2)


def _dial(address: _Address) -> Connection:
    connected = socket.create_connection((address.host, address.port), timeout=_GREETING_S)
    connected.sendall(address.token)
    return _connection(connected)


def _read_token(connected: socket.socket) -> bytes:
    """What a connection begins with; OSError where that does not come soon, as from a stranger."""
    connected.settimeout(_GREETING_S)
    token = b""
    while len(token) < _TOKEN_BYTES and (part := connected.recv(_TOKEN_BYTES - len(token))):
        token += part
    return token


def _connection(connected: socket.socket) -> Connection:
    """Make a socket carry messages, and break when the machine at its other end is gone."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S // 2)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE_S // 6)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return Connection(connected.detach())
