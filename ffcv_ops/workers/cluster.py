"""Run tasks on the workers of a Dask cluster, on any number of machines."""

import asyncio
import json
import logging
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffcv_ops.errors import UserError
from ffcv_ops.workers.processes import set_up_process
from ffcv_ops.workers.tasks import NoWorkers, WorkerKilled
from ffcv_ops.workers.versions import OtherMachine, compare_versions

if TYPE_CHECKING:
    from distributed import Client
    from distributed import Future as DaskFuture

_CONNECT_S = 30.0
_LOOK_EVERY_S = 1.0
# Workers that a nanny restarts are back in a few seconds.
_NOTICE_AFTER_S = 10.0
_WAIT_S = 300.0
_ANSWER_S = 10.0
_TLS = (
    "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and "
    "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY to your files"
)

Notice = Callable[[str], None]


class DaskExecutor(Executor):
    """A Dask client as an executor. Results come straight from the workers.

    The futures of ``Client.get_executor`` wait for ever if the last worker is gone. Here every future ends.

    Parameters
    ----------
    client : distributed.Client
    wait_s : float
        If there is no worker for so long, all futures raise `NoWorkers`.
    notice : callable
        Called with a line for the user, from another thread.
    """

    def __init__(self, client: "Client", wait_s: float = _WAIT_S, notice: Notice = print):
        self.client: Any = client
        self.wait_s, self.notice = wait_s, notice
        self.num_workers = sum(client.nthreads().values())
        self._address: str = client.scheduler_info()["address"]
        self._pending: set[Future] = set()
        self._lock = threading.Lock()
        self._error: NoWorkers | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._watch_workers, name="DaskExecutor", daemon=True)
        self._watch.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Run ``fn(*args, **kwargs)`` on a worker. If the worker is lost, Dask runs it on another one.

        Raises
        ------
        NoWorkers
            If the workers or the scheduler are gone.
        RuntimeError
            After `shutdown`.
        """
        content = pickle.dumps(_Call(partial(fn, *args, **kwargs) if args or kwargs else fn), protocol=5)
        future: Future = Future()
        with self._lock:
            if self._error:
                raise self._error
            if self._ended.is_set():
                raise RuntimeError("cannot submit a task after shutdown")
            self._pending.add(future)
        future.add_done_callback(self._forget)
        future.set_running_or_notify_cancel()
        try:
            dask_future = self.client.submit(pickle.loads, content, pure=False)
        except Exception as error:  # of a client that is closed, of many kinds
            raise NoWorkers(f"the connection to the scheduler at {self._address} is lost ({error})") from error
        self.client.loop.add_callback(self._relay, dask_future, future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop using the client. It stays connected."""
        self._ended.set()
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            if wait and not cancel_futures:
                future.exception()
            else:
                _set_error(future, NoWorkers("the executor was shut down"))

    def _forget(self, future: Future) -> None:
        with self._lock:
            self._pending.discard(future)

    async def _relay(self, dask_future: "DaskFuture", future: Future) -> None:
        """Pass the result of a Dask future on, in the thread of the client."""
        try:
            result = await self.client.gather(dask_future, direct=True, asynchronous=True)
        except BaseException as raised:
            if dask_future.status != "error":  # the task has not failed, so the connection is the cause
                _set_error(future, NoWorkers(f"the connection to the scheduler at {self._address} is lost"))
            elif isinstance(raised, ImportError):
                _set_error(future, await self._name_machine(raised))
            else:
                _set_error(future, _translate(raised))
        else:
            with suppress(Exception):  # the watch may have ended it
                future.set_result(result)
        finally:
            dask_future.release()

    async def _name_machine(self, error: ImportError) -> OtherMachine:
        """Return the error for a worker that cannot import this project, which may have joined late."""
        addresses = list(await self.client.nthreads(asynchronous=True))
        answers = await asyncio.gather(*map(self._try_to_report, addresses))
        bad = [address for address, answer in zip(addresses, answers, strict=True) if isinstance(answer, ImportError)]
        return _cannot_run(", ".join(bad) or self._address, error)

    async def _try_to_report(self, address: str) -> Any:
        """Return the report of a worker, or its error. A worker that is stuck gives no answer: None."""
        report = self.client.run(_report, dict, workers=[address], on_error="return", asynchronous=True)
        try:
            return (await asyncio.wait_for(report, _ANSWER_S)).get(address)
        except (OSError, asyncio.TimeoutError):
            return None

    def _watch_workers(self) -> None:
        """Count the workers once a second. If there are none for long, end all futures."""
        seen_s = time.monotonic()
        noticed = False
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                num_workers = sum(self.client.nthreads().values())
            except Exception as error:  # of tornado, asyncio or distributed: all mean that nobody answers
                self._fail(f"the scheduler at {self._address} does not answer ({error or type(error).__name__})")
                return
            if num_workers:
                seen_s, self.num_workers, noticed = time.monotonic(), num_workers, False
                continue
            silence_s = time.monotonic() - seen_s
            if silence_s > self.wait_s:
                self._fail(f"no worker has been connected to {self._address} for {silence_s:.0f} s")
                return
            if silence_s > min(_NOTICE_AFTER_S, self.wait_s / 2) and not noticed:
                noticed = True
                self.notice(f"no worker is connected to {self._address}; waiting for {self.wait_s:.0f} s")

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._error = NoWorkers(reason)
            pending = list(self._pending)
        for future in pending:
            _set_error(future, NoWorkers(reason))


def _set_error(future: Future, error: BaseException) -> None:
    with suppress(Exception):  # another thread may have ended it
        future.set_exception(error)


def _translate(error: BaseException) -> BaseException:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return WorkerKilled(
            f"Dask has lost {error.allowed_failures + 1} workers with it, the last at {error.last_worker.address}"
        )
    return error


class _Call:
    """A task, pickled so that ``pickle.loads`` runs it and returns its result.

    Dask sees only bytes. If it saw a function of this project, a worker without this project would silently end when it
    receives the function, and the run would wait for ever (distributed 2026.8.0).
    """

    def __init__(self, task: Callable[[], Any]):
        self.task = task

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _run, (self.task,)


def _run(task: Callable[[], Any]) -> Any:
    """Run a task on a worker."""
    _set_up_once()
    return task()


def _cannot_run(address: str, error: BaseException) -> OtherMachine:
    return OtherMachine(
        f"the worker at {address} cannot run this project ({type(error).__name__}: {error}); give all machines the "
        "same environment"
    )


_set_up_once = cache(set_up_process)


# ---------------------------------------------------------------------------------------------------------------------
# The cluster


@contextmanager
def open_cluster(
    address: str, versions: Callable[[], Mapping[str, str]], notice: Notice = print
) -> Iterator[DaskExecutor]:
    """Connect to a cluster, compare its machines with this one, and yield an executor.

    Parameters
    ----------
    address : str
        ``tcp://HOST:8786``, ``tls://HOST:8786``, or the path of a scheduler file. Certificates come from Dask's
        configuration.
    versions : callable
        Returns what must be the same on all machines: a text for each name. It is importable by name.
    notice : callable
        Called with a line for the user.

    Raises
    ------
    UserError
        If distributed is not installed, or if nobody answers at the address.
    OtherMachine
        If a machine of the cluster has other versions.
    NoWorkers
        If the scheduler ends meanwhile.
    """
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise UserError(f"--cluster needs the package distributed ({error}); run pip install '.[cluster]'") from error
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # all that matters becomes an error of ours
    client = _connect(address)
    try:
        try:
            check_machines(client, versions)
        except OSError as error:
            raise NoWorkers(f"--cluster {address}: the connection is lost ({error})") from error
        executor = DaskExecutor(client, notice=notice)
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)
    finally:
        client.close()


def _connect(address: str) -> "Client":
    from distributed import Client
    from distributed.comm import CommClosedError
    from distributed.security import Security

    where = f"--cluster {address}: "
    scheduler = address if "://" in address else _read_scheduler_file(Path(address))
    try:
        security = Security()
        arguments = security.get_connection_args("client")
    except OSError as error:
        raise UserError(f"{where}the TLS files of Dask's configuration cannot be used ({error}); {_TLS}") from error
    if scheduler.startswith("tls://") and arguments["ssl_context"] is None:
        raise UserError(f"{where}Dask's configuration names no certificate; {_TLS}")
    try:
        # A client that cannot connect is not always closed (distributed 2026.8.0). The process would then wait a minute
        # at its end.
        asyncio.run(_try_to_connect(scheduler, arguments))
        return Client(scheduler, security=security, direct_to_workers=True, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        remedy = "start one with `dask scheduler`, and workers with `dask worker`"
        if isinstance(error, CommClosedError) or scheduler.startswith("tls://"):
            remedy = (
                "with TLS, the address is tls://HOST:PORT and the certificates on both sides come from one authority; "
                "without, it is tcp://HOST:PORT"
            )
        raise UserError(f"{where}no connection to a scheduler ({_cause(error)}); {remedy}") from error


def _read_scheduler_file(path: Path) -> str:
    """Return the address of the scheduler."""
    if not path.is_file():
        raise UserError(f"--cluster {path}: no such scheduler file, and no address; addresses are like tcp://HOST:8786")
    try:
        return str(json.loads(path.read_bytes())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--cluster {path}: not the file of a scheduler ({error}); `dask scheduler --scheduler-file` writes one"
        ) from error


async def _try_to_connect(address: str, arguments: Mapping[str, Any]) -> None:
    """Connect to a scheduler and close the connection. Raise what distributed raises, of several kinds."""
    from distributed.comm import connect

    connection = await connect(address, timeout=_CONNECT_S, **arguments)
    await connection.close()


def _cause(error: BaseException) -> str:
    """Return the first of the errors that led to an error, as text."""
    while error.__cause__:
        error = error.__cause__
    return str(error) or type(error).__name__


def check_machines(client: "Client", versions: Callable[[], Mapping[str, str]]) -> None:
    """Compare the versions of all workers with those of this process. Raise OtherMachine for the first that differs."""
    ours = versions()
    for address, found in client.run(_report, versions, on_error="return").items():
        if isinstance(found, BaseException):
            raise _cannot_run(address, found)
        host, theirs = found
        compare_versions(f"{host} ({address})", theirs, ours)


async def _report(versions: Callable[[], Mapping[str, str]]) -> tuple[str, Mapping[str, str]]:
    """Return name and versions of a worker's machine, from a thread, so that the worker keeps answering meanwhile."""
    return socket.gethostname(), await asyncio.to_thread(versions)
