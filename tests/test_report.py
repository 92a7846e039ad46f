"""The report of a run and the comparison of several: their content, their refusals, and names that stay text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from betons import photographs
from browsers import PageReader, needs_chromium, screenshot

from imagenet_training.compare import main, read_runs
from imagenet_training.reports.charts import MAX_DOTS, SVG, Chart, Line, draw_charts, draw_svg
from imagenet_training.reports.predictions import ClassResult, Predictions
from imagenet_training.reports.report import write_report

HOSTILE = '</title><script>document.title="x"</script><img src=x onerror=alert(1)>"\'&'
PROVENANCE = {
    "recipe": {"model": {"arch": "resnet18"}, "lr": {"base_lr": 0.5}, "training": {"epochs": 4, "loss": HOSTILE}},
    "recipe_history": {
        "lr.base_lr": [[1.0, "default"], [0.25, "base.yaml"], [0.5, "more.yaml"]],
        "training.epochs": [[30, "default"], [4, "base.yaml"], [8, "more.yaml"], [4, "command line"]],
        "training.loss": [["cross_entropy", "default"], [HOSTILE, "command line"]],
    },
    "recipe_files": {"base.yaml": "lr: {base_lr: 0.25}\n# <b>", "more.yaml": ""},
    "seed": 3,
    "world_size": 8,
    "global_batch_size": 1024,
    "commit": None,
    "device": "NVIDIA H100",
    "versions": {"torch": "2.9.1"},
    "data": {"val": {"path": HOSTILE, "num_samples": 6, "digest": None}},
}
PREDICTIONS = Predictions(
    epoch=1,
    labels=np.array([0, 0, 1, 1, 2, 2]),
    predicted=np.array([0, 1, 2, 2, 2, 2]),
    loss=np.array([0.1, 3.0, 1.0, np.nan, 0.2, 0.1], np.float32),
    confidence=np.array([0.9, 0.8, 0.6, 0.5, 0.9, 0.9], np.float32),
)


def records(count, top=0.7):
    return [
        {
            **{"epoch": epoch, "lr": 0.1, "images_per_s": 1000.0, "data_wait": 0.01, "step": 10 * (epoch + 1)},
            **{
                "train/loss": 3.0 - epoch,
                "train/acc1": 0.1 * epoch,
                "train/acc5": 0.2 * epoch,
                "time": 1e9 + 60 * epoch,
            },
            **{"val/loss": 2.5, "val/acc1": top - 0.1 * abs(epoch - 1), "val/acc5": 0.9, "resolution": 160},
        }
        for epoch in range(count)
    ]


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.html"
    write_report(
        path,
        name=HOSTILE,
        records=records(3),
        provenance=PROVENANCE,
        expected_accuracy={"val/acc1": {2: 71.0}},
        files={"best": HOSTILE},
        predictions=PREDICTIONS,
        names=[HOSTILE, "hen", "café"],
        mistakes=np.stack(photographs(3)),
    )
    return path


def test_a_report_tells_what_was_given_and_leaves_nothing_else(report):
    text = PageReader(report).text
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]
    assert "3 of 4 epochs finished" in text and "complete" not in text
    assert "70.00 % best top-1, epoch 1 90.00 % top-5 in that epoch 60.00 % last top-1, epoch 2" in text
    assert "00:01:00 time of an epoch" in text
    assert "val, expected, epoch 2: 71.00 %" in text
    assert "hen 0.0 % 2 café 2" in text, "a class, what it was taken for"
    assert "lr.base_lr 0.25 0.5 more.yaml" in text and "training.loss cross_entropy" in text
    assert "training.epochs 4 8" not in text, "back at what the base says"
    assert "not a git checkout" in text and "no manifest" in text and "NVIDIA H100" in text


def test_names_stay_text(report):
    text = PageReader(report).text  # asserts that there is no script and no handler
    assert text.count(" ".join(HOSTILE.split())) >= 6


@needs_chromium
def test_a_report_with_hostile_names_opens_without_a_complaint(report, tmp_path):
    screenshot(report, tmp_path)


def test_most_wrong_first(report):
    assert PREDICTIONS.mistakes(2).tolist() == [3, 1] and PREDICTIONS.mistakes(9).tolist() == [3, 1, 2]
    assert PREDICTIONS.worst_classes(1) == [ClassResult(1, 2, 0.0, 2, 2)]
    assert [result.label for result in PREDICTIONS.worst_classes(9)] == [1, 0], "a class without a mistake is left out"
    assert [result.label for result in PREDICTIONS.best_classes(9)] == [2], "a class is listed once"
    assert PREDICTIONS.best_classes(1) == [ClassResult(2, 2, 1.0, 2, 0)]
    assert PREDICTIONS.mean_class_accuracy() == 0.5
    assert "Best classes The classes" in PageReader(report).text and "café 100.0 % 2 - 0" in PageReader(report).text
    assert "hen 80 % is </title>" in PageReader(report).text


def test_predictions_come_back_as_they_were(tmp_path):
    path = tmp_path / "run.predictions.npz"
    PREDICTIONS.save(path)
    read = Predictions.read(path)
    assert read.epoch == 1 and [file.name for file in tmp_path.iterdir()] == [path.name]
    for name in ("labels", "predicted", "loss", "confidence"):
        np.testing.assert_array_equal(getattr(read, name), getattr(PREDICTIONS, name))


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.0, 0.0], [1e-9, 3e-9], [-5e6, 5e6], [float("nan"), 1.0], [1.0, float("inf"), 2.0], [-3e38, 3e38]],
)
@pytest.mark.parametrize("is_share", [False, True])
@pytest.mark.parametrize("style", ["solid", "crosses"])
def test_a_chart_shows_every_finite_value(values, is_share, style):
    points = list(enumerate(values, start=1))
    chart = Chart("chart", [Line("none", [(1, float("nan"))]), Line("$a_b$ <&", points, 9, style)], is_share, True)
    text = draw_svg(chart)
    tips = [title.text for title in ElementTree.fromstring(text).iter(f"{SVG}title")]
    finite = [(epoch, value) for epoch, value in points if np.isfinite(value)]
    assert tips == [f"$a_b$ <&, epoch {epoch}: {chart.show(value)}" for epoch, value in finite]
    assert "nan" not in text and "inf" not in text
    assert text == draw_svg(chart), "the same chart gives the same text"
    assert "var(--c1)" in text and "#d9541e" not in text, "the style sheet sets the colours"


def test_a_long_line_has_a_few_dots_and_the_last_one():
    points = [(epoch, 0.5) for epoch in range(1, 601)]
    titles = [
        title.text for title in ElementTree.fromstring(draw_svg(Chart("", [Line("a", points)]))).iter(f"{SVG}title")
    ]
    assert MAX_DOTS <= len(titles) <= MAX_DOTS + 1 and titles[-1] == "a, epoch 600: 0.5"


def test_a_chart_without_values_is_left_out():
    assert draw_charts({"": []}, {}) == draw_charts({"": [{"epoch": 0, "lr": float("inf")}]}, {}) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_report_is_written_without_an_epoch_and_without_numbers(tmp_path, count):
    known = ("epoch", "step", "time")
    broken = [{name: value if name in known else float("nan") for name, value in r.items()} for r in records(count)]
    perfect = Predictions(-1, *[np.zeros(2, int)] * 2, *[np.zeros(2, np.float32)] * 2)
    for name, given in (("broken", broken), ("whole", records(count))):
        path = tmp_path / f"{name}.html"
        write_report(path, name=name, records=given, provenance=PROVENANCE, expected_accuracy={}, predictions=perfect)
        text = PageReader(path).text
        assert ("An evaluation without training." in text) == (count == 0)
        assert ("100.00 % top-1 2 images 0.0000 loss" in text) == (given is broken or count == 0)
        assert "No validation image was taken for another class." in text


def test_nothing_is_imported_before_a_page_is_written():
    code = "import sys, imagenet_training.reports.report, imagenet_training.compare; "
    code += "print(sorted({'matplotlib', 'jinja2', 'torch', 'PIL'} & sys.modules.keys()))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).stdout == b"[]\n"


@pytest.fixture
def runs(tmp_path):
    """The folders of two runs, of three epochs and of two, with different base learning rates."""
    for name, count in (("first", 3), ("second", 2)):
        logs = tmp_path / name / "logs"
        logs.mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in records(count)]
        (logs / "train_2026-01-01_00-00-00.jsonl").write_text("".join(lines))
        provenance = {**PROVENANCE, "recipe": {**PROVENANCE["recipe"], "lr": {"base_lr": count}}, "seed": 3}
        (logs / "train_2026-01-01_00-00-00.recipe.json").write_text(json.dumps(provenance))
    return tmp_path / "first", tmp_path / "second"


def test_runs_are_compared(runs, tmp_path):
    out = tmp_path / "out.html"
    command = [sys.executable, "-m", "imagenet_training.compare", *runs, "--out", out]
    root = Path(__file__).parents[1]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    table = [line.split()[:3] for line in process.stdout.splitlines()]
    assert ["first", "3", "70.00"] in table and ["second", "2", "70.00"] in table
    text = PageReader(out).text
    assert "2 runs compared" in text and "lr.base_lr 3 2" in text and "training.epochs" not in text
    assert "first val, epoch 3: 60.00 %" in text and "second val, epoch 2: 70.00 %" in text


def test_a_name_that_is_no_text_is_compared_on_any_console(runs, tmp_path):
    strange = tmp_path / "caf\udce9 \u732b"
    runs[0].rename(strange)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "imagenet_training.compare", strange, runs[1]]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert process.returncode == 0 and process.stderr == b""
    assert b"caf\\udce9 \\u732b" in process.stdout
    assert "caf? \u732b val, epoch 3: 60.00 %" in PageReader(tmp_path / "compare.html").text


@needs_chromium
def test_a_comparison_opens_in_a_browser(runs, tmp_path):
    assert main([*map(str, runs), "--out", str(tmp_path / "out.html")]) == 0
    screenshot(tmp_path / "out.html", tmp_path)


def test_a_run_without_provenance_is_compared_without_it(runs, tmp_path, capsys):
    (record,) = runs[1].glob("logs/*.jsonl")
    record.with_suffix(".recipe.json").unlink()
    shutil.copy(record, record.with_name("train_2025-01-01_00-00-00.jsonl"))
    assert main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / "out.html")]) == 0
    notes = capsys.readouterr().err
    assert "holds 2 runs" in notes and "is not there, so this run's recipe is not compared" in notes
    assert main([str(record), str(runs[0] / "logs"), "--out", str(tmp_path / "out.html")]) == 0


def test_runs_that_are_called_alike_are_told_apart(runs, tmp_path):
    (record,) = runs[1].glob("logs/*.jsonl")
    copy = shutil.copy(record, tmp_path / "first.jsonl")
    assert [run.name for run in read_runs([str(runs[0]), str(copy)])] == [str(runs[0]), str(copy)]


def test_what_cannot_be_compared_is_named(runs, tmp_path, capsys):
    (record,) = runs[1].glob("logs/*.jsonl")
    (tmp_path / "empty").mkdir()
    cases = [
        (["none"], "none: no such file or folder"),
        (["empty"], "empty: holds no run"),
        (["first", "first"], "was given twice"),
        (["first", "--out", "nowhere/out.html"], "there is no folder nowhere"),
        (["first", "--out", "recipe.yaml"], "this file exists and is no HTML page"),
        (["first", "--out", "first/report.html"], "a training run writes this file"),
        (["first", "--out", str(tmp_path / "first" / "logs" / "new.html")], "a training run writes this file"),
    ]
    (tmp_path / "recipe.yaml").write_text("lr: {}")
    (tmp_path / "first" / "report.html").write_text("<!DOCTYPE html>")
    for arguments, message in cases:
        arguments = [str(tmp_path / name) if (tmp_path / name).exists() else name for name in arguments]
        assert main(arguments) == 2 and message in capsys.readouterr().err
    for text, message in (("", "has not finished an epoch"), ('{"epoch": 0}\n{"epo', "line 2: not a record")):
        record.write_text(text)
        assert main([str(runs[1])]) == 2 and message in capsys.readouterr().err
    provenance = runs[0] / "logs" / "train_2026-01-01_00-00-00.recipe.json"
    for text in ("{", "[]", '{"recipe": {"lr": 1}}', json.dumps({"recipe": PROVENANCE["recipe"]})):
        provenance.write_text(text)
        assert main([str(runs[0])]) == 2 and "cannot be read as a run's recipe" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))
