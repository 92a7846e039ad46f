"""The log of a run: on a terminal, in a pipe, and beside the expected accuracies."""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import pytest
from terminals import run_on_terminal, screen

from imagenet_training.logs import RunLog, draw_curve, pace
from imagenet_training.meters import EtaEstimator
from imagenet_training.state import TrainState

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
    assert pace({"train/acc1": 0.40, "val/acc1": 0.312}, EXPECTED, num_epochs) == expected


def test_pace_speaks_only_of_what_was_measured():
    assert pace({"train/acc1": 0.40}, EXPECTED, 10) == "expected train top-1 35.0 % (+5.0)"
    assert pace({"train/acc1": 0.40}, {}, 10) == ""


def test_the_curve_draws_what_is_expected(tmp_path):
    record = {"train/loss": 2.0, "val/loss": 2.0, "train/acc1": 0.2, "val/acc1": 0.25}
    records = [{**record, "epoch": epoch} for epoch in range(3)]
    for name, expected_accuracy in (("without", {}), ("with", EXPECTED)):
        draw_curve(records, tmp_path / f"{name}.png", expected_accuracy)
    without, expected = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("without", "with"))
    assert without.shape == expected.shape and (without != expected).any()


def test_a_full_disk_leaves_the_record_of_every_epoch_whole(tmp_path):
    log = RunLog(tmp_path, is_main=True, eta=EtaEstimator([8, 8], steps_per_epoch=1))
    log.open(TrainState(run_name="run"), {"recipe": {"wandb": {"enable": False}}})
    values = {"train/loss": 2.0, "train/acc1": 0.5, "step_s": 1.0, "images_per_s": 8.0, "data_wait": 0.0}
    log.epoch(TrainState(epoch=1, step=1), values)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "run.jsonl").stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            log.epoch(TrainState(epoch=2, step=2), values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record["epoch"] for record in log.records()] == [0]
    assert {path.name for path in tmp_path.iterdir()} == {"run.log", "run.jsonl", "run.recipe.json"}
    log.close()


SPEAKER = textwrap.dedent("""
    import pathlib, sys
    from imagenet_training.logs import RunLog
    from imagenet_training.state import TrainState

    log = RunLog(pathlib.Path(sys.argv[1]), is_main=True)
    log.print("before")
    log.open(TrainState(run_name="run"), {"recipe": {"wandb": {"enable": False}}})
    for number in log.track(range(40), "epoch 0", total=41, done=1):
        if number % 10 == 9:
            log._progress(f"step {number + 1}", "loss 0.5, figures that a narrow terminal has no room for")
            if number == 9:
                log.print("expected")
    log.print("after")
    log.close()
""")
LINES = ["before", "step 10", "expected", "step 20", "step 30", "step 40", "after"]


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
    assert [line for line in screen(written) if line] == ["before", "expected", "after"]
    bars = [part for part in written.replace("\n", "\r").split("\r") if part.startswith("epoch 0")]
    assert " 1/41" in bars[0] and len(bars) > 4
    assert max(map(len, bars)) <= columns and "\x1b[3" not in written, "no colours"
    assert any("loss 0.5" in bar for bar in bars) == (columns == 100)
