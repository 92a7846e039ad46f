"""End a run that fails: with one line for a known cause, with a traceback for a bug, and on several ranks only once."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ffcv_ops import SampleError, UserError
from ffcv_ops.files import ReadError, SaveError
from imagenet_training import distributed
from imagenet_training.distributed import Failure, World
from imagenet_training.planning.plan import RunPlan
from imagenet_training.reports.logs import RunLog
from imagenet_training.training.preemption import SECONDS_TO_END, Stopped


class RunError(RuntimeError):
    """A run cannot continue. The message is one line, with what to do."""


@contextmanager
def ending_with_status(
    plan: RunPlan, world: World, log: RunLog, finish: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """End the process with an exit status if the run in this context is stopped or fails.

    Parameters
    ----------
    log : RunLog
        Gets the error, and is closed.
    finish : callable
        Called after a failure, to finish what has begun: an epoch that is over is saved in any case.

    Raises
    ------
    SystemExit
        With the status of the signal, or with 1 after a failure.
    """
    try:
        yield
    except Stopped as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run is saved, and another Ctrl-C would print a traceback
        distributed.stop()
        raise SystemExit(stopped.exit_status) from None
    except Exception as error:
        _end_failed(error, plan, world, log, finish)
    distributed.stop()


def _end_failed(error: Exception, plan: RunPlan, world: World, log: RunLog, finish: Callable[[], None]) -> NoReturn:
    """Exit with status 1. Only the rank that failed first prints its error; torchrun ends the others."""
    message, is_final = _explain(error, plan)
    if world.world_size == 1:
        log.print(f"error: {message}")
    else:
        _report_first_failure(error, message, world, log)
    if is_final:
        world.store.write("given up", message)  # torchrun need not restart the run
    try:
        finish()
    except Exception as other:
        log.print(f"error: the last save has failed too: {type(other).__name__}: {other}")
    get_error_handler().record_exception(error)
    log.close(exit_code=1)
    if world.world_size == 1:
        raise SystemExit(1) from error
    sys.stdout.flush()
    os._exit(1)  # to leave the process group would mean to wait for ranks that are gone


def _explain(error: Exception, plan: RunPlan) -> tuple[str, bool]:
    """Return the text for an error, and True if the run would fail again. A known cause needs no traceback."""
    if isinstance(error, torch.OutOfMemoryError):
        return out_of_memory_message(plan), True
    if isinstance(error, (SaveError, ReadError)):
        remedy = "Put that right and start again; a run goes on with --resume auto"
        return f"{error}. {remedy}", isinstance(error, SaveError)
    if isinstance(error, (RunError, SampleError, UserError)):
        return str(error), True
    return traceback.format_exc().rstrip(), False


def _report_first_failure(error: Exception, message: str, world: World, log: RunLog) -> None:
    """Print the error if this rank is the first to fail; else print the other rank's, and wait for torchrun."""
    if distributed.may_follow_from_another(error):
        time.sleep(SECONDS_TO_END)  # the rank with the cause announces it meanwhile
    failure = world.store.announce(Failure(world.rank, message))
    if failure.rank != world.rank:
        log.failure(failure.rank, failure.message)
        time.sleep(SECONDS_TO_END)
    elif world.is_main:
        log.print(f"error: rank 0: {message}")
    else:
        print(f"error: rank {failure.rank}: {message}", file=sys.stderr, flush=True)


def out_of_memory_message(plan: RunPlan) -> str:
    """Return the batch size to try after the GPU's memory ran out, and the learning rate that goes with it."""
    if plan.batch_size == 1:
        return "out of GPU memory at a batch size of 1: end what else uses it, or choose a smaller --model.arch"
    batch_size = plan.batch_size // 2
    global_batch_size = plan.global_batch_size // plan.batch_size * batch_size
    lr = plan.lr * global_batch_size / plan.global_batch_size
    advice = (
        f"out of GPU memory at a batch size of {plan.batch_size}. Try --batch_size {batch_size}: its "
        f"linearly scaled learning rate is {lr:.4g} (global batch {global_batch_size})"
    )
    if 2 * batch_size != plan.batch_size:
        return advice
    return (
        f"{advice}; or --batch_size {batch_size} --training.accumulation={2 * plan.accumulation}, which keeps the "
        "global batch and the learning rate"
    )
