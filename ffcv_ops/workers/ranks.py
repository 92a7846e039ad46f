"""Make one run of the processes that torchrun started: rank 0 leads, and the other ranks lend their workers.

Rank 0 works as if it were alone, but with more workers. The workers of the other ranks connect to it over TCP and
answer messages like its own. One process decides and one machine writes, so the number of ranks does not change the
result. A rank that loses the connection ends, and ends the run.
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

from ffcv_ops.errors import UserError
from ffcv_ops.machine import rank, world_size
from ffcv_ops.workers.processes import WorkerKilled, fork_server, serve

_STORE_KEY = "ffcv_ops.ranks"
_TOKEN_BYTES = 32
# A slow file system may hold the interpreter and the libraries.
_JOIN_S = 300.0
_CONNECT_S = 10.0
_SILENCE_S = 60
# A launcher reports the process that ended first. That should be rank 0, which knows the reason.
_AFTER_RANK_0_S = 2.0


@dataclass(frozen=True)
class _Greeting:
    """The first message of another rank."""

    rank: int
    host: str
    num_workers: int
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class _Job:
    """A job for the workers of another rank: `build(*args)` returns the function that answers messages."""

    build: Callable[..., Callable[[Any], Any]]
    args: tuple[Any, ...]
    preload: Sequence[str]


@dataclass(frozen=True)
class _Address:
    """The address of rank 0, and the secret with which a connection must begin."""

    host: str
    port: int
    token: bytes


class Leader:
    """The other ranks, as rank 0 sees them. `lead` makes it.

    Attributes
    ----------
    ranks : list of (str, Connection)
        The name of every other rank, and a connection. A connection becomes readable only when its rank ends.
    num_workers : int
        The number of workers that the ranks lend together.
    hosts : set of str
        The machines of the run.
    """

    def __init__(self) -> None:
        # Every worker of another rank needs an open file here.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=4096)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._store = _store()  # kept, because the store may end with its last user
        self._store.set(_STORE_KEY, json.dumps([_own_host(), self._server.getsockname()[1], self._token.hex()]))
        self.ranks: list[tuple[str, Connection]] = []
        self.num_workers, self.hosts = 0, {socket.gethostname()}

    def gather(self, versions: Mapping[str, str]) -> None:
        """Wait until all ranks have connected.

        Raises
        ------
        UserError
            If a rank has other versions.
        WorkerKilled
            If a rank ends or does not connect.
        """
        deadline_s = time.monotonic() + _JOIN_S
        while len(self.ranks) < world_size() - 1:
            greeting, connection = self._accept(deadline_s)
            self.ranks.append((str(greeting), connection))
            for name, version in versions.items():
                if greeting.versions.get(name) != version:
                    raise UserError(
                        f"{greeting} would make other bytes than rank 0 on {socket.gethostname()}: {name} is "
                        f"{greeting.versions.get(name)} there and {version} here; give all machines the same "
                        "environment"
                    )
            self.hosts.add(greeting.host)
            self.num_workers += greeting.num_workers

    def start_workers(
        self, build: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...], preload: Sequence[str]
    ) -> list[tuple[str, Connection]]:
        """Let the other ranks start their workers. Return the rank of each worker, and the connection to it."""
        for _, connection in self.ranks:
            connection.send(_Job(build, args, preload))
        deadline_s = time.monotonic() + _JOIN_S
        return [self._accept(deadline_s) for _ in range(self.num_workers)]

    def _accept(self, deadline_s: float) -> tuple[Any, Connection]:
        """Wait for the next connection of this run. Return its first message and the connection."""
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
        """Raise WorkerKilled if a rank's connection is among the readable ones, because the rank has ended."""
        for name, connection in self.ranks:
            if connection in ready:
                raise WorkerKilled(f"{name} ended")

    def end(self, done: bool) -> None:
        """End the other ranks, with exit status 0 if all work is done, else 1."""
        for _, connection in self.ranks:
            with contextlib.suppress(OSError):
                connection.send(done)
            connection.close()
        self._server.close()


@contextmanager
def lead(versions: Callable[[], Mapping[str, str]]) -> Iterator[Leader | None]:
    """Wait for the other ranks, and end them at the end of the block. Yield None if there are no other ranks.

    Parameters
    ----------
    versions : callable
        Returns what must be the same on all machines: a text for each name.

    Raises
    ------
    UserError
        If a rank has other versions.
    WorkerKilled
        If a rank does not connect.
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
    """Lend workers of this rank to rank 0 until all work is done. Return the exit status for this process."""
    greeting = _Greeting(rank(), socket.gethostname(), num_workers, versions())
    address, control = _greet(greeting)
    processes: dict[int, BaseProcess] = {}
    try:
        done = _work(control, processes, address, greeting)
    except (EOFError, OSError):
        lost = f"{greeting}: rank 0 ended before its work was done, or cannot be reached any more"
        print(lost, file=sys.stderr, flush=True)
        done = False
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()
    if not done:
        time.sleep(_AFTER_RANK_0_S)
    return 0 if done else 1


def _work(control: Connection, processes: dict[int, BaseProcess], address: _Address, greeting: _Greeting) -> bool:
    """Start workers for rank 0's jobs until it ends this rank. Return whether all work is done.

    Raises
    ------
    WorkerKilled
        If a worker ends before rank 0 has closed the connection to it.
    """
    while True:
        ready = multiprocessing.connection.wait([control, *processes])
        for sentinel in processes.keys() & set(ready):
            process = processes.pop(sentinel)
            process.join()
            if process.exitcode:
                raise WorkerKilled(f"a worker process of {greeting} ended with exit code {process.exitcode}")
        if control in ready:
            message = control.recv()
            if isinstance(message, bool):
                return message
            context = fork_server(message.build, message.preload)
            for _ in range(greeting.num_workers):
                args = address, str(greeting), message.build, message.args
                process = context.Process(target=_serve_rank_0, args=args, daemon=True)
                process.start()
                processes[process.sentinel] = process


def _serve_rank_0(address: _Address, name: str, build: Callable[..., Callable[[Any], Any]], args: tuple) -> None:
    """Connect to rank 0 and work for it, in a process of another rank."""
    with _connect(address) as connection:
        connection.send(name)
        serve(connection, build, args)


# ---------------------------------------------------------------------------------------------------------------------
# Connections between the ranks


def _store() -> Any:
    """Return the key-value store that torchrun provides for its processes."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN_S)))[0]


def _own_host() -> str:
    """Return a name or address of this machine for the other ranks. torchrun's master may be another machine."""
    master = os.environ["MASTER_ADDR"]
    family, kind, _, _, peer = socket.getaddrinfo(master, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(peer)  # sends nothing
        own = probe.getsockname()[0]
    return master if own == peer[0] or ipaddress.ip_address(own.split("%")[0]).is_loopback else own


def _greet(greeting: _Greeting) -> tuple[_Address, Connection]:
    """Connect to rank 0. If torchrun restarted the ranks, the store may still hold the address of the old rank 0."""
    store, deadline_s = _store(), time.monotonic() + _JOIN_S
    while True:
        host, port, token = json.loads(store.get(_STORE_KEY))
        address = _Address(host, port, bytes.fromhex(token))
        try:
            control = _connect(address)
            control.send(greeting)
            return address, control
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise WorkerKilled(f"{greeting}: rank 0 cannot be reached at {host}, port {port} ({error})") from None
            time.sleep(0.2)


def _connect(address: _Address) -> Connection:
    connected = socket.create_connection((address.host, address.port), timeout=_CONNECT_S)
    connected.sendall(address.token)
    return _connection(connected)


def _read_token(connected: socket.socket) -> bytes:
    """Return the first bytes of a connection. Raise OSError if a stranger connects and sends nothing."""
    connected.settimeout(_CONNECT_S)
    token = b""
    while len(token) < _TOKEN_BYTES and (part := connected.recv(_TOKEN_BYTES - len(token))):
        token += part
    return token


def _connection(connected: socket.socket) -> Connection:
    """Turn a socket into a connection for messages. The connection breaks if the other machine is gone."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S // 2)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE_S // 6)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return Connection(connected.detach())
