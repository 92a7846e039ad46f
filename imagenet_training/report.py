"""The report of a run: one HTML page from its records, its facts, and its predictions for the validation split."""

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.files import replace_text
from ffcv_ops.units import show_duration
from imagenet_training import page
from imagenet_training.logs import METRICS, Courses
from imagenet_training.page import Series
from imagenet_training.predictions import Predictions

NUM_CLASSES_SHOWN = 20
NUM_MISTAKES_SHOWN = 24
OVER_THE_EPOCHS = (
    page.heading("Over the epochs"),
    page.paragraph("By the number of epochs finished. A point tells its value when pointed at."),
)


def write_report(
    path: Path,
    *,
    name: str,
    records: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    courses: Courses,
    files: Mapping[str, str] | None = None,
    predictions: Predictions | None = None,
    names: Sequence[str] = (),
    mistakes: np.ndarray | None = None,
) -> None:
    """Write a run's report, replacing an earlier one whole.

    Parameters
    ----------
    path : Path
        Of the page.
    name : str
        Of the run.
    records : sequence of dict
        A line of the run's record each; none for an evaluation alone.
    facts : dict
        As stored with the run: ``recipe``, ``recipe_history``, ``versions``, ``data``, ...
    courses : dict
        Accuracies to compare with; see `training.logs.RunLog`.
    files : dict of str to str
        What lies where, such as the checkpoints.
    predictions : Predictions, optional
        For the validation split.
    names : sequence of str
        Of the classes.
    mistakes : ndarray of uint8, shape (M, H, W, 3), optional
        The images of ``predictions.mistakes(M)``.
    """
    recipe = facts["recipe"]
    title = f"{recipe['model']['arch']}, {name}"
    parts = [
        page.heading(title, level=1),
        page.paragraph(standing(records, recipe["training"]["epochs"]) if records else "an evaluation, no training"),
        page.tiles(key_figures(records, predictions)),
        *([*OVER_THE_EPOCHS, page.charts(draw_charts({"": records}, courses))] if records else []),
        *_mistake_parts(predictions, names, mistakes),
        *_class_parts(predictions, names),
        *_recipe_parts(facts),
        *([page.heading("Files"), page.table(("what", "where"), files.items())] if files else []),
        page.heading("Environment"),
        page.table(("", ""), environment_rows(facts)),
        f"<footer>written {time.strftime('%Y-%m-%d %H:%M:%S')}</footer>",
    ]
    replace_text(path, page.page(title, parts))


def standing(records: Sequence[Mapping[str, Any]], epochs: int) -> str:
    """How far a run is: ``5 of 16 epochs finished, the last at 2026-01-31 12:00``."""
    last = records[-1]
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(last["time"])) if "time" in last else "?"
    done = last["epoch"] + 1
    return f"{done} of {epochs} epochs finished, the last at {moment}" + (", the run is complete" * (done == epochs))


def key_figures(
    records: Sequence[Mapping[str, Any]], predictions: Predictions | None = None
) -> Iterable[tuple[str, str]]:
    """The numbers a reader looks for first, each with what it is."""
    evaluated = [record for record in records if "val/acc1" in record]
    if evaluated:
        best, last = max(evaluated, key=lambda record: record["val/acc1"]), evaluated[-1]
        yield page.percent(best["val/acc1"]), f"best top-1, epoch {best['epoch']}"
        yield page.percent(best["val/acc5"]), "top-5 there"
        yield page.percent(last["val/acc1"]), f"last top-1, epoch {last['epoch']}"
    elif predictions is not None:
        yield page.percent(np.mean(predictions.predicted == predictions.labels)), "top-1"
        yield f"{len(predictions.labels):,}", "images"
        yield f"{predictions.loss.mean():.4f}", "loss"
    if rates := [record["images_per_s"] for record in records if "images_per_s" in record]:
        yield f"{statistics.median(rates):,.0f}", "images/s in training, median"
    if waits := [record["data_wait"] for record in records if "data_wait" in record]:
        yield page.percent(statistics.median(waits), 1), "of the time waiting for data"
    if (epoch_s := median_epoch_s(records)) is not None:
        yield show_duration(epoch_s), "an epoch, median"


def median_epoch_s(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds from the end of one epoch to that of the next; None before there are two."""
    times = [record["time"] for record in records if "time" in record]
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False)) if len(times) > 1 else None


def draw_charts(runs: Mapping[str, Sequence[Mapping[str, Any]]], courses: Courses) -> Iterable[str]:
    """The charts of one run, or of several together: a colour for each run where there are several.

    Parameters
    ----------
    runs : dict of str to sequence of dict
        Records by the run's name, which stands before the names of its lines; "" leaves it out.
    courses : dict
        Expected accuracies, drawn as crosses.
    """
    for metric in ("loss", "acc1", "acc5"):
        lines = []
        for number, (name, records) in enumerate(runs.items()):
            for split, look in (("train", "dashed"), ("val", "solid")):
                color = number if len(runs) > 1 else int(split == "train")
                points = _points(records, f"{split}/{metric}")
                if len(runs) == 1 or split == "val" or metric == "loss":
                    lines.append(Series(f"{name} {split}".strip(), points, color, look))
        for number, split in enumerate(("val", "train")):
            if course := courses.get(f"{split}/{metric}"):
                points = [(epochs, percent / 100) for epochs, percent in course.items()]
                lines.append(Series(f"{split}, expected", points, 7 if len(runs) > 1 else number, "crosses"))
        title = "Loss" if metric == "loss" else METRICS[metric].capitalize()
        yield page.line_chart(title, lines, kind="number" if metric == "loss" else "percent")
    for title, key, kind in (
        ("Learning rate", "lr", "number"),
        ("Images per second, training", "images_per_s", "number"),
        ("Share of the time waiting for data", "data_wait", "percent"),
        ("Resolution (px)", "resolution", "number"),
    ):
        if key == "resolution" and len({record.get(key) for records in runs.values() for record in records}) < 2:
            continue
        lines = [Series(name or title, _points(r, key), number) for number, (name, r) in enumerate(runs.items())]
        yield page.line_chart(title, lines, kind=kind, from_zero=True)


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["epoch"] + 1, record[key]) for record in records if key in record]


def _mistake_parts(predictions: Predictions | None, names: Sequence[str], mistakes: np.ndarray | None) -> Iterable[str]:
    if predictions is None or mistakes is None or not len(mistakes):
        return
    ids = predictions.mistakes(len(mistakes))
    yield page.heading("Most wrong")
    yield page.paragraph(
        f"The validation images with the highest loss{_of_epoch(predictions)}, as the model gets them: what it took "
        "them for, and how sure it was."
    )
    yield page.image_sheet(
        (
            image,
            f"{_name(names, int(predictions.predicted[sample]))} {page.percent(predictions.confidence[sample], 0)}",
            f"is {_name(names, int(predictions.labels[sample]))}; loss {predictions.loss[sample]:.2f}, sample {sample}",
        )
        for image, sample in zip(mistakes, ids.tolist(), strict=True)
    )


def _class_parts(predictions: Predictions | None, names: Sequence[str]) -> Iterable[str]:
    if predictions is None:
        return
    yield page.heading("Worst classes")
    rows = [
        (
            _name(names, result.label),
            page.percent(result.accuracy, 1),
            f"{result.num_images:,}",
            _name(names, result.confused_with),
            f"{result.num_confused:,}",
        )
        for result in predictions.worst_classes(NUM_CLASSES_SHOWN)
    ]
    if not rows:
        yield page.paragraph("No validation image was taken for another class.")
        return
    yield page.paragraph(f"Top-1 of the classes{_of_epoch(predictions)}, the lowest first.")
    yield page.table(("class", "top-1", "images", "most often taken for", "times"), rows, numbers=(1, 2, 4))


def _of_epoch(predictions: Predictions) -> str:
    return f" after epoch {predictions.epoch}" if predictions.epoch >= 0 else ""


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _recipe_parts(facts: Mapping[str, Any]) -> Iterable[str]:
    history: Mapping[str, Sequence[Sequence[Any]]] = facts.get("recipe_history", {})
    files = list(facts.get("recipe_files", {}))
    yield page.heading("Recipe")
    base = files[0] if files else None
    yield page.paragraph(f"From {base}." if base else "No recipe file: the defaults.")
    if changes := list(_changes(history, base)):
        yield page.table(("key", f"in {base}" if base else "default", "in this run", "set by"), changes)
    elif base:
        yield page.paragraph("Nothing differs from it.")
    rows = [
        (f"{section}.{key}", _text(value), history.get(f"{section}.{key}", [(None, "default")])[-1][1])
        for section, values in facts["recipe"].items()
        for key, value in values.items()
    ]
    yield page.details("Every setting and where it came from", page.table(("key", "value", "from"), rows))
    for path, text in facts.get("recipe_files", {}).items():
        yield page.details(path, page.preformatted(text))


def _changes(history: Mapping[str, Sequence[Sequence[Any]]], base: str | None) -> Iterable[Sequence[str]]:
    """The settings whose value is not that of the base, a recipe file or the defaults."""
    for key, given in history.items():
        before = [value for value, source in given if source in ("default", base)][-1]
        value, source = given[-1]
        if value != before:
            yield key, _text(before), _text(value), source


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def environment_rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What a run ran on and with."""
    yield "processes", str(facts["world_size"])
    if "device" in facts:
        yield "device", facts["device"]
    yield "commit", facts["commit"] or "not a git checkout"
    yield "seed", str(facts["seed"])
    yield "global batch", str(facts["global_batch_size"])
    yield from facts["versions"].items()
    for split, data in facts["data"].items():
        yield f"{split} data", f"{data['path']}, {data['num_samples']:,} images"
        yield f"{split} digest", data["digest"] or "no manifest"
