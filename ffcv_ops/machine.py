"""The share of this process in the machine and the run: its CPUs, and its place among the ranks.

The names of the environment variables are torchrun's.
"""

import os


def is_launched() -> bool:
    """Return whether a launcher such as torchrun has started this process as one rank of a run."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return the number of this process in the run; 0 without a launcher."""
    return _launched("RANK", 0)


def world_size() -> int:
    """Return the number of processes in the run; 1 without a launcher."""
    return _launched("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process on its node; 0 without a launcher."""
    return _launched("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes of the run on this node; 1 without a launcher."""
    return _launched("LOCAL_WORLD_SIZE", 1)


def _launched(name: str, otherwise: int) -> int:
    # A shell or a container may have one of these variables for another program.
    return int(os.environ.get(name, otherwise)) if is_launched() else otherwise


def allowed_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus_per_rank() -> int:
    """Return this rank's share of the allowed CPUs, at least 1; the shares of a node's ranks add up to all CPUs."""
    allowed, number, of = allowed_cpus(), local_rank(), local_world_size()
    return max(1, allowed * (number + 1) // of - allowed * number // of)
