"""What every test relies on: no network, no window, and GPU tests only where there is a GPU."""

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline import Compiler

# Read by W&B, Hugging Face and Matplotlib when a test, or a script that a test starts, first uses them.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def compile_reader(self: OSCacheManager) -> Callable[..., Any]:
    """FFCV's reader of a mapped file, left to infer its types.

    FFCV declares them, and in doing so sets ``mutable`` on the ``uint8[::1]`` that Numba shares within a process. The
    type's hash changes, and compiling a kernel that calls one of such arrays fails with a KeyError from then on.
    """

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return Compiler.compile(read)


# For the tests that compare with FFCV's own loader in the process that compiles our kernels.
OSCacheManager.compile_reader = compile_reader
