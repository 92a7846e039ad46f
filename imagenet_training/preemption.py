"""Ending a run early: signals noticed at once, a step to stop at that all ranks agree on, other ranks' failures."""

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

from imagenet_training.distributed import Board, Failure, World

# Exit statuses after a save: EX_TEMPFAIL of sysexits.h, "try again later"; and the shell's for Ctrl-C.
PREEMPTED, INTERRUPTED = 75, 130
# How long a rank that failed has to speak and close its logs, before others leave and torchrun ends them all.
SECONDS_TO_END = 10
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Ranks ask each other about this often (s) whether one of them was signalled.
_ASK_S = 1.0
# How often (s) a rank looks whether another has failed.
_LOOK_S = 2.0
# A signal this soon (s) after the first is the same one: torchrun passes on what its whole process group got.
_SAME_S = 1.0


class Stopped(Exception):
    """All ranks stop here, because a signal to one of them asked for it."""


class StopRequest:
    """A request to end the run early, sent by a signal to any of its ranks.

    As a context manager, in the main thread: SIGTERM, SIGUSR1 and Ctrl-C no longer end the process but make `agreed`
    return True on all ranks, at the same call of each; a second signal ends the process at once. A thread of its own
    watches, since the main thread may be waiting for a rank that is gone: where another rank has failed, it hands the
    failure to `on_failure` and ends the process.

    No step waits for another rank: ranks ask by a reduction of two integers about once a second, and read the answer
    one question later, when it has long been there. They stop within some two seconds and a step.

    Parameters
    ----------
    world : World
    board : Board
        Where failures are announced.
    on_failure : callable
        Called in the watching thread with the failure of another rank.

    Attributes
    ----------
    exit_status : int
        For the process, once `agreed` has returned True: `INTERRUPTED` after Ctrl-C, else `PREEMPTED`.
    """

    def __init__(self, world: World, board: Board, on_failure: Callable[[Failure], None] = lambda failure: None):
        self.world, self.board, self.on_failure = world, board, on_failure
        self.exit_status = 0
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
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background jobs ask for
                self._before[number] = signal.signal(number, lambda number, frame: None)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self.world.world_size > 1 and kind not in (None, Stopped):
            self._failing = True  # the watcher stays, to end the process with the others
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._sender.send(b"\0")
        self._watcher.join()
        self._receiver.close()
        self._sender.close()

    def agreed(self, *, now: bool = False) -> bool:
        """Whether the run stops here. All ranks must call it at the same places.

        Parameters
        ----------
        now : bool
            Wait for the other ranks' present answer, at a place where the run waits for them anyway.
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

    def watched(self, batches: Iterable[Any], num_batches: int) -> Iterator[Any]:
        """The batches of a loader, left with `Stopped` where the run stops among the first ``num_batches`` of them.

        All ranks must have so many; what some have beyond is not interrupted.
        """
        for number, batch in enumerate(batches):
            if number < num_batches and self.agreed():
                raise Stopped
            yield batch

    def _ask(self) -> Callable[[], list[int]]:
        """Begin a reduction of (exit status, calls until the next question, as rank 0 has it); returns how to read it.

        On a GPU the host does not wait for it: the answer is copied behind it.
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

    def _watch(self) -> None:
        first_s = 0.0
        while True:
            ready, _, _ = select.select([self._receiver], [], [], _LOOK_S)
            received = self._receiver.recv(64) if ready else b""
            if 0 in received:
                return
            signals = [signal.Signals(number) for number in received if number in self._before]
            failure = self.board.failure() if self.world.world_size > 1 else None
            if failure is not None and failure.rank != self.world.rank:
                self.on_failure(failure)
                self._end(1, after_s=0 if signals or first_s else SECONDS_TO_END)
            for number in signals:
                if self._failing:
                    self._end(1)
                if not first_s:
                    first_s = time.monotonic()
                    self._notice(number)
                elif time.monotonic() - first_s > _SAME_S:
                    self._speak("a second signal: ending at once, with what was saved before")
                    self._end(128 + number)

    def _end(self, status: int, after_s: float = 0.0) -> None:
        """End the process, at the latest after a time and before that at a signal."""
        select.select([self._receiver], [], [], after_s)
        sys.stdout.flush()
        os._exit(status)

    def _notice(self, number: signal.Signals) -> None:
        self._signal_status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if self.world.is_main:
            self._speak(f"{number.name}: saving at the end of this step; a second signal ends at once")

    def _speak(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
