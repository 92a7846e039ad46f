"""Writing and verifying under torchrun: the bytes of one process, and an end soon where a rank is lost."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.beton.verify import verify
from ffcv_ops.errors import UserError
from ffcv_ops.machine import cpus_per_rank
from ffcv_ops.workers import ranks
from ffcv_ops.workers.processes import Workers, WorkerTraceback
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write

ROOT = Path(__file__).parents[1]
SETTINGS = WriteSettings(mode="raw", max_side=200, page_size=1 << 21)
ARGUMENTS = ["--mode=raw", "--max_side=200", f"--page_size={1 << 21}"]
SOON_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four hundred images that take seconds to decode: two photographs, enlarged, under many names."""
    folder = tmp_path_factory.mktemp("data")
    for number, photograph in enumerate(load_sample_images().images):
        first = folder / f"class_{number}" / "0.jpg"
        first.parent.mkdir()
        Image.fromarray(np.kron(photograph[:400, :500], np.ones((2, 2, 1), np.uint8))).save(first)
        for copy in range(1, 200):
            shutil.copy(first, first.with_name(f"{copy}.jpg"))
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """The SHA-256 of the file that one process writes."""
    target = tmp_path_factory.mktemp("expected") / "file.beton"
    write(folder, target, SETTINGS, num_workers=2, notice=lambda line: None)
    return sha256(target)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def torchrun(num_ranks, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return subprocess.Popen(
        [*launcher, ROOT / "write_beton.py", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin(num_ranks, folder, target):
    return torchrun(num_ranks, f"--source={folder}", f"--target={target}", "--num_workers=1", *ARGUMENTS)


def finish(process, status=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == status, output
    return output


def process_of(process, rank):
    (found,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(rank)]
    return found


def num_noted(target):
    """The lines of the journal; the first one is no page."""
    journal = Path(f"{target}.partial.journal")
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for_page(process, target):
    """Wait until one more page is on disk."""
    before, start_s = max(1, num_noted(target)), time.monotonic()
    while num_noted(target) <= before:
        assert process.poll() is None and time.monotonic() - start_s < 300, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_three_ranks_write_the_bytes_of_one_process_though_one_was_killed(folder, expected, tmp_path):
    target = tmp_path / "file.beton"
    process = begin(3, folder, target)
    wait_for_page(process, target)
    process_of(process, 2).kill()
    killed_s = time.monotonic()
    output = finish(process, status=1)
    assert time.monotonic() - killed_s < SOON_S
    assert "3 workers on 1 machine" in output and output.count("400 images of about") == 1
    assert not target.exists()
    assert "resuming" in finish(begin(2, folder, target))
    assert sha256(target) == expected


@pytest.mark.slow
def test_a_bad_image_stops_all_ranks_and_leaves_nothing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    bad = tmp_path / "data" / "class_1" / "7.jpg"
    bad.write_bytes(bad.read_bytes()[:5000])
    output = finish(begin(2, tmp_path / "data", tmp_path / "file.beton"), status=1)
    assert f"error: {bad}: " in output and "--on_error=skip" in output
    assert list(tmp_path.glob("file.beton*")) == []


@pytest.mark.soak
def test_whichever_rank_is_killed_whoever_resumes_makes_the_same_bytes(folder, expected, tmp_path):
    random = np.random.default_rng(0)
    for number in range(4):
        target = tmp_path / f"{number}.beton"
        for _ in range(2):
            num_ranks = int(random.integers(1, 5))
            process = begin(num_ranks, folder, target)
            wait_for_page(process, target)
            family = psutil.Process(process.pid).children(recursive=True)
            victims = random.choice(num_ranks, random.integers(1, num_ranks + 1), replace=False)
            for victim in [process_of(process, rank) for rank in victims]:
                victim.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
            assert not re.search(f'File "{ROOT}/(write_beton|ffcv_ops)', finish(process, status=1))
            assert psutil.wait_procs(family, timeout=SOON_S)[1] == []
            assert not target.exists()
        assert "resuming" in finish(begin(int(random.integers(1, 5)), folder, target))
        assert sha256(target) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Rank 0 is this process, rank 1 another


@pytest.fixture
def other_rank(monkeypatch):
    """Make this process rank 0 of two; returns a function that starts rank 1 and says which versions it has."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    for name, value in (world | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    started = []

    def start(versions):
        program = (
            f"from ffcv_ops.workers.ranks import lend_workers\nraise SystemExit(lend_workers(1, lambda: {versions}))"
        )
        environment = os.environ | world | {"RANK": "1", "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_lent_workers_write_and_verify_and_go(folder, expected, tmp_path, other_rank):
    process, target = other_rank({"library": "1"}), tmp_path / "file.beton"
    with ranks.lead(lambda: {"library": "1"}) as leader:
        write(folder, target, SETTINGS, num_workers=1, leader=leader, notice=lambda line: None)
        assert sha256(target) == expected
        assert verify(target, num_workers=1, leader=leader).sound
    assert process.wait(SOON_S) == 0


def test_ranks_that_would_make_other_bytes_are_refused(other_rank):
    process = other_rank({"library": "2"})
    with pytest.raises(UserError, match="rank 1 on .* would make other bytes .* library is 2 there and 1 here"):
        with ranks.lead(lambda: {"library": "1"}):
            pass
    assert process.wait(SOON_S) == 1


def test_rank_0_takes_in_many_and_waits_for_no_stranger(monkeypatch):
    """Somebody connects to the port, says a little, and stays; each worker of the others needs an open file."""
    store, (before, most) = {}, resource.getrlimit(resource.RLIMIT_NOFILE)
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_store", lambda: SimpleNamespace(set=store.__setitem__))
    monkeypatch.setattr(ranks, "_CONNECT_S", 0.2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before, 256), most))
    try:
        leader = ranks.Leader()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
    host, port, token = json.loads(store[ranks._STORE_KEY])
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall(b"GE")
        with ranks._connect(ranks._Address(host, port, bytes.fromhex(token))) as connection:
            connection.send(ranks._Greeting(1, "other", 3, {}))
            leader.gather({})
            assert leader.num_workers == 3
            leader.end(True)
            assert connection.recv() is True


def add_arrays():
    """Return the function of a worker with a bug."""
    return lambda lengths: np.zeros(lengths[0]) + np.zeros(lengths[1])


def test_an_error_in_a_worker_comes_with_its_traceback():
    with closing(Workers(1, add_arrays)) as workers:
        workers.send(0, (2, 2))
        assert workers.receive()[1].tolist() == [0, 0]
        workers.send(0, (2, 3))
        with pytest.raises(ValueError, match="broadcast") as raised:
            workers.receive()
    assert isinstance(raised.value.__cause__, WorkerTraceback)
    assert "in <lambda>" in str(raised.value.__cause__) and "test_ranks.py" in str(raised.value.__cause__)


def test_the_cpus_of_a_machine_are_shared_out(monkeypatch):
    allowed = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        shares.append(cpus_per_rank())
    assert min(shares) >= 1 and sum(shares) == max(allowed, 3)
