"""Draw runs together: their curves, their figures, and what their recipes differ in.

    python -m training.compare RUN RUN ... [--out compare.html]

A RUN is a run's folder or its record, logs/train_<time>.jsonl. Of a folder that holds several records the newest is
taken, and said. Prints the table of figures and leaves the page; nothing is trained, and no network is used.

Exit status: 0 done, 2 something to put right first.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_ops.files import replace_text
from ffcv_ops.units import show_duration
from imagenet_training import page
from imagenet_training.report import OVER_THE_EPOCHS, draw_charts, environment_rows, median_epoch_s

FIGURES = ("run", "epochs", "best top-1", "top-5 there", "epoch", "last top-1", "images/s", "data wait", "an epoch")


@dataclass(frozen=True)
class Run:
    """A run as read from disk: its name here, its records, and its facts, {} where they are missing."""

    name: str
    path: Path
    records: list[dict[str, Any]]
    facts: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="+", help="a run's folder or its .jsonl")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page to write (compare.html)")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.out.absolute().parent.is_dir():
            raise ValueError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
        runs = read_runs(arguments.run)
        replace_text(arguments.out, compare(runs))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text_table([FIGURES, *map(figures, runs)]))
    print(f"compared in {arguments.out}")
    return 0


def read_runs(given: Sequence[str]) -> list[Run]:
    """Read runs and name them: by what was given, told apart where two were given alike.

    Raises
    ------
    ValueError
        Naming a run that is not there, has no record, or whose record cannot be read.
    """
    paths = [find_record(Path(text)) for text in given]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice} was given twice: name different runs")
    labels = [Path(text).absolute().name.removesuffix(".jsonl") for text in given]
    if len(set(labels)) < len(labels):
        labels = list(given)
    return [
        Run(name, path, read_records(path), read_facts(path.with_suffix(".recipe.json")))
        for name, path in zip(labels, paths, strict=True)
    ]


def find_record(path: Path) -> Path:
    """The record of a run, given it or the run's folder."""
    if path.is_file():
        return path.resolve()
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; name a run's folder or its logs/train_<time>.jsonl")
    found = sorted([*path.glob("train_*.jsonl"), *path.glob("logs/train_*.jsonl")], key=lambda one: one.name)
    if not found:
        raise ValueError(f"{path}: holds no run: there is no logs/train_<time>.jsonl in it")
    if len(found) > 1:
        print(f"note: {path} holds {len(found)} runs; this is the newest, {found[-1]}", file=sys.stderr)
    return found[-1].resolve()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's epochs."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["epoch"], int):
                raise ValueError("its epoch is not a number")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of an epoch ({error})") from None
        records.append(record)
    if not records:
        raise ValueError(f"{path}: the run has not finished an epoch yet")
    return records


def read_facts(path: Path) -> dict[str, Any]:
    """What a run was made with; {} where that was not kept."""
    if not path.is_file():
        print(f"note: {path} is not there, so this run's recipe is not compared", file=sys.stderr)
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        _settings(facts)
        dict(environment_rows(facts))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as a run's recipe ({error})") from None
    return facts


def compare(runs: Sequence[Run]) -> str:
    """The page on several runs."""
    known = [run for run in runs if run.facts]
    settings = differing({run.name: _settings(run.facts) for run in known})
    surroundings = differing({run.name: dict(environment_rows(run.facts)) for run in known})
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"the run {runs[0].name}"
    header = ("", *(run.name for run in known))
    parts = [
        page.heading(title, level=1),
        page.table(FIGURES, map(figures, runs), numbers=range(1, len(FIGURES))),
        *OVER_THE_EPOCHS,
        page.charts(draw_charts({run.name: run.records for run in runs}, {})),
        page.heading("What their recipes differ in"),
        page.table(header, settings) if settings else page.paragraph("Nothing."),
        page.heading("What their environments differ in"),
        page.table(header, surroundings) if surroundings else page.paragraph("Nothing."),
        page.heading("Records"),
        page.table(("run", "record"), ((run.name, run.path) for run in runs)),
    ]
    return page.page(title, parts)


def figures(run: Run) -> tuple[str, ...]:
    """A run in numbers, under the heads of `FIGURES`."""
    evaluated = [record for record in run.records if "val/acc1" in record]
    best = max(evaluated, key=lambda record: record["val/acc1"], default={})
    last = evaluated[-1] if evaluated else {}
    rates = [record["images_per_s"] for record in run.records if "images_per_s" in record]
    waits = [record["data_wait"] for record in run.records if "data_wait" in record]
    epoch_s = median_epoch_s(run.records)
    return (
        run.name,
        str(run.records[-1]["epoch"] + 1),
        _percent(best.get("val/acc1")),
        _percent(best.get("val/acc5")),
        str(best.get("epoch", "-")),
        _percent(last.get("val/acc1")),
        f"{statistics.median(rates):,.0f}" if rates else "-",
        _percent(statistics.median(waits) if waits else None),
        "-" if epoch_s is None else show_duration(epoch_s),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else page.percent(value)


def _settings(facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": "none" if value is None else str(value)
        for section, values in facts["recipe"].items()
        for key, value in values.items()
    }


def differing(columns: Mapping[str, Mapping[str, str]]) -> list[tuple[str, ...]]:
    """The rows in which columns differ, each row its key and the value of each column, "-" where it has none."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = ((key, *(column.get(key, "-") for column in columns.values())) for key in keys)
    return [row for row in rows if len(set(row[1:])) > 1]


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned text, the first column to the left and the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if number == 0 else f"{cell:>{width}}" for number, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
