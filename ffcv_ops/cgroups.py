"""The control groups of Linux, by which containers and schedulers limit what a process may take of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that this process is in, under version 2 and 1, and of all above: each may limit.

    Within a container the group's own path is often not to be seen, and the topmost folder is the container's.

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


def read(path: str | Path) -> str:
    """The text of a small file of the kernel's, "" where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
