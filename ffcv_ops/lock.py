"""Own a folder or an unfinished file, so that two processes never write it at once.

The lock is a small file that names its owner. It is made with ``O_EXCL``, which works on every file system, NFS
included. No other lock of the system is needed. The owner touches the file every few seconds.

A lock is taken over if its owner is dead:

- On the same machine, the owner's process has ended. A process is known by its number, its start and the boot.
- On another machine, or in another container, the file was not touched for `LIMIT_S` seconds. Both times come from the
  file system, so the clocks of the machines do not matter. If a clock was put back, the time of the file is in the
  future. Then the wait itself is measured.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ffcv_ops.errors import UserError
from ffcv_ops.files import write_all

# The owner touches its lock this often (s).
HEARTBEAT_S = 10.0
# If the lock of another machine was not touched for this long (s), its owner counts as dead.
LIMIT_S = 120.0
# An owner that is alive may be about to end: wait this long (s) before an error.
GRACE_S = 5.0
_POLL_S = 0.25


@dataclass(frozen=True)
class Owner:
    """The process that has a lock."""

    host: str
    pid: int
    start: str  # the start of the process in ticks since the boot; "" if the system does not tell
    machine: str  # boot and process namespace, within which the pid is valid; "" if the system does not tell
    since: float  # the time at which the lock was taken, in seconds since 1970
    token: str  # the random name of this lock

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"

    def is_alive(self) -> bool | None:
        """Return whether the process is alive; None if this machine cannot know."""
        if not self.machine or self.machine != _this_machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # the process belongs to somebody else
            pass
        start, is_dead = _process(self.pid)
        if is_dead:
            return False
        return start == self.start if start and self.start else None


@dataclass(frozen=True)
class _Seen:
    """A lock as found: its owner (None if the file is not complete), and the file's time and number."""

    owner: Owner | None
    touched_s: float
    inode: int


class OwnerLock:
    """A lock on what a user names, held from `acquire` to `release`, or as a context manager.

    Parameters
    ----------
    path : Path
        The lock. Missing folders are made, and removed again if they stay empty.
    conflict : str
        The beginning of the message if another process has the lock, such as "FILE: another process is writing it".
    remedy : str
        What the user can do instead of waiting.
    notice : callable
        Called with a line of text before a wait.
    """

    def __init__(self, path: Path, conflict: str, remedy: str, notice: Callable[[str], None] = lambda line: None):
        self.path, self.conflict, self.remedy, self.notice = path, conflict, remedy, notice
        self.owner: Owner | None = None
        self._made: list[Path] = []
        self._released = threading.Event()

    def __enter__(self) -> "OwnerLock":
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @property
    def token(self) -> str:
        """Return the random name of the lock; "" if this process does not have it."""
        return self.owner.token if self.owner is not None else ""

    def acquire(self, predecessor: str = "") -> None:
        """Take the lock. Wait a little for an owner that is about to end, and for one that may be dead.

        Parameters
        ----------
        predecessor : str
            Token of a lock whose owner is known to be dead.

        Raises
        ------
        UserError
            If another process has the lock, or the lock cannot be made.
        """
        start, _ = _process(os.getpid())
        self.owner = Owner(socket.gethostname(), os.getpid(), start, _this_machine(), time.time(), secrets.token_hex(8))
        try:
            self._make_folders()
            self._wait_and_take(predecessor)
        except OSError as error:
            self._remove_folders()
            raise UserError(f"{self.path}: cannot be made ({error.strerror})") from error
        except BaseException:
            self._remove_folders()
            raise
        self._released.clear()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _wait_and_take(self, predecessor: str) -> None:
        began_s = first_s = time.monotonic()
        first, noticed = None, False
        while not self._create():
            seen = self._look()
            if seen is None:
                continue
            if first is None or first.inode != seen.inode:
                first = seen
                first_s = time.monotonic()
            alive = self._is_alive(seen, first, predecessor)
            if alive is None and time.monotonic() - first_s > LIMIT_S:
                alive = False
            if alive is False:
                if self._take_over(seen):
                    return
            elif alive and time.monotonic() - began_s >= GRACE_S:
                raise UserError(self._message(seen))
            if not noticed:
                noticed = True
                self.notice(f"{self.conflict}: {seen.owner or self.path}. Waiting for its end, or a sign of its life")
            time.sleep(_POLL_S)

    def _is_alive(self, seen: _Seen, first: _Seen, predecessor: str) -> bool | None:
        if seen.owner is not None and seen.owner.token == predecessor:
            return False
        known = seen.owner.is_alive() if seen.owner is not None else None
        if known is not None:
            return known
        if seen.touched_s != first.touched_s:
            return True
        return False if self._now_s() - seen.touched_s > LIMIT_S else None

    def _message(self, seen: _Seen) -> str:
        message = f"{self.conflict}: {seen.owner or self.path}. Wait for that process, end it, or {self.remedy}"
        if seen.owner is not None and seen.owner.machine == _this_machine():
            return message
        return f"{message}. If it is dead, its lock {self.path} ends after {LIMIT_S:.0f} s; you may remove the lock"

    def _content(self) -> bytes:
        assert self.owner is not None
        return json.dumps(asdict(self.owner)).encode()

    def _create(self) -> bool:
        """Make the lock. Return False if there is one."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            write_all(descriptor, self._content())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _look(self) -> _Seen | None:
        """Return the lock as it is; None if there is none. Opening the file makes NFS ask the server."""
        try:
            with open(self.path, "rb") as file:
                content, stat = file.read(), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        try:
            owner = Owner(**json.loads(content))
        except (ValueError, TypeError):
            owner = None
        return _Seen(owner, stat.st_mtime, stat.st_ino)

    def _now_s(self) -> float:
        """Return the time of the file system."""
        probe = self._beside("probe")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beside(self, purpose: str) -> Path:
        assert self.owner is not None
        return self.path.with_name(f".{self.path.name}.{purpose}-{self.owner.token}.tmp")

    def _take_over(self, stale: _Seen) -> bool:
        """Replace a dead owner's lock. Return False if another process was faster.

        Only one process at a time may compare and replace. A second file, also made with O_EXCL, ensures this.
        """
        guard = self.path.with_name(f"{self.path.name}.takeover")
        try:
            os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._is_old(guard):
                    self._remove_guard(guard)
            return False
        try:
            now = self._look()
            if now is None or (now.owner, now.inode) != (stale.owner, stale.inode):
                return False
            new = self._beside("new")
            new.write_bytes(self._content())
            os.replace(new, self.path)
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _is_old(self, guard: Path) -> bool:
        return abs(self._now_s() - guard.stat().st_mtime) > LIMIT_S  # a clock may have been put back

    def _remove_guard(self, guard: Path) -> None:
        """Remove the guard of a process that was killed while it replaced the lock.

        Another process may do the same, and have made a guard of its own by now. A move shows which file it was.
        """
        aside = self._beside("guard")
        os.rename(guard, aside)
        try:
            if not self._is_old(aside):
                with contextlib.suppress(OSError):  # there is a third one, or the file system has no links
                    os.link(aside, guard)
        finally:
            aside.unlink()

    def _beat(self) -> None:
        """Touch the lock until it is released or lost."""
        while not self._released.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a file system may be away for a while
                if not self._is_ours():
                    return
                os.utime(self.path)

    def _is_ours(self) -> bool:
        """Return whether the lock is still ours. If somebody has removed it, make it again."""
        seen = self._look()
        if seen is None:
            return self._create()
        return seen.owner == self.owner

    def check(self) -> None:
        """Raise UserError if another process has taken the lock over, as after a long sleep of this machine."""
        with contextlib.suppress(OSError):
            if self.owner is not None and not self._is_ours():
                seen = self._look()
                other = seen.owner if seen is not None and seen.owner is not None else self.path
                raise UserError(
                    f"{self.conflict}: {other}. It took this process for dead, so this process writes no more"
                )

    def release(self) -> None:
        """Give the lock back, if it is ours. It can be called again, and from a process that never had the lock."""
        self._released.set()
        if self.owner is None or self.owner.pid != os.getpid():
            return
        with contextlib.suppress(OSError):
            seen = self._look()
            if seen is not None and seen.owner == self.owner:
                self.path.unlink()
        self.owner = None
        self._remove_folders()

    def _make_folders(self) -> None:
        missing = [folder for folder in (self.path.parent, *self.path.parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _remove_folders(self) -> None:
        """Remove the folders that were made for the lock and are empty."""
        while self._made:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()


def _this_machine() -> str:
    """Return a name for the boot of this machine and the namespace of its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, bool]:
    """Return the start of a process in ticks, "" if it is hidden, and True if the process is dead.

    A killed process whose threads still write is not dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", False
    return fields[19], fields[0] in "ZX" and int(fields[17]) <= 1
