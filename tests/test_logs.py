"""Where a run stands against the expected accuracies, in words and in the curve."""

import cv2
import pytest

from training.logs import draw_curve, pace

COURSES = {"train/acc1": {10: 35.0, 25: 55.0}, "val/acc1": {10: 30.0, 25: 60.0, 50: 65.0}}


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
    assert pace({"train/acc1": 0.40, "val/acc1": 0.312}, COURSES, num_epochs) == expected


def test_pace_speaks_only_of_what_was_measured():
    assert pace({"train/acc1": 0.40}, COURSES, 10) == "expected train top-1 35.0 % (+5.0)"
    assert pace({"train/acc1": 0.40}, {}, 10) == ""


def test_the_curve_draws_what_is_expected(tmp_path):
    record = {"train/loss": 2.0, "val/loss": 2.0, "train/acc1": 0.2, "val/acc1": 0.25}
    records = [{**record, "epoch": epoch} for epoch in range(3)]
    for name, courses in (("without", {}), ("with", COURSES)):
        draw_curve(records, tmp_path / f"{name}.png", courses)
    without, expected = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("without", "with"))
    assert without.shape == expected.shape and (without != expected).any()
