"""Writing and verifying on the workers of a real Dask cluster, of which some are lost, wrong, or never there."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hosts import on_host, two_hosts
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.workers.tasks import NoWorkers
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[1]
DASK = Path(sys.executable).parent / "dask"
SETTINGS = WriteSettings(mode="raw", max_side=200, page_size=1 << 21)
ARGUMENTS = ["--mode=raw", "--max_side=200", f"--page_size={1 << 21}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six hundred images that take seconds to decode: two photographs, enlarged, under many names."""
    folder = tmp_path_factory.mktemp("data")
    for number, photograph in enumerate(load_sample_images().images):
        first = folder / f"class_{number}" / "0.jpg"
        first.parent.mkdir()
        Image.fromarray(np.kron(photograph[:400, :500], np.ones((2, 2, 1), np.uint8))).save(first)
        for copy in range(1, 300):
            shutil.copy(first, first.with_name(f"{copy}.jpg"))
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """The SHA-256 of the file that processes of this machine write."""
    target = tmp_path_factory.mktemp("expected") / "file.beton"
    write(folder, target, SETTINGS, num_workers=2, notice=lambda line: None)
    return sha256(target)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Cluster:
    """A scheduler and workers, each started by its command. All end with the test."""

    def __init__(self, folder, environment=(), scheduler=()):
        self.folder, self.processes = folder, []
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)}
        self.file = folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "--port=0", f"--scheduler-file={self.file}", *scheduler)
        wait_for(self.file.exists)

    def start(self, *arguments, prefix=(), **environment):
        with open(self.folder / "dask.log", "ab") as log:
            process = subprocess.Popen(
                [*prefix, DASK, *arguments, "--no-dashboard"],
                cwd=self.folder,
                env=self.environment | environment,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def start_workers(self, num_workers, *arguments, **options):
        counts = [f"--nworkers={num_workers}", "--nthreads=1", f"--local-directory={self.folder}"]
        return self.start("worker", f"--scheduler-file={self.file}", *counts, *arguments, **options)

    def num_registered(self):
        """The workers that the scheduler has ever accepted."""
        return self.log().count("Registered to:")

    def log(self):
        return (self.folder / "dask.log").read_text()

    def close(self):
        family = [child for p in self.processes for child in children(p)] + self.processes
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        for process in self.processes:
            process.wait()


def children(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def worker_processes(nanny):
    """The processes that run tasks."""

    def runs_tasks(child):
        try:
            return "--multiprocessing-fork" in " ".join(child.cmdline())
        except psutil.NoSuchProcess:  # it has just been killed
            return False

    return [child for child in children(nanny) if runs_tasks(child)]


@contextlib.contextmanager
def suspended(nanny):
    """Stop the processes of a worker for the time of the block. The scheduler takes them for slow ones."""
    processes = [psutil.Process(nanny.pid), *children(nanny)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def wait_for(condition, timeout_s=400):
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s
        time.sleep(0.05)


@pytest.fixture
def start_cluster(tmp_path):
    clusters = []

    def start(**options):
        folder = tmp_path / f"cluster_{len(clusters)}"
        folder.mkdir()
        clusters.append(Cluster(folder, **options))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.close()


def begin(cluster, *arguments, prefix=(), cwd=ROOT, **environment):
    return subprocess.Popen(
        [*prefix, sys.executable, ROOT / "write_beton.py", f"--cluster={cluster.file}", *map(str, arguments)],
        cwd=cwd,
        env=cluster.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin_writing(cluster, folder, target, *arguments, **options):
    return begin(cluster, f"--source={folder}", f"--target={target}", *ARGUMENTS, *arguments, **options)


def finish(process, status=0):
    output = process.communicate(timeout=600)[0]
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def num_pages(target):
    """The lines of the journal; the first one is no page."""
    journal = Path(f"{target}.partial.journal")
    with contextlib.suppress(FileNotFoundError):
        return journal.read_bytes().count(b"\n")
    return 0


def has_page(target):
    return num_pages(target) > 1


def test_a_cluster_writes_and_verifies_and_late_workers_join(start_cluster, folder, expected, tmp_path):
    cluster, target = start_cluster(), tmp_path / "file.beton"
    cluster.start_workers(1)
    process = begin_writing(cluster, folder, target)
    wait_for(lambda: has_page(target))
    cluster.start_workers(1)
    output = finish(process)
    assert "600 images of about" in output
    assert sha256(target) == expected
    assert "sound" in finish(begin(cluster, f"--verify={target}"))


def test_workers_that_are_killed_again_and_again_cost_their_tasks_only(start_cluster, folder, expected, tmp_path):
    cluster, target = start_cluster(), tmp_path / "file.beton"
    nanny = cluster.start_workers(2)
    process = begin_writing(cluster, folder, target)
    num_killed, num_seen = 0, 1
    while process.poll() is None:
        if num_pages(target) > num_seen and len(alive := worker_processes(nanny)) == 2:
            num_seen = num_pages(target)
            alive[num_killed % 2].kill()
            num_killed += 1
        time.sleep(0.1)
    finish(process)
    assert num_killed > 1 and sha256(target) == expected


def test_a_leader_that_is_killed_goes_on(start_cluster, folder, expected, tmp_path):
    cluster, target = start_cluster(), tmp_path / "file.beton"
    cluster.start_workers(2)
    process = begin_writing(cluster, folder, target)
    wait_for(lambda: has_page(target))
    process.kill()
    process.communicate()
    assert not target.exists()
    assert "resuming" in finish(begin_writing(cluster, folder, target))
    assert sha256(target) == expected


def test_a_scheduler_that_is_lost_ends_the_run_and_this_machine_goes_on(start_cluster, folder, expected, tmp_path):
    cluster, target = start_cluster(), tmp_path / "file.beton"
    cluster.start_workers(2)
    process = begin_writing(cluster, folder, target)
    wait_for(lambda: has_page(target))
    cluster.scheduler.kill()
    output = finish(process, status=1)
    assert re.search(r"error: the connection to the scheduler at tcp://\S+ is lost; the same command goes on", output)
    write(folder, target, SETTINGS, num_workers=2, notice=lambda line: None)
    assert sha256(target) == expected


def test_without_workers_the_run_waits_and_then_ends(start_cluster):
    from ffcv_ops.workers.cluster import DaskExecutor

    cluster, lines = start_cluster(), []
    with distributed.Client(scheduler_file=str(cluster.file), set_as_default=False) as client:
        executor = DaskExecutor(client, wait_s=4, notice=lines.append)
        with pytest.raises(NoWorkers, match=r"no worker has been connected to tcp://.* for \d s"):
            executor.submit(abs, -1).result(timeout=200)
        with pytest.raises(NoWorkers):
            executor.submit(abs, -1)
        executor.shutdown()
        assert len(lines) == 1 and "waiting for 4 s" in lines[0]
        late = DaskExecutor(client, wait_s=100, notice=lines.append)
        future = late.submit(abs, -1)
        threading.Timer(1, cluster.start_workers, (1,)).start()
        assert future.result(timeout=200) == 1
        late.shutdown()


def test_an_image_that_takes_its_worker_down_is_named(start_cluster, tmp_path):
    cluster = start_cluster(environment={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"})
    folder = tmp_path / "data" / "class_0"
    folder.mkdir(parents=True)
    for number in range(40):
        Image.fromarray(load_sample_images().images[0][:200, number : number + 300]).save(folder / f"{number}.jpg")
    Image.new("1", (40_000, 40_000)).save(folder / "monster.png")
    cluster.start_workers(2, "--memory-limit=900MB")
    output = finish(
        begin_writing(cluster, folder.parent, tmp_path / "file.beton", "--max_pixels=0", "--on_error=skip"), status=1
    )
    assert re.search(r"error: .*/class_0/monster.png: its worker ends each time.*memory is short", output)


@contextlib.contextmanager
def late_worker(cluster, folder, target, *arguments, **environment):
    """A run that another worker joins in the middle. The first worker does nothing for the time of the block."""
    nanny = cluster.start_workers(1)
    # Images of this size make more tasks than wait for one worker.
    process = begin_writing(cluster, folder, target, "--max_side=400")
    wait_for(lambda: has_page(target))
    with suspended(nanny):
        assert process.poll() is None
        cluster.start_workers(1, *arguments, **environment)
        wait_for(lambda: cluster.num_registered() == 2)
        yield process


OTHER_PILLOW = "import PIL\nPIL.__version__ = '1.0'\n"


def test_a_machine_with_other_versions_is_refused_also_if_it_joins_late(start_cluster, folder, tmp_path):
    (tmp_path / "other.py").write_text(OTHER_PILLOW)
    other = f"--preload={tmp_path / 'other.py'}"
    cluster = start_cluster()
    nanny = cluster.start_workers(1, other)
    output = finish(begin_writing(cluster, folder, tmp_path / "file.beton"), status=2)
    assert re.search(r"error: .* would make other bytes .* pillow is 1.0 there", output)
    nanny.terminate()
    nanny.wait()
    cluster = start_cluster()
    with late_worker(cluster, folder, tmp_path / "file.beton", other) as process:
        assert "pillow is 1.0 there" in finish(process, status=2)


def test_a_machine_without_this_project_is_named_also_if_it_joins_late(start_cluster, folder, tmp_path):
    (tmp_path / "ffcv_ops").mkdir()
    (tmp_path / "ffcv_ops" / "__init__.py").write_text("raise ModuleNotFoundError('not here')")
    cluster = start_cluster()
    with late_worker(cluster, folder, tmp_path / "file.beton", PYTHONPATH=str(tmp_path)) as process:
        output = finish(process, status=2)
    assert re.search(r"error: the worker at tcp://\S+ cannot run this project .*not here", output)
    output = finish(begin_writing(cluster, folder, tmp_path / "file.beton"), status=2)
    assert re.search(r"error: the worker at tcp://\S+ cannot run this project .*not here", output)


def test_a_machine_that_sees_other_images_is_named(start_cluster, folder, tmp_path):
    cluster = start_cluster()
    shutil.copytree(folder, tmp_path / "here" / "data")  # copies have other times
    shutil.copytree(folder, cluster.folder / "data", copy_function=shutil.copyfile)
    cluster.start_workers(1)
    process = begin_writing(cluster, "/proc/self/cwd/data", tmp_path / "file.beton", cwd=tmp_path / "here")
    assert re.search(r"error: .*jpg: on \S+ not the file that was listed", finish(process, status=2))


@pytest.fixture
def hosts():
    with two_hosts({"writer": "10.214.0.1", "helper": "10.214.0.2"}) as hosts:
        yield hosts


def test_two_machines_with_an_address_each(hosts, folder, expected, tmp_path):
    prefixes = {host: on_host(host) for host in hosts}
    tmp_path.joinpath("cluster").mkdir()
    cluster = Cluster.__new__(Cluster)
    cluster.folder, cluster.processes = tmp_path / "cluster", []
    cluster.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    cluster.file = f"tcp://{hosts['writer']}:8786"
    try:
        cluster.start("scheduler", f"--host={hosts['writer']}", "--port=8786", prefix=prefixes["writer"])
        arguments = ["worker", cluster.file, "--nthreads=1", f"--local-directory={cluster.folder}"]
        cluster.start(*arguments, "--nworkers=1", prefix=prefixes["writer"])
        helper = cluster.start(*arguments, "--nworkers=2", prefix=prefixes["helper"])
        process = begin_writing(cluster, folder, tmp_path / "file.beton", prefix=prefixes["writer"])
        wait_for(lambda: has_page(tmp_path / "file.beton"))
        subprocess.run(["ip", "-n", "helper", "link", "set", "helper0", "down"], check=True)
        helper.kill()
        finish(process)
        assert sha256(tmp_path / "file.beton") == expected
        assert f"tcp://{hosts['helper']}:" in cluster.log()
    finally:
        cluster.close()


def make_certificates(folder):
    """Run the commands of docs/WRITING.md, and return the files as options of Dask's commands and as environment."""
    text = (ROOT / "docs" / "WRITING.md").read_text()
    commands = re.findall("^openssl .*$", text, re.MULTILINE)
    folder.mkdir()
    subprocess.run(["sh", "-ec", "\n".join(commands)], cwd=folder, check=True, capture_output=True)
    files = {"ca-file": folder / "ca.pem", "cert": folder / "cert.pem", "key": folder / "key.pem"}
    names = re.findall(r"DASK_DISTRIBUTED__COMM__TLS__\w+", text)
    return [f"--tls-{name}={file}" for name, file in files.items()], dict(
        zip(names, map(str, files.values()), strict=True)
    )


def test_with_tls_both_sides_need_certificates_of_one_authority(start_cluster, folder, tmp_path):
    options, environment = make_certificates(tmp_path / "ours")
    _, others = make_certificates(tmp_path / "others")
    cluster = start_cluster(scheduler=["--protocol=tls", *options])
    cluster.start_workers(1, *options)
    finish(begin_writing(cluster, folder, tmp_path / "file.beton", "--subset=20", **environment))
    address = json.loads(cluster.file.read_text())["address"]
    assert address.startswith("tls://")
    plain = start_cluster().file.read_text()
    for cluster.file, files, message in (
        (address, {}, "Dask's configuration names no certificate"),
        (address, environment | {name: "/no.pem" for name in list(others)[:1]}, "TLS files .* cannot be used"),
        (address, others, "no connection to a scheduler .* from one authority"),
        (address.replace("tls", "tcp"), environment, "no connection to a scheduler .* from one authority"),
        (json.loads(plain)["address"].replace("tcp", "tls"), environment, "no connection .* it is tcp://HOST:PORT"),
        ("tsl://127.0.0.1:8786", environment, "no connection to a scheduler .*scheme"),
    ):
        start_s = time.monotonic()
        output = finish(begin_writing(cluster, folder, tmp_path / "other.beton", **files), status=2)
        assert re.search(f"^error: --cluster {cluster.file}: .*{message}", output, re.MULTILINE), output
        assert time.monotonic() - start_s < 50
