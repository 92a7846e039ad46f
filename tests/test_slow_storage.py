"""Storage that is slow, stalls, fails or goes away: the loader, the trainer and the writer wait, or name the fault."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from betons import jpeg_bytes, photographs, write_images

from ffcv_ops import CenterCrop, Label, Loader, OrderOption, read_beton
from ffcv_ops.cgroups import control_groups
from ffcv_ops.files import ReadError

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("benchmark_of_storage", ROOT / "benchmarks" / "storage.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

pytestmark = pytest.mark.slow

NUM_IMAGES, BATCH = 512, 32
FAST, NEAR = (0, 0, 10_000), (500, 1000, 250)
# How the trainer reads in each order, and validation.
ORDERS = {
    "random": {"order": OrderOption.RANDOM, "os_cache": True},
    "quasi_random": {"order": OrderOption.QUASI_RANDOM, "os_cache": False, "order_kwargs": {"buffer_pages": 2}},
    "validation": {"order": OrderOption.SEQUENTIAL, "os_cache": True, "drop_last": False},
    "validation_paged": {"order": OrderOption.SEQUENTIAL, "os_cache": False, "drop_last": False},
}


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A slow file system with a file of photographs."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "shown").mkdir()
    write_images(folder / "shown" / "file.beton", photographs(NUM_IMAGES, side=256), per_page=32)
    try:
        system = benchmark.SlowFileSystem(folder / "shown", folder)
        with system.mounted(*FAST):
            pass
    except (OSError, subprocess.CalledProcessError, SystemExit) as error:
        pytest.skip(f"the slow file system cannot be mounted: {error}")
    return system


def load(path, order, **options):
    pipelines = {"image": [CenterCrop(64)], "label": [Label()]}
    return Loader(path, BATCH, 1, seed=1, pipelines=pipelines, copy=True, **ORDERS[order], **options)


@pytest.fixture(scope="module")
def expected(slow):
    """The batches of each order, loaded from the local disk."""
    batches = {}
    for order in ORDERS:
        with load(slow.folder / "file.beton", order) as loader:
            batches[order] = [tuple(np.asarray(part).copy() for part in batch) for batch in loader]
    return batches


def assert_equal(batches, expected):
    for ours, theirs in zip(batches, expected, strict=True):
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(ours, theirs, strict=True))


def middle(slow):
    """The first and the last byte of a value in the middle of the file."""
    table = read_beton(slow.folder / "file.beton").allocations
    row = len(table) // 2
    return int(table.ptrs[row]), int(table.ptrs[row]) + int(table.sizes[row])


@pytest.mark.parametrize("order", ORDERS)
def test_batches_wait_for_storage_that_stalls(slow, expected, order):
    flag = slow.mount_point.with_name("stall")
    with slow.mounted(*NEAR, "--stall", str(flag)) as folder, load(folder / "file.beton", order) as loader:
        flag.touch()
        timer = threading.Timer(2, flag.unlink)
        timer.start()
        started_s = time.monotonic()
        assert_equal(list(loader), expected[order])
        assert time.monotonic() - started_s > 1.9
        assert 1.5 < loader.storage_wait_s < time.monotonic() - started_s
        timer.join()


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("order", ORDERS)
def test_a_range_that_cannot_be_read_is_one_error(slow, expected, order, fault):
    start, end = middle(slow)
    options = "--errno", str(fault), "--from", str(start), "--to", str(end)
    batches = []
    with slow.mounted(*NEAR, *options) as folder, load(folder / "file.beton", order) as loader:
        started_s = time.monotonic()
        with pytest.raises(ReadError, match=r"from \d+ on: '.*file\.beton'") as raised:
            batches.extend(loader)
        assert raised.value.errno == fault and time.monotonic() - started_s < 20
        assert raised.value.filename == str(folder / "file.beton")
    assert_equal(batches, expected[order][: len(batches)])
    with slow.mounted(*NEAR) as folder, load(folder / "file.beton", order) as loader:
        assert_equal(list(loader.epoch(0, skip=len(batches))), expected[order][len(batches) :])


@pytest.mark.parametrize("order", ORDERS)
def test_storage_that_goes_away_is_one_error(slow, expected, order):
    with slow.mounted(20_000, 100_000, 10) as folder, load(folder / "file.beton", order) as loader:
        batches = loader.epoch(0)
        first = next(batches)
        slow.process.kill()
        loaded = [first]
        started_s = time.monotonic()
        with pytest.raises(ReadError, match=r"file\.beton") as raised:
            loaded.extend(batches)
        assert raised.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        assert time.monotonic() - started_s < 20
        with pytest.raises(ReadError, match=r"file\.beton"):
            loader.epoch(0)
    assert_equal(loaded, expected[order][: len(loaded)])


def test_a_page_that_fails_under_a_decoder_is_named(slow, expected, monkeypatch):
    """Read ahead nothing but the tries, so that a decoder meets the fault."""
    from ffcv_ops.loading import read_ahead

    monkeypatch.setattr(read_ahead, "_CACHED_NS", 1 << 40)
    start, end = middle(slow)
    options = "--errno", str(errno.EIO), "--from", str(start), "--to", str(end)
    with slow.mounted(*FAST, *options) as folder, load(folder / "file.beton", "random") as loader:
        with pytest.raises(ReadError, match=r"Input/output error, in the .* on: '.*file\.beton'") as raised:
            list(loader)
        assert raised.value.errno == errno.EIO


def run(script, *arguments, **options):
    """Start a script as a user does."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def finished(process):
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def train(data, folder, *arguments):
    settings = {
        **{"data.train_dataset": data / "file.beton", "data.val_dataset": data / "file.beton", "data.num_workers": 1},
        **{
            "model.arch": "shufflenet_v2_x0_5",
            "model.num_classes": NUM_IMAGES,
            "training.precision": 32,
            "wandb.enable": 0,
        },
        **{"resolution.min_res": 32, "resolution.max_res": 32, "validation.resolution": 32, "training.epochs": 2},
        **{"training.batch_size": 16, "validation.batch_size": 64, "lr.lr": 0.01, "lr.lr_peak_epoch": 0},
        **{"training.save_every_steps": 2, "logging.log_every": 1, "logging.folder": folder},
    }
    return run("train_imagenet.py", *(f"--{key}={value}" for key, value in settings.items()), *arguments)


def assert_same_weights(folder, other):
    ours, theirs = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["model"] for path in (folder, other)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_resumes(slow, folder, uninterrupted):
    """Resume a run on storage that works, and compare its end with that of a run that was never interrupted."""
    with slow.mounted(*NEAR) as data:
        status, output = finished(train(data, folder, "--resume", "auto"))
    assert status == 0 and "resuming at epoch" in output, output
    assert_same_weights(folder, uninterrupted)


def wait_for_step(process, number):
    """Read the output of a run up to a step of its first epoch."""
    for line in process.stdout:
        if f"step {number}/" in line:
            return
    raise AssertionError("the run has ended")


@pytest.fixture(scope="module")
def uninterrupted(slow, tmp_path_factory):
    """The folder of a run on the local disk."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, output = finished(train(slow.folder, folder))
    assert status == 0, output
    return folder


def test_a_run_waits_for_storage_that_stalls_and_names_the_cause(slow, uninterrupted, tmp_path):
    flag = slow.mount_point.with_name("stall")
    with slow.mounted(*NEAR, "--stall", str(flag)) as data:
        process = train(data, tmp_path)
        wait_for_step(process, 2)
        flag.touch()
        (log,) = tmp_path.glob("logs/*.log")
        size_bytes = 0
        while size_bytes < (size_bytes := log.stat().st_size):  # steps go on until what was read ahead is used
            time.sleep(8)
        flag.unlink()
        status, output = finished(process)
    assert status == 0, output
    (line,) = re.findall(r"^epoch 0 \(1/2\).*", output, re.MULTILINE)
    rate, total, storage = map(
        float, re.search(r"(\S+) images/s  data wait (\S+)% \(storage (\S+)%, CPU", line).groups()
    )
    assert storage <= total and storage / 100 * NUM_IMAGES / rate > 5, line
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_a_run_ends_with_the_error_of_its_storage_and_is_resumed(slow, uninterrupted, tmp_path, order):
    """Of the two orders, only one has the batches of the uninterrupted run."""
    start, end = middle(slow)
    options = "--errno", str(errno.ESTALE), "--from", str(start), "--to", str(end)
    with slow.mounted(*NEAR, *options) as data:
        memory = f"--data.in_memory={int(order == 'random')}"
        status, output = finished(train(data, tmp_path, f"--data.order={order}", memory))
    lines = [line for line in output.splitlines() if "rror" in line]
    assert status == 1 and "Traceback" not in output, output
    assert len(lines) == 1 and lines[0].startswith("error: [Errno 116] Stale file handle, in the "), output
    assert "file.beton'. Put that right and start again; a run goes on with --resume auto" in lines[0]
    if order == "random":
        assert_resumes(slow, tmp_path, uninterrupted)


def test_a_run_ends_if_its_storage_goes_away_and_is_resumed(slow, uninterrupted, tmp_path):
    with slow.mounted(*NEAR) as data:
        process = train(data, tmp_path)
        wait_for_step(process, 4)
        slow.process.kill()
        status, output = finished(process)
    assert status == 1 and "Traceback" not in output, output
    assert re.search(r"^error: \[Errno (103|107)\] .*file\.beton'\. Put that right", output, re.MULTILINE), output
    assert_resumes(slow, tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def images(slow):
    """A folder of images below the slow file system, one of them larger than the others."""
    folder = slow.folder / "images"
    for number, image in enumerate([*photographs(59, side=128), *photographs(1, side=512)]):
        path = folder / f"class_{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(image).tobytes())
    return folder


def write(source, target):
    return run("write_beton.py", "--source", source, "--target", target, "--num_workers", 1)


def digest(target):
    return json.loads(Path(f"{target}.json").read_text())["digest"]


@pytest.fixture(scope="module")
def written(images, tmp_path_factory):
    target = tmp_path_factory.mktemp("written") / "file.beton"
    status, output = finished(write(images, target))
    assert status == 0, output
    return digest(target)


def test_the_writer_waits_for_storage_that_stalls(slow, images, written, tmp_path):
    flag = slow.mount_point.with_name("stall")
    with slow.mounted(*NEAR, "--stall", str(flag)) as data:
        flag.touch()
        process = write(data / images.name, tmp_path / "file.beton")
        time.sleep(10)
        flag.unlink()
        status, output = finished(process)
    assert status == 0 and digest(tmp_path / "file.beton") == written, output


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE])
def test_the_writer_names_an_image_that_cannot_be_read_and_goes_on_later(slow, images, written, tmp_path, fault):
    largest = max(path.stat().st_size for path in images.glob("*/*.jpg"))
    options = "--errno", str(fault), "--from", str(largest - 1), "--to", str(largest)
    with slow.mounted(*NEAR, *options) as data:
        status, output = finished(write(data / images.name, tmp_path / "file.beton"))
    assert status != 0 and "Traceback" not in output and not (tmp_path / "file.beton").exists(), output
    assert f"[Errno {fault}] {os.strerror(fault)}" in output and "59.jpg" in output, output
    with slow.mounted(*NEAR) as data:
        status, output = finished(write(data / images.name, tmp_path / "file.beton"))
    assert status == 0 and digest(tmp_path / "file.beton") == written, output


def test_the_writer_ends_if_its_storage_goes_away_and_goes_on_later(slow, images, written, tmp_path):
    with slow.mounted(20_000, 200_000, 1) as data:
        process = write(data / images.name, tmp_path / "file.beton")
        time.sleep(8)
        slow.process.kill()
        status, output = finished(process)
    assert status != 0 and "Traceback" not in output and not (tmp_path / "file.beton").exists(), output
    with slow.mounted(*NEAR) as data:
        status, output = finished(write(data / images.name, tmp_path / "file.beton"))
    assert status == 0 and digest(tmp_path / "file.beton") == written, output


LIMITED = """
import sys
from ffcv_ops import CenterCrop, Label, Loader, OrderOption
from ffcv_ops.loading.read_ahead import ReadAhead
limit_file, path = sys.argv[1:]
def load(order, indices):
    pipelines = {"image": [CenterCrop(64)], "label": [Label()]}
    return Loader(path, 16, 1, seed=1, order=order, indices=indices, pipelines=pipelines)
next(load(OrderOption.SEQUENTIAL, range(16)).epoch(0))  # all compiled code is in memory now, but few samples
loader = load(OrderOption.RANDOM, None)
with open("/proc/self/status") as file:
    (rss_kb,) = [int(line.split()[1]) for line in file if line.startswith("RssAnon")]
with open(limit_file, "w") as file:
    file.write(str(rss_kb * 1024 + (128 << 20)))
windows, begin_batch = [], ReadAhead.begin_batch
def noting(self, number):
    begin_batch(self, number)
    windows.append(sum(int(reads.sizes.sum()) for reads in self._batches.values()))
ReadAhead.begin_batch = noting
print(sum(len(labels) for epoch in (1, 2) for _, labels in loader.epoch(epoch)), max(windows))
"""


@pytest.fixture
def memory_group():
    """An empty control group, and its file for a limit."""
    parent = next(control_groups("memory"), None)
    limit_file = "memory.limit_in_bytes"
    if parent is not None and not (parent / limit_file).exists():
        limit_file = "memory.max"
    try:
        folder = parent / f"ffcv_test_{os.getpid()}"
        folder.mkdir()
    except (OSError, TypeError) as error:
        pytest.skip(f"no control group can be made: {error}")
    if not (folder / limit_file).exists():
        folder.rmdir()
        pytest.skip("no control group can limit memory")
    yield folder, limit_file
    folder.rmdir()


def test_a_process_whose_page_cache_is_smaller_than_the_file_reads_each_byte_once_an_epoch(slow, memory_group):
    group, limit_file = memory_group
    path = write_images(slow.folder / "large.beton", photographs(512, side=384), raw=True)  # 226 MB
    with slow.mounted(*NEAR) as data:
        inside = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', group, sys.executable, "-c", LIMITED]
        command = [*inside, group / limit_file, data / path.name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    num_bytes = path.stat().st_size
    path.unlink()
    assert done.returncode == 0, done.stderr
    count, window_bytes = map(int, done.stdout.split())
    assert count == 2 * 512 and window_bytes <= 32 << 20, "an eighth of what is left, and the batch that exceeds it"
    assert slow.counts["bytes"] <= 2 * num_bytes, "two epochs"
