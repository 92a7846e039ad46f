"""Copies of .beton files: whole and checked or absent, resumed after a kill, one at a time on a machine."""

import fcntl
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from betons import photographs

from ffcv_ops import staging
from ffcv_ops.beton import manifest_path, read_beton
from ffcv_ops.staging import StageError, stage
from ffcv_ops.verify import verify
from ffcv_ops.writer import WriteSettings, write

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "stage.sh"
PAGE_SIZE = 1 << 21


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of a dozen pages, one image stored under many names."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    (image,) = photographs(1, side=400)
    first = folder / "data" / "class" / "0.png"
    first.parent.mkdir(parents=True)
    Image.fromarray(image).save(first)
    for copy in range(1, 48):
        os.link(first, first.with_name(f"{copy}.png"))
    settings = WriteSettings("raw", max_side=0, page_size=PAGE_SIZE)
    write(folder / "data", folder / "train.beton", settings, num_workers=2, notice=lambda line: None)
    return folder / "train.beton"


@pytest.fixture
def source(written, tmp_path):
    """A copy of the file to be spoilt, in a folder of its own."""
    (tmp_path / "shared").mkdir()
    for path in (written, manifest_path(written)):
        shutil.copy(path, tmp_path / "shared")
    return tmp_path / "shared" / written.name


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def quiet(source, folder, **options):
    return stage(source, folder, **{"notice": lambda line: None} | options)


def begin(source, folder, **options):
    command = ["bash", SCRIPT, source, folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process, status=0):
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return output, errors


def same(one, other):
    return (
        one.read_bytes() == other.read_bytes() and manifest_path(one).read_bytes() == manifest_path(other).read_bytes()
    )


def test_a_copy_is_whole_and_made_once(written, scratch):
    copied = f"--data.train_dataset={scratch}/train.beton\n"
    output, errors = finish(begin(written, scratch))
    assert output == copied and "as its manifest's digest says" in errors and "/s" in errors
    assert same(written, scratch / "train.beton") and names(scratch) == ["train.beton", "train.beton.json"]
    inode = (scratch / "train.beton").stat().st_ino
    output, errors = finish(begin(written, scratch))
    assert output == copied and "is there already" in errors
    assert (scratch / "train.beton").stat().st_ino == inode


# Kills itself half-way, when something of the copy is safely on disk.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from ffcv_ops.staging import stage

def progress(done, total):
    while done > total / 2:
        if Path(f"{sys.argv[2]}/train.beton.partial.journal").read_bytes().count(b"\\n") > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

stage(*sys.argv[1:], progress=progress)
"""


def test_a_killed_copy_goes_on(written, scratch):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, written, scratch], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert names(scratch) == ["train.beton.partial", "train.beton.partial.journal"]
    _, errors = finish(begin(written, scratch))
    assert "resuming: " in errors
    assert same(written, scratch / "train.beton") and names(scratch) == ["train.beton", "train.beton.json"]


def test_a_copy_killed_while_it_gets_its_name_goes_on(written, scratch, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(staging.journal.PartialFile, "publish", interrupt)
        quiet(written, scratch)
    assert not (scratch / "train.beton").exists()
    notices = []
    stage(written, scratch, notice=notices.append)
    assert "resuming" in notices[0] and same(written, scratch / "train.beton")
    (scratch / "train.beton.partial.journal").touch()
    quiet(written, scratch)
    assert names(scratch) == ["train.beton", "train.beton.json"]


def test_a_changed_byte_gets_no_name(source, written, scratch):
    entry = read_beton(source).alloc_table[40]
    with open(source, "r+b") as file:
        file.seek(int(entry["ptr"]) + 5)
        byte = file.read(1)[0]
        file.seek(int(entry["ptr"]) + 5)
        file.write(bytes([byte ^ 1]))
    output, errors = finish(begin(source, scratch), status=1)
    assert output == "" and "train.beton: damaged: the bytes of sample 40 are not those that were written" in errors
    assert not (scratch / "train.beton").exists() and not manifest_path(scratch / "train.beton").exists()
    shutil.copy(written, source)
    assert "resuming" in finish(begin(source, scratch))[1]
    assert same(written, scratch / "train.beton")
    assert verify(scratch / "train.beton", num_workers=1).sound


def test_a_change_that_only_the_digest_tells_gets_no_name(source, scratch):
    """Should a sample's bytes change and the four bytes that are kept of its hash do not."""
    manifest = read_beton(source).manifest
    assert manifest is not None
    wrong = manifest_path(source).read_text().replace(manifest["digest"], "sha256:" + 64 * "0")
    manifest_path(source).write_text(wrong)
    with pytest.raises(StageError, match="its digest is sha256:"):
        quiet(source, scratch)
    assert names(scratch) == []


def test_a_source_that_was_written_anew_starts_over(source, scratch, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(source, scratch, progress=interrupt)
    other = WriteSettings("raw", max_side=300, page_size=PAGE_SIZE)
    data = read_beton(source).manifest["source"]["folder"]
    write(data, source, other, num_workers=2, overwrite=True, notice=lambda line: None)
    notices = []
    stage(source, scratch, notice=notices.append)
    assert "starting over" in notices[0] and same(source, scratch / "train.beton")
    write(data, source, WriteSettings(), num_workers=2, overwrite=True, notice=lambda line: None)
    with pytest.raises(ValueError, match="exists already and is another file"):
        quiet(source, scratch)


def test_copies_on_one_machine_wait_for_each_other(written, scratch):
    descriptor = os.open(scratch, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    processes = [begin(written, scratch) for _ in range(2)]
    for process in processes:
        assert "waiting for another process" in process.stderr.readline()
    assert names(scratch) == []
    os.close(descriptor)
    errors = [finish(process)[1] for process in processes]
    assert sorted("is there already" in text for text in errors) == [False, True]
    assert same(written, scratch / "train.beton")


def test_a_disk_that_takes_no_more_ends_the_copy(written, scratch):
    """A limit on the size of files stands in for a full disk: both fail in the write."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, 12 << 20))

    _, errors = finish(begin(written, scratch, preexec_fn=limit), status=1)
    assert "copying stopped" in errors and "File too large" in errors and "the same command goes on" in errors
    assert not (scratch / "train.beton").exists()
    finish(begin(written, scratch))
    assert same(written, scratch / "train.beton")


def test_the_rate_counts_the_first_page_too():
    progress = runpy.run_path(str(SCRIPT.with_suffix(".py")))["Progress"]()
    progress(0, 100)
    progress(100, 100)
    assert progress.rate() > 0


def test_what_cannot_be_is_said_before(source, scratch, monkeypatch):
    assert "no such file" in finish(begin(source.parent / "val.beton", scratch), status=2)[1]
    with pytest.raises(ValueError, match="no such folder"):
        quiet(source, scratch / "missing")
    with pytest.raises(ValueError, match="is the file to be copied"):
        quiet(source, source.parent)
    usage = shutil.disk_usage(scratch)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ValueError, match="0.0 MB free, .* needed"):
            quiet(source, scratch)
    manifest_path(source).unlink()
    with pytest.raises(ValueError, match="no manifest"):
        quiet(source, scratch)
    assert names(scratch) == []
    assert "usage: " in subprocess.run(["bash", SCRIPT], capture_output=True, text=True).stderr
