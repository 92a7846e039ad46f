"""End a run early: after a signal, all ranks stop at the same step; if another rank has failed, this one ends too."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ffcv_ops.console import call_if_reader_is_gone
from imagenet_training.distributed import World

# Exit statuses after a save: EX_TEMPFAIL of sysexits.h, "try again later"; and the shell's for Ctrl-C.
PREEMPTED, INTERRUPTED = 75, 130
# A rank that failed has so long to print its error and close its logs. Then the others exit, and torchrun ends all.
SECONDS_TO_END = 10
# torchrun and a closed terminal send SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A run that has lost its terminal, or the reader of its output, finishes its save: nobody is there who asks for haste.
_PATIENT = (signal.SIGHUP, signal.SIGPIPE)
# Ranks ask each other about this often (s) if one of them has received a signal.
_ASK_S = 1.0
# A rank checks this often (s) if another one has failed.
_LOOK_S = 2.0
# A signal this soon (s) after the first is the same signal: torchrun passes on what its whole process group received.
_SAME_S = 1.0


class Stopped(Exception):
    """All ranks stop here, because one of them has received a signal. The reason is text after "stopped"."""

    def __init__(self, exit_status: int, reason: str = "by a signal"):
        super().__init__(exit_status, reason)
        self.exit_status, self.reason = exit_status, reason


class StopRequest:
    """A request to end the run early, made by a signal to any of its ranks.

    Use it as a context manager, in the main thread. Then SIGTERM, SIGUSR1, SIGHUP and Ctrl-C do not end the process.
    Instead `agreed` returns True on all ranks, at the same call of each. A second signal ends the process at once,
    except SIGHUP. A signal that is ignored, as by ``nohup``, stays ignored. A thread watches for signals, because the
    main thread may be waiting for a rank that is gone. If another rank has failed, the thread passes the failure to
    `on_failure` and ends the process. It passes each line that it prints on stderr to `on_notice`.

    If the reader of rank 0's output is gone, the run stops as after SIGHUP. If SIGHUP is ignored, the run goes on.

    No step waits for another rank: about once a second, the ranks start a reduction of two integers, and read its
    result at the next reduction. The run stops within about two seconds and a step.

    Attributes
    ----------
    exit_status : int
        For the process, once `agreed` has returned True: `INTERRUPTED` after Ctrl-C, else `PREEMPTED`.
    """

    def __init__(
        self,
        world: World,
        on_failure: Callable[[int, str], None] = lambda rank, message: None,
        on_notice: Callable[[str], None] = lambda line: None,
    ):
        self.world, self.on_failure, self.on_notice = world, on_failure, on_notice
        self.exit_status = 0
        self._reason = "by a signal"
        self._signal_status = 0
        self._failing = False
        self._answer: Callable[[], list[int]] | None = None
        self._interval, self._calls, self._asked_s = 1, 0, time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background jobs of a shell ignore signals
                self._before[number] = signal.signal(number, lambda number, frame: None)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        if self.world.is_main and signal.SIGHUP in self._before:
            call_if_reader_is_gone(self._stop_without_reader)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self.world.world_size > 1 and kind not in (None, Stopped):
            self._failing = True  # the watcher stays, and ends this process with the others
            return
        call_if_reader_is_gone(None)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._sender.send(b"\0")
        self._watcher.join()
        self._receiver.close()
        self._sender.close()

    def agreed(self, *, now: bool = False) -> bool:
        """Return True if the run stops here. All ranks must call this at the same places.

        With `now`, wait for the present answer of the other ranks, at a place where the run waits for them anyway.
        """
        if self.world.world_size == 1:
            self.exit_status = self._signal_status
            return bool(self.exit_status)
        self._calls += 1
        if self._calls < self._interval and not now:
            return False
        status, interval = self._answer() if self._answer is not None else (0, 1)
        if now and not status:
            status, interval = self._ask()()
        if status:
            self.exit_status = status
            return True
        self._answer, self._interval = self._ask(), interval
        return False

    def raise_if_agreed(self, *, now: bool = False) -> None:
        """Raise `Stopped` if the run stops here; see `agreed`."""
        if self.agreed(now=now):
            raise self.stopped()

    def stopped(self) -> Stopped:
        """Return the exception with which the run ends, once `agreed` has returned True."""
        return Stopped(self.exit_status, self._reason)

    def watched(self, batches: Iterable[Any], num_batches: int) -> Iterator[Any]:
        """Yield the batches of a loader; raise `Stopped` if the run stops among the first ``num_batches`` of them.

        All ranks must have so many batches. Batches beyond these are not interrupted.
        """
        for number, batch in enumerate(batches):
            if number < num_batches:
                self.raise_if_agreed()
            yield batch

    def _ask(self) -> Callable[[], list[int]]:
        """Start a reduction of (exit status, rank 0's number of calls until the next one); return its reader.

        On a GPU the host does not wait for the reduction: the result is copied to the host behind it.
        """
        elapsed_s = time.monotonic() - self._asked_s
        interval = min(max(int(_ASK_S * self._calls / max(elapsed_s, 1e-9)), 1), 1000)
        self._calls, self._asked_s = 0, time.monotonic()
        question = torch.zeros(2, dtype=torch.int64, device=self.world.device)
        question[0].fill_(self._signal_status)
        question[1].fill_(interval if self.world.is_main else 0)
        work = dist.all_reduce(question, op=dist.ReduceOp.MAX, async_op=True)
        answer: torch.Tensor = question
        wait: Callable[[], Any] = work.wait
        if question.is_cuda:
            work.wait()  # the stream waits, not the host
            answer = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(question, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            wait = event.synchronize

        def read() -> list[int]:
            wait()
            return answer.tolist()

        return read

    def _stop_without_reader(self) -> None:
        self._sender.send(bytes([signal.SIGPIPE]))

    def _watch(self) -> None:
        first_s = 0.0
        while True:
            ready, _, _ = select.select([self._receiver], [], [], _LOOK_S)
            received = self._receiver.recv(64) if ready else b""
            if 0 in received:
                return
            signals = [signal.Signals(n) for n in received if n in self._before or n == signal.SIGPIPE]
            failure = self.world.store.failure() if self.world.world_size > 1 else None
            if failure is not None and failure.rank != self.world.rank:
                self.on_failure(failure.rank, failure.message)
                self._end(1, after_s=0 if signals or first_s else SECONDS_TO_END)
            for number in signals:
                if self._failing:
                    self._end(1)
                if not first_s:
                    first_s = time.monotonic()
                    self._notice(number)
                elif number not in _PATIENT and time.monotonic() - first_s > _SAME_S:
                    self._print("a second signal: ending at once, with what was saved before")
                    self._end(128 + number)

    def _end(self, status: int, after_s: float = 0.0) -> None:
        """End the process after a time, or at the next signal if that comes first."""
        select.select([self._receiver], [], [], after_s)
        sys.stdout.flush()
        os._exit(status)

    def _notice(self, number: signal.Signals) -> None:
        self._signal_status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if number == signal.SIGPIPE:
            self._reason = "since the reader of its output is gone"
        if self.world.is_main:
            cause = "the reader of the output is gone" if number == signal.SIGPIPE else number.name
            self._print(f"{cause}: saving at the end of this step; a second signal ends at once")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self.on_notice(text)
