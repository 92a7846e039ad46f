"""The error that a user can put right, and how a command ends with it."""

import sys
import time
from typing import NoReturn

from ffcv_ops import machine

SECONDS_TO_SPEAK = 5


class UserError(ValueError):
    """An error that the user can put right. Its message is one line: what, where, and what to do."""


def exit_with_user_error(error: UserError) -> NoReturn:
    """Print an error in one line on stderr and exit with status 2.

    A launcher such as torchrun ends all processes as soon as one of them has exited. Only the first process of a node
    prints at once. The other processes wait a few seconds, and print only an error that the first one does not have.

    Raises
    ------
    SystemExit
        Always.
    """
    message = str(error)
    if machine.local_rank():
        time.sleep(SECONDS_TO_SPEAK)
        message = f"rank {machine.rank()}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
