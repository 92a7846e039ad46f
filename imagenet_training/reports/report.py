"""The report of a run: one HTML page from its records, its provenance, and its predictions for the validation split."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagenet_training.reports.charts import draw_charts
from imagenet_training.reports.metrics import ExpectedAccuracy, Records, best_record, finite_values
from imagenet_training.reports.page import write_page
from imagenet_training.reports.predictions import Predictions

NUM_CLASSES_SHOWN = 20
NUM_MISTAKES_SHOWN = 24


def write_report(
    path: Path,
    *,
    name: str,
    records: Records,
    provenance: Mapping[str, Any],
    expected_accuracy: ExpectedAccuracy,
    files: Mapping[str, str] | None = None,
    predictions: Predictions | None = None,
    names: Sequence[str] = (),
    mistakes: np.ndarray | None = None,
) -> None:
    """Write a run's report. An earlier report is replaced whole.

    Parameters
    ----------
    records : sequence of dict
        The records of the run's epochs. Empty for an evaluation without training.
    provenance : dict
        The provenance stored with the run.
    files : dict of str to str, optional
        The paths of the run's files by description.
    names : sequence of str
        Names of the classes.
    mistakes : ndarray of uint8, shape (M, H, W, 3), optional
        The images of ``predictions.mistakes(M)``, in RGB.
    """
    history: Mapping[str, Sequence[tuple[Any, str]]] = provenance.get("recipe_history", {})
    base = next(iter(provenance.get("recipe_files", {})), None)
    images = () if mistakes is None or predictions is None else mistakes
    write_page(
        path,
        "report",
        title=f"{provenance['recipe']['model']['arch']}, {name}",
        records=records,
        recipe=provenance["recipe"],
        figures=key_figures(records),
        charts=draw_charts({"": records}, expected_accuracy),
        predictions=predictions,
        mistakes=list(zip(images, predictions.mistakes(len(images)), strict=True)) if predictions else [],
        worst_classes=predictions.worst_classes(NUM_CLASSES_SHOWN) if predictions else [],
        best_classes=predictions.best_classes(NUM_CLASSES_SHOWN) if predictions else [],
        class_name=lambda label: names[label] if label < len(names) else f"class {label}",
        base=base,
        changes=list(_changes(history, base)),
        set_by={key: given[-1][1] for key, given in history.items()},
        recipe_files=provenance.get("recipe_files", {}),
        files=files,
        environment=environment(provenance),
    )


def key_figures(records: Records) -> dict[str, Any]:
    """Return the most important numbers of a run, each None if the run does not have it.

    ``best`` and ``last`` are the records of these epochs among the evaluated ones. The other figures are medians.
    """
    times = finite_values(records, "time")
    medians = {
        "images_per_s": finite_values(records, "images_per_s"),
        "data_wait": finite_values(records, "data_wait"),
        "data_wait_storage": finite_values(records, "data_wait_storage"),
        "epoch_s": [b - a for a, b in zip(times, times[1:], strict=False)],
    }
    return {
        "best": best_record(records),
        "last": next((record for record in reversed(records) if finite_values([record], "val/acc1")), None),
        **{name: statistics.median(values) if values else None for name, values in medians.items()},
    }


def environment(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run was computed on and with, as text by name."""
    rows = {"processes": provenance["world_size"], "device": provenance.get("device", "-")}
    rows |= {"commit": provenance.get("commit") or "not a git checkout", "seed": provenance["seed"]}
    rows |= {"global batch": provenance.get("global_batch_size", "-"), **provenance["versions"]}
    for split, data in provenance["data"].items():
        rows[f"{split} data"] = f"{data['path']}, {data['num_samples']:,} images"
        rows[f"{split} digest"] = data["digest"] or "no manifest"
    return {name: str(value) for name, value in rows.items()}


def _changes(history: Mapping[str, Sequence[tuple[Any, str]]], base: str | None) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield the settings that differ from the base. The base is a recipe file, or else the defaults."""
    for key, given in history.items():
        before = [value for value, source in given if source in ("default", base)][-1]
        value, source = given[-1]
        if value != before:
            yield key, before, value, source
