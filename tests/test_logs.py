"""The log of a run: on a terminal, in a pipe, and beside the expected accuracies."""

import json
import os
import pty
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import pytest
from terminals import run_on_terminal, screen

from imagenet_training.reports.logs import RunLog, data_wait, data_wait_advice, draw_curve
from imagenet_training.reports.metrics import compare_with_expected
from imagenet_training.state import TrainState
from imagenet_training.training.meters import EtaEstimator

EXPECTED = {"train/acc1": {10: 35.0, 25: 55.0}, "val/acc1": {10: 30.0, 25: 60.0, 50: 65.0}}


@pytest.mark.parametrize(
    ("num_epochs", "expected"),
    [
        (1, "expected train top-1 35 % after 10 epochs, val top-1 30 % after 10 epochs"),
        (10, "expected train top-1 35.0 % (+5.0), val top-1 30.0 % (+1.2)"),
        (15, "expected train top-1 41.7 % (-1.7), val top-1 40.0 % (-8.8)"),
        (50, "expected val top-1 65.0 % (-33.8)"),
        (51, ""),
    ],
)
def test_pace_is_interpolated_between_stated_epochs(num_epochs, expected):
    assert compare_with_expected({"train/acc1": 0.40, "val/acc1": 0.312}, EXPECTED, num_epochs) == expected


def test_pace_speaks_only_of_what_was_measured():
    assert compare_with_expected({"train/acc1": 0.40}, EXPECTED, 10) == "expected train top-1 35.0 % (+5.0)"
    assert compare_with_expected({"train/acc1": 0.40}, {}, 10) == ""


def test_the_curve_draws_what_is_expected(tmp_path):
    record = {"train/loss": 2.0, "val/loss": 2.0, "train/acc1": 0.2, "val/acc1": 0.25}
    records = [{**record, "epoch": epoch} for epoch in range(3)]
    for name, expected_accuracy in (("without", {}), ("with", EXPECTED)):
        draw_curve(records, tmp_path / f"{name}.png", expected_accuracy)
    without, expected = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("without", "with"))
    assert without.shape == expected.shape and (without != expected).any()


def test_a_wait_for_data_names_its_causes():
    values = {"data_wait": 0.123, "data_wait_storage": 0.101}
    assert data_wait(values) == "data wait 12.3% (storage 10.1%, CPU 2.2%)"
    assert data_wait({"data_wait": 0.009, "data_wait_storage": 0.009}) == "data wait 0.9%"
    assert data_wait({"data_wait": 0.5}) == "data wait 50.0%", "a run that an earlier version began"
    assert data_wait_advice([values]).startswith("training waited 12% of its time for data, mostly for storage: a copy")
    assert "mostly for the CPU: more cores" in data_wait_advice([{"data_wait": 0.06, "data_wait_storage": 0.0}])
    quiet = {"data_wait": 0.04, "data_wait_storage": 0.0}
    assert data_wait_advice([quiet]) == data_wait_advice([]) == ""
    assert data_wait_advice([{"data_wait": 0.9, "data_wait_storage": 0.0}, quiet]) == ""


def test_a_full_disk_leaves_the_record_of_every_epoch_whole_and_the_run_goes_on(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True, eta=EtaEstimator([8, 8, 8], steps_per_epoch=1))
    log.open(TrainState(run_name="run"), {"recipe": {"wandb": {"enable": False}}})
    values = {"train/loss": 2.0, "train/acc1": 0.5, "step_s": 1.0, "images_per_s": 8.0, "data_wait": 0.0}
    log.epoch(TrainState(epoch=1, step=1), values)
    log.finish_writes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "run.jsonl").stat().st_size + 10, limits[1]))
    try:
        log.epoch(TrainState(epoch=2, step=2), values)
        log.print("a line" * 1000)
        log.finish_writes()
        assert [json.loads(line)["epoch"] for line in (tmp_path / "run.jsonl").read_text().splitlines()] == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.epoch(TrainState(epoch=3, step=3), values)
    log.finish_writes()
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run.jsonl").read_text().splitlines()] == [0, 1, 2]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [Path(note.split()[1]).name for note in notes] == ["run.jsonl", "run.log"]
    assert all("could not be written (File too large)" in note and "run goes on" in note for note in notes)
    assert {path.name for path in tmp_path.iterdir()} == {"run.log", "run.jsonl", "run.recipe.json"}
    log.close()


def test_the_records_of_a_run_go_with_it_into_another_folder(tmp_path, capsys):
    provenance = {"recipe": {"wandb": {"enable": False}}}
    values = {"train/loss": 2.0, "train/acc1": 0.5}
    old = RunLog(tmp_path / "old", is_main=True, eta=EtaEstimator([8] * 4, steps_per_epoch=1))
    old.open(TrainState(run_name="run"), provenance)
    for epoch in (1, 2, 3):
        old.epoch(TrainState(epoch=epoch, step=epoch), values)
    old.close()
    with open(tmp_path / "old" / "run.jsonl", "a", encoding="utf-8") as file:
        file.write('{"epoch": 4, "tr\n[]\n')
    before = (tmp_path / "old" / "run.jsonl").read_bytes()
    (tmp_path / "old" / "run.predictions.npz").write_bytes(b"predictions")
    new = RunLog(tmp_path / "new", is_main=True)
    new.open(TrainState(run_name="run", epoch=2, step=2), provenance, tmp_path / "old")
    new.close()
    assert [record["epoch"] for record in new.records()] == [0, 1]
    assert (tmp_path / "old" / "run.jsonl").read_bytes() == before
    assert (tmp_path / "new" / "run.predictions.npz").read_bytes() == b"predictions"
    out = capsys.readouterr().out
    assert f"note: the records of the resumed run were copied from {tmp_path / 'old'}\n" in out
    assert "note: 2 lines of" in out and "are no records of epochs, and were left out" in out


SPEAKER = textwrap.dedent("""
    import logging, pathlib, sys
    from imagenet_training.reports.logs import RunLog
    from imagenet_training.state import TrainState

    log = RunLog(pathlib.Path(sys.argv[1]), is_main=True)
    log.print("before")
    log.open(TrainState(run_name="run"), {"recipe": {"wandb": {"enable": False}}})
    for number in log.track(range(40), "epoch 0", total=41, done=1):
        if number % 10 == 9:
            log._progress(f"step {number + 1}", "loss 0.5, figures that a narrow terminal has no room for")
            if number == 9:
                log.print("expected")
            if number == 19:
                logging.getLogger("ffcv_ops").warning("compiling")
    log.print("after")
    log.close()
""")
LINES = ["before", "step 10", "expected", "step 20", "note: compiling", "step 30", "step 40", "after"]


@pytest.fixture
def speaker(tmp_path):
    """The options of a process that speaks through a `RunLog`, and the log file that it keeps."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": "utf-8"}
    return [sys.executable, "-c", SPEAKER, str(tmp_path)], environment, tmp_path / "run.log"


def test_piped_output_is_lines(speaker):
    command, environment, log = speaker
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines() == LINES and process.stderr == ""
    assert log.read_text().splitlines() == LINES


@pytest.mark.parametrize("columns", [100, 30])
def test_a_terminal_shows_a_bar_for_passing_lines_and_the_log_file_keeps_them(speaker, columns):
    command, environment, log = speaker
    status, written = run_on_terminal(command, columns=columns, env={**environment, "NO_COLOR": "1"})
    assert status == 0 and log.read_text().splitlines() == LINES
    assert [line for line in screen(written) if line] == ["before", "expected", "note: compiling", "after"]
    bars = [part for part in written.replace("\n", "\r").split("\r") if part.startswith("epoch 0")]
    assert " 1/41" in bars[0] and len(bars) > 4
    assert max(map(len, bars)) <= columns and "\x1b[3" not in written, "no colours"
    assert any("loss 0.5" in bar for bar in bars) == (columns == 100)


TALKER = textwrap.dedent("""
    import pathlib, sys
    from ffcv_ops.console import call_if_reader_is_gone, protect_output
    from imagenet_training.reports.logs import RunLog
    from imagenet_training.state import TrainState

    protect_output()
    log = RunLog(pathlib.Path(sys.argv[1]), is_main=True)
    call_if_reader_is_gone(lambda: log.keep("the reader is gone"))
    log.print("class caf\\udce9")
    log.open(TrainState(run_name="run"), {"recipe": {"wandb": {"enable": False}}})
    print("a library warns", file=sys.stderr)
    log.print("\\u2713 done")
    log.close()
""")


@pytest.mark.parametrize(
    ("output", "reader"),
    [
        pytest.param(lambda: os.open("/dev/full", os.O_WRONLY), "", id="full disk"),
        pytest.param(lambda: closed_pipe(), "the reader is gone\n", id="reader is gone"),
        pytest.param(lambda: closed_terminal(), "", id="terminal is closed"),
        pytest.param(None, "", id="closed by the shell"),
        pytest.param("ascii", "", id="ascii"),
    ],
)
def test_no_output_ends_a_run_and_the_log_file_has_it_all(tmp_path, output, reader):
    command = [sys.executable, "-c", TALKER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    written = b""
    if output is None:
        status = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=environment).returncode
    elif output == "ascii":
        environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environment, capture_output=True)
        status, written = done.returncode, done.stdout
        assert written == b"class caf\\udce9\n\\u2713 done\n" and done.stderr == b"a library warns\n"
    else:
        descriptor = output()
        status = subprocess.run(command, env=environment, stdout=descriptor, stderr=descriptor).returncode
        os.close(descriptor)
    assert status == 0
    lines = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert lines.replace(reader, "", 1) == "class caf\\udce9\n\u2713 done\n" and reader in lines


def closed_pipe():
    """The end of a pipe to write to, whose reader is gone."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def closed_terminal():
    """The program's side of a terminal that is closed."""
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs
