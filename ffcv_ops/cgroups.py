"""The control groups of Linux, by which containers and schedulers such as Slurm limit what a process may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that this process is in, and of all groups above. Each group may limit it.

    Both versions of control groups are read. Within a container the group's own path is often hidden, and the topmost
    folder is the container's.

    Parameters
    ----------
    controller : str
        Such as ``cpu`` or ``memory``.
    """
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controllers and controller)
        inner = root / group.lstrip("/")
        yield inner
        if inner != root:
            above = list(inner.parents)
            yield from above[: above.index(root) + 1]


def cpu_quota() -> float | None:
    """Return the CPU time per second that this process may use, in CPUs; None without a limit."""
    quotas = []
    for folder in control_groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            limit = " ".join(read(folder / file) for file in files).split()
            if len(limit) == 2 and limit[0].isdigit():
                quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def memory_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit of each group and the memory that the group uses, both in bytes.

    Cached pages of files do not count as used, because the kernel frees them on demand.
    """
    for folder in control_groups("memory"):
        stat = dict(line.split() for line in read(folder / "memory.stat").splitlines())
        for limit_file, usage_file, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit = read(folder / limit_file).strip()
            if limit.isdigit():
                cached = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
                yield int(limit), int(read(folder / usage_file) or 0) - cached


def available_bytes() -> int:
    """Return the memory that this process may still use, within its machine and its control groups, in bytes."""
    import psutil  # here, because the doctor reads this file before anything is installed

    return min([psutil.virtual_memory().available, *(limit - used for limit, used in memory_limits())])


def read(path: str | Path) -> str:
    """Return the text of a small file of the kernel, or "" if the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
