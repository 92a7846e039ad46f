"""The lock of a folder or file: who has it, when it is free, and what happens if its owner dies."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ffcv_ops import lock as locks
from ffcv_ops.errors import UserError
from ffcv_ops.lock import OwnerLock

HOLDER = textwrap.dedent("""
    import pathlib, sys, time
    from ffcv_ops.lock import OwnerLock

    OwnerLock(pathlib.Path(sys.argv[1]), "in use", "go elsewhere").acquire()
    print("taken", flush=True)
    time.sleep(60)
""")


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(locks, "GRACE_S", 0.3)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(locks, "LIMIT_S", 1.0)
    monkeypatch.setattr(locks, "_POLL_S", 0.02)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def lock_of(path, **options):
    return OwnerLock(path, "in use", "go elsewhere", **options)


def write_owner(path, **changes):
    """Leave the lock of another process."""
    with lock_of(path) as own:
        owner = replace(own.owner, token="other", **changes)
    path.write_text(json.dumps(asdict(owner)))


def test_a_second_process_is_refused_and_told_who_has_the_lock(holder, tmp_path):
    path = tmp_path / "run.lock"
    before = sorted(tmp_path.iterdir())
    notices = []
    expected = (
        rf"^in use: process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d .*\. Wait for that process, end it, or go"
    )
    with pytest.raises(UserError, match=expected):
        lock_of(path, notice=notices.append).acquire()
    assert sorted(tmp_path.iterdir()) == before and len(notices) == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_at_once(holder, tmp_path, end):
    holder.send_signal(end)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # the process is a zombie, which nobody has waited for
    waits = []
    with lock_of(tmp_path / "run.lock", notice=waits.append) as ours:
        assert waits == []
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        ours.check()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_while_another_waits_gives_way(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "GRACE_S", 30.0)
    threading.Timer(0.3, holder.kill).start()
    threading.Timer(0.3, holder.wait).start()
    with lock_of(tmp_path / "run.lock"):
        assert time.monotonic()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"start": "1"}, id="its number is another process's now"),
        pytest.param({"pid": 2**22 + 1}, id="no such process"),
    ],
)
def test_a_number_alone_is_no_process(tmp_path, changes):
    write_owner(tmp_path / "run.lock", **changes)
    waits = []
    with lock_of(tmp_path / "run.lock", notice=waits.append):
        assert waits == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"machine": "another boot"}, id="another machine, container or boot"),
        pytest.param({"machine": ""}, id="a system without /proc"),
    ],
)
def test_the_lock_of_another_machine_ends_after_its_last_sign_of_life(tmp_path, changes):
    path = tmp_path / "run.lock"
    write_owner(path, pid=1, host="elsewhere", **changes)
    started_s = time.monotonic()
    with lock_of(path):
        assert 0.8 < time.monotonic() - started_s


@pytest.mark.parametrize("age_s", [10**6, -(10**6)])
def test_a_process_killed_while_it_took_a_lock_over_stops_no_other(tmp_path, age_s):
    write_owner(tmp_path / "run.lock", pid=2**22 + 1)
    guard = tmp_path / "run.lock.takeover"
    guard.touch()
    os.utime(guard, (time.time() - age_s,) * 2)
    with lock_of(tmp_path / "run.lock"):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_the_guard_of_a_process_that_lives_is_put_back(tmp_path):
    with lock_of(tmp_path / "run.lock") as lock:
        guard = tmp_path / "run.lock.takeover"
        guard.write_text("another's")
        lock._remove_guard(guard)  # it was old when this process looked, and another process has made it again
        assert guard.read_text() == "another's"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", "run.lock.takeover"]


@pytest.mark.parametrize("content", ["owner", ""])
def test_a_lock_from_the_future_ends_too(tmp_path, content):
    path = tmp_path / "run.lock"
    write_owner(path, host="elsewhere", machine="another boot")
    path.write_text(content and path.read_text())
    future_s = time.time() + 10**6  # the clock was put back since
    os.utime(path, (future_s, future_s))
    with lock_of(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_machine_that_lives_keeps_its_lock(tmp_path):
    path = tmp_path / "run.lock"
    write_owner(path, host="elsewhere", machine="another boot")
    stop = threading.Event()

    def touch():
        while not stop.wait(0.1):
            os.utime(path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with pytest.raises(UserError, match=r"on elsewhere since .* ends after 1 s; you may remove the lock"):
            lock_of(path).acquire()
    finally:
        stop.set()
        toucher.join()


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_a_torn_lock_ends_too(tmp_path, content):
    path = tmp_path / "run.lock"
    path.write_text(content)
    os.utime(path, (0, 0))
    with lock_of(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_known_predecessor_is_replaced_at_once(tmp_path):
    write_owner(tmp_path / "run.lock", host="elsewhere", machine="another boot")
    ours = lock_of(tmp_path / "run.lock")
    ours.acquire(predecessor="other")
    ours.release()


def test_who_has_lost_the_lock_learns_it_and_leaves_the_new_owner_alone(tmp_path):
    path = tmp_path / "run.lock"
    ours = lock_of(path)
    ours.acquire()
    write_owner(tmp_path / "theirs", host="elsewhere")
    os.replace(tmp_path / "theirs", path)
    with pytest.raises(UserError, match="in use: process .* on elsewhere .* this process writes no more"):
        ours.check()
    ours.release()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_lock_that_somebody_removes_is_made_again(tmp_path):
    with lock_of(tmp_path / "run.lock") as ours:
        (tmp_path / "run.lock").unlink()
        ours.check()
        assert (tmp_path / "run.lock").exists()


def test_folders_that_stay_empty_are_removed(tmp_path):
    with lock_of(tmp_path / "runs" / "first" / "run.lock"):
        (tmp_path / "runs" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "kept"]


RACER = textwrap.dedent("""
    import pathlib, sys, time
    from ffcv_ops import lock
    from ffcv_ops.errors import UserError

    lock.GRACE_S, lock._POLL_S, path = 60.0, 0.002, pathlib.Path(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(30):
        with lock.OwnerLock(path / "run.lock", "", ""):
            inside = path / "inside"
            inside.mkdir()  # fails if another process is inside
            time.sleep(0.001)
            inside.rmdir()
        if number == 10 and sys.argv[2] == "dies":
            lock.OwnerLock(path / "run.lock", "", "").acquire()
            break
    print("done", flush=True)
""")


def test_of_many_processes_one_has_the_lock_though_some_die_with_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), end],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for end in ("lives", "dies", "dies", "lives")
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        output, _ = racer.communicate(timeout=120)
        assert (racer.returncode, output) == (0, "done\n")
