"""Compare runs on one page: their curves, their figures, and the differences of their recipes.

    python -m imagenet_training.compare RUN RUN ... [--out compare.html]

A RUN is a run's folder or its record, logs/train_<time>.jsonl. If a folder holds several records, the newest one is
compared, and a note is printed. The command prints a table of figures and writes the page. It needs no network.

Exit status: 0 if the page was written, 2 if the user has to put something right first.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_ops.console import protect_output
from ffcv_ops.errors import UserError
from ffcv_ops.files import SaveError
from ffcv_ops.units import show_duration
from imagenet_training.planning.outputs import check_own_output
from imagenet_training.reports.charts import draw_charts
from imagenet_training.reports.page import percent, show_setting, write_page
from imagenet_training.reports.report import environment, key_figures

HEADERS = ("run", "epochs", "best top-1", "top-5 there", "epoch", "last top-1", "images/s", "data wait", "epoch time")
PARTS_OF_PROVENANCE = dict.fromkeys(("recipe", "versions", "data"), dict) | dict.fromkeys(("world_size", "seed"), int)


@dataclass(frozen=True)
class StoredRun:
    """A run as read from disk: its name on the page, its records, and its provenance, which may be empty."""

    name: str
    path: Path
    records: list[dict[str, Any]]
    provenance: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    protect_output()
    parser = argparse.ArgumentParser(
        prog="python -m imagenet_training.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="+", help="a run's folder or its .jsonl")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page to write (compare.html)")
    arguments = parser.parse_args(argv)
    try:
        _check_out(arguments.out)
        runs = read_runs(arguments.run)
        write_comparison(arguments.out, runs)
    except (UserError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text_table([HEADERS, *map(figures, runs)]))
    print(f"comparison: {arguments.out}")
    return 0


def _check_out(path: Path) -> None:
    try:
        check_own_output(path, "HTML page")
    except UserError as error:
        raise UserError(f"--out {path}: {error}") from error


def read_runs(given: Sequence[str]) -> list[StoredRun]:
    """Read runs, given as folders or records. A run is named by the last part of its path, if that is unique.

    Raises
    ------
    UserError
        If a run is not there, has no record, or has a record that cannot be read.
    """
    paths = [find_record(Path(text)) for text in given]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice} was given twice: name different runs")
    names = [Path(text).absolute().name.removesuffix(".jsonl") for text in given]
    if len(set(names)) < len(names):
        names = list(given)
    return [
        StoredRun(name, path, read_records(path), read_provenance(path.with_suffix(".recipe.json")))
        for name, path in zip(names, paths, strict=True)
    ]


def find_record(path: Path) -> Path:
    """Return the path of a run's record, given that path or the run's folder."""
    if path.is_file():
        return path.resolve()
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; name a run's folder or its logs/train_<time>.jsonl")
    found = sorted([*path.glob("train_*.jsonl"), *path.glob("logs/train_*.jsonl")], key=lambda record: record.name)
    if not found:
        raise UserError(f"{path}: holds no run: there is no logs/train_<time>.jsonl in it")
    if len(found) > 1:
        print(f"note: {path} holds {len(found)} runs; this is the newest, {found[-1]}", file=sys.stderr)
    return found[-1].resolve()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run's epochs."""
    records = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not a record of an epoch ({error})") from None
        if not (isinstance(record, dict) and isinstance(record.get("epoch"), int)):
            raise UserError(f"{path}, line {number}: not a record of an epoch (it has no epoch)")
        records.append(record)
    if not records:
        raise UserError(f"{path}: the run has not finished an epoch yet")
    return records


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the provenance stored with a run. If its file is not there, print a note and return an empty dict."""
    if not path.is_file():
        print(f"note: {path} is not there, so this run's recipe is not compared", file=sys.stderr)
        return {}
    try:
        provenance = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: cannot be read as a run's recipe ({error})") from None
    for name, kind in PARTS_OF_PROVENANCE.items():
        if not isinstance(provenance, dict) or not isinstance(provenance.get(name), kind):
            raise UserError(f"{path}: cannot be read as a run's recipe (it has no {name})")
    return provenance


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def write_comparison(path: Path, runs: Sequence[StoredRun]) -> None:
    """Write the page that compares runs."""
    known = {run.name: run.provenance for run in runs if run.provenance}
    write_page(
        path,
        "compare",
        title=f"{len(runs)} runs compared" if len(runs) > 1 else f"the run {runs[0].name}",
        headers=HEADERS,
        figures=[figures(run) for run in runs],
        charts=draw_charts({run.name: run.records for run in runs}, {}),
        names=list(known),
        differences={
            "Differences of the recipes": differing(
                {name: _settings(provenance) for name, provenance in known.items()}
            ),
            "Differences of the environments": differing(
                {name: environment(provenance) for name, provenance in known.items()}
            ),
        },
        records=[(run.name, str(run.path)) for run in runs],
    )


def figures(run: StoredRun) -> tuple[str, ...]:
    """Return the figures of a run as text, in the order of `HEADERS`."""
    found = key_figures(run.records)
    best, last = found["best"] or {}, found["last"] or {}
    return (
        run.name,
        str(run.records[-1]["epoch"] + 1),
        percent(best.get("val/acc1")),
        percent(best.get("val/acc5")),
        str(best.get("epoch", "-")),
        percent(last.get("val/acc1")),
        "-" if found["images_per_s"] is None else f"{found['images_per_s']:,.0f}",
        percent(found["data_wait"]),
        "-" if found["epoch_s"] is None else show_duration(found["epoch_s"]),
    )


def _settings(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": show_setting(value)
        for section, values in provenance["recipe"].items()
        for key, value in values.items()
    }


def differing(columns: Mapping[str, Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return the rows in which columns differ: the key, and the value of each column, "-" if a column has none."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = ((key, *(column.get(key, "-") for column in columns.values())) for key in keys)
    return [row for row in rows if len(set(row[1:])) > 1]


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as aligned text, with the first column on the left and the numbers on the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
