"""What every test relies on: no network, no window, and GPU tests only where there is a GPU."""

import multiprocessing
import os
import signal

import pytest
import torch

# Read by W&B, Hugging Face and Matplotlib when a test, or a script that a test starts, first uses them.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# FFCV's writer starts its processes as Python does by default. From Python 3.14 on, that is no longer by a fork, and
# the classes of samples that tests define within functions would not reach those processes.
multiprocessing.set_start_method("fork")


LONG_FILES = {"test_write_beton.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Where several processes share the files out, those of long tests go first.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None and item.path.name not in LONG_FILES)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
