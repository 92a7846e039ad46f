"""W&B offline: a resumed run has several parts, which together hold each step and epoch once."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from imagenet_training.reports.wandb import copy_parts, cut_torn_end, read_parts, start_wandb, sync_command
from imagenet_training.state import TrainState

ROOT = Path(__file__).parent.parent
PROVENANCE = {"recipe": {"wandb": {"enable": True, "project": "p", "name": None}}, "file": "caf\udce9"}


def start(folder, state, lines, records=()):
    return start_wandb(state, PROVENANCE, folder, lines.append, records)


def rows(folder, wandb_id):
    """The rows of all parts in their order: step, epoch or None."""
    from imagenet_training.reports.wandb import _read_log

    found = []
    for part in read_parts(folder, wandb_id):
        for record, _ in _read_log(part.path / f"run-{wandb_id}.wandb"):
            if record.HasField("history"):
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                found.append((row["_step"], row.get("epoch")))
    return found


def wait_for(folder, wandb_id, last):
    """Wait until W&B has written a row to its file, which it does after the end of a run."""
    end_s = time.monotonic() + 30
    while not (found := rows(folder, wandb_id)) or found[-1] != last:
        assert time.monotonic() < end_s, found
        time.sleep(0.05)
    newest_s = max(path.stat().st_ctime for path in folder.glob(f"*-{wandb_id}"))
    while time.time() < newest_s + 1.1:  # W&B names a part by the second of its start
        time.sleep(0.05)


@pytest.mark.slow
def test_the_parts_of_a_run_hold_each_step_and_epoch_once_and_are_uploaded_by_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, state, lines = Path("a run's logs"), TrainState(run_name="train_x"), []
    folder.mkdir()
    first = start(folder, state, lines)
    for step in range(1, 6):
        first.log_step({"step/loss": 1.0}, step)
    first.log_epoch({"epoch": 0, "val/acc1": 0.1}, 5)
    for step in range(6, 9):
        first.log_step({"step/loss": 1.0}, step)
    first.finish(1)
    wait_for(folder / "wandb", state.wandb_id, (8, None))
    # A checkpoint at step 6: the steps up to 8 are there. Epoch 1 was not evaluated at step 8.
    records = [{"epoch": 0, "step": 5, "time": 0.0}]
    state.step = 6
    second = start(folder, state, lines, records)
    assert "W&B: earlier parts have the steps up to 8, which stay; only later ones are recorded" in lines
    for step in range(7, 9):
        second.log_step({"step/loss": 1.0}, step)
    second.log_epoch({"epoch": 1, "val/acc1": 0.2}, 8)
    second.log_step({"step/loss": 1.0}, 10)
    second.finish(0)
    wait_for(folder / "wandb", state.wandb_id, (10, None))
    # A part that was killed before W&B wrote anything, and lost epoch 2; an end that is torn.
    parts = read_parts(folder / "wandb", state.wandb_id)
    empty = folder / "wandb" / f"offline-run-20990101_000000-{state.wandb_id}"
    empty.mkdir()
    (empty / f"run-{state.wandb_id}.wandb").write_bytes(b":W&B\x00\x00\x00")
    with open(parts[0].path / f"run-{state.wandb_id}.wandb", "ab") as file:
        file.write(b"\x00\x00\x00\x00\xff\x00\x01torn")
    third = start(folder, state, lines, [*records, {"epoch": 1, "step": 8}, {"epoch": 2, "step": 12}])
    third.log_step({"step/loss": 1.0}, 14)
    third.finish(0)
    wait_for(folder / "wandb", state.wandb_id, (14, None))
    expected = [(step, None) for step in range(1, 5)] + [(5, 0), (6, None), (7, None), (8, None)]
    assert rows(folder / "wandb", state.wandb_id) == [*expected, (9, 1), (10, None), (12, 2), (14, None)]

    command = lines[-1].partition("uploads the run: ")[2]
    words = shlex.split(command)
    assert words[:2] == ["wandb", "sync"] and len(words) == 5 and str(empty) not in words
    for word in words[2:]:  # the end of each part is whole
        path = Path(word) / f"run-{state.wandb_id}.wandb"
        size = path.stat().st_size
        cut_torn_end(path)
        assert path.stat().st_size == size
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_SILENT": "false"}
    shown = subprocess.run(f"{command} --dry-run", shell=True, env=environment, capture_output=True, text=True)
    assert "Would sync 3 run(s)" in shown.stdout + shown.stderr, shown
    assert all(word in shown.stdout + shown.stderr for word in words[2:])

    # The run goes on in another folder.
    assert copy_parts(folder / "wandb", tmp_path / "other", state.wandb_id) == 4
    assert copy_parts(folder / "wandb", tmp_path / "other", state.wandb_id) == 0
    assert rows(tmp_path / "other", state.wandb_id) == rows(folder / "wandb", state.wandb_id)
    copies = shlex.split(sync_command(tmp_path / "other" / Path(words[-1]).name, state.wandb_id))
    assert copies == [*words[:2], *(str(tmp_path / "other" / Path(word).name) for word in words[2:])]
    # A clock that was put back before the second part does not change the order.
    second, third = Path(copies[3]), Path(copies[4])
    earlier = second.rename(second.with_name(f"offline-run-20000101_000000-{state.wandb_id}"))
    assert shlex.split(sync_command(third, state.wandb_id)) == [*copies[:3], str(earlier), str(third)]
    assert rows(tmp_path / "other", state.wandb_id) == rows(folder / "wandb", state.wandb_id)
    # A damaged record ends no run, and the rows behind it stay.
    damaged = Path(copies[2]) / f"run-{state.wandb_id}.wandb"
    content = bytearray(damaged.read_bytes())
    at = content.index(b"step/loss")
    content[at : at + 4] = b"\xff" * 4
    damaged.write_bytes(content)
    cut_torn_end(damaged)
    assert damaged.read_bytes() == content
    assert len(read_parts(tmp_path / "other", state.wandb_id)) == 4


def test_a_folder_that_wandb_cannot_name_ends_no_run(tmp_path):
    """In a process of its own, because pytest-xdist cannot send such a name in the output of a test."""
    script = """
        import os, pathlib, sys
        from imagenet_training.state import TrainState
        from imagenet_training.reports.wandb import start_wandb

        folder = pathlib.Path(sys.argv[1]) / os.fsdecode(b"caf\\xe9")
        folder.mkdir()
        provenance = {"recipe": {"wandb": {"enable": True, "project": "p", "name": None}}}
        lines = []
        assert start_wandb(TrainState(run_name="train_x"), provenance, folder, lines.append, []) is None
        print(ascii(lines[-1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True)
    assert b"note: W&B does not record this run: UnicodeEncodeError" in done.stdout, done.stderr


SURVIVOR = textwrap.dedent("""
    import pathlib, sys
    import psutil
    from imagenet_training.state import TrainState
    from imagenet_training.reports.wandb import start_wandb

    provenance = {"recipe": {"wandb": {"enable": True, "project": "p", "name": None}}}
    run = start_wandb(TrainState(run_name="train_x"), provenance, pathlib.Path(sys.argv[1]), print, [])
    cores = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in " ".join(p.cmdline())]
    for process in cores:
        process.kill()
        process.wait()
    for step in range(1, 200):
        run.log_step({"step/loss": 1.0}, step)
    run.finish(0)
    print(len(cores), "killed, and the run goes on")
""")


@pytest.mark.slow
def test_a_wandb_that_dies_ends_no_run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # one of its own
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", SURVIVOR, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("W&B records no more of this run") == 1, done
    assert done.stdout.endswith("1 killed, and the run goes on\n")
