"""Whether this machine has what reading, writing and training need: a line a check, and the command that mends it.

    make doctor                            # or: python -m imagenet_training.doctor, ffcv-doctor
    python -m imagenet_training.doctor --data /data/train.beton /data/val.beton --num_workers 16
    python -m imagenet_training.doctor --json

Writes nothing but a temporary folder. Exit status: 0 all in order, or only warnings; 1 an error; 2 a wrong option;
130 Ctrl-C.

The checks are in `imagenet_training.doctor_checks`; other packages add theirs as entry points.
Each runs in a process of its own, because a library that is broken may crash or hang, and one that is missing must not
keep the others from being looked at. For the same reason only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from imagenet_training import doctor_checks as checks

ENTRY_POINTS = "imagenet_training.doctor"
STATUSES = ("ok", "warning", "error")
_COLORS = {"ok": "32", "warning": "33", "error": "31"}
_NAME_WIDTH = 13
_TIME_LIMIT_S = 300
_AT_ONCE = 4


class Finding(NamedTuple):
    """One line: ``status`` of `STATUSES`, the ``name`` of what was looked at, what was found, what to do about it."""

    status: str
    name: str
    text: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    findings = []
    try:
        for finding in examine(options):
            findings.append(finding)
            if not options.json:
                print(_line(finding), flush=True)
    except KeyboardInterrupt:
        return 130
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    if options.json:
        worst = max((finding.status for finding in findings), key=STATUSES.index)
        print(json.dumps({"status": worst, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        print(", ".join(f"{count} {status}{'s' * (status != 'ok' and count != 1)}" for status, count in counts.items()))
    return 1 if counts["error"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("imagenet_training.doctor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f".beton files, or folders of them; by default {' and '.join(checks.DATA)}",
    )
    parser.add_argument(
        "--num_workers", type=int, default=-1, metavar="N", help="threads that will load; by default all CPUs allowed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser.parse_args(argv)


def examine(options: argparse.Namespace) -> Iterator[Finding]:
    """Run all checks, each in a process of its own, and yield what they find, in the order of `checks.CHECKS`."""
    python = list(_ask(_target(checks.check_python), options))
    yield from python
    if python[0].status == "error":
        return
    others = [_target(check) for check in checks.CHECKS[1:]]
    others += [point.value for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for findings in threads.map(lambda target: list(_ask(target, options)), others):
            yield from findings
    # Alone, since it takes the time of CPUs and disk.
    yield from _ask(_target(checks.check_data), options)


def _target(check: Callable[..., object]) -> str:
    """A check as ``module:function``, which is how entry points name theirs."""
    return f"{check.__module__}:{check.__name__}"


def _name(target: str) -> str:
    return target.rpartition(":")[2].replace("check_", "")


def _ask(target: str, options: argparse.Namespace) -> Iterator[Finding]:
    """Run one check in a process of its own; its silence is a finding too."""
    here = str(Path(__file__).resolve().parents[1])
    path = [folder for folder in (os.environ.get("PYTHONPATH"), here) if folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    request = json.dumps({"target": target, "data": options.data, "num_workers": options.num_workers})
    command = [sys.executable, "-c", "from imagenet_training.doctor import answer; answer()", request]
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=_TIME_LIMIT_S, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        yield Finding("error", _name(target), f"no answer after {_TIME_LIMIT_S} s: it hangs")
        return
    try:
        yield from (Finding(*found) for found in json.loads(done.stdout))
    except ValueError:
        text = f"the check {_ending(done.returncode)}{_last_line(done.stderr)}"
        yield Finding("error", _name(target), text, checks.crash_remedy())


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else "could not be run"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def answer() -> None:
    """Run the check that the command line names, and print its findings as JSON: what `_ask` starts."""
    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of the answer
    request = json.loads(sys.argv[1])
    target = request.pop("target")
    module, _, function = target.partition(":")
    check = getattr(importlib.import_module(module), function)
    findings = []
    try:
        for found in check(argparse.Namespace(**request)):
            findings.append(found)
    except Exception as error:
        remedy = checks.install_command() if isinstance(error, ImportError) else ""
        findings.append(("error", _name(target), f"{type(error).__name__}: {error}".splitlines()[0], remedy))
    with open(stdout, "w", encoding="utf-8") as file:
        json.dump(findings, file)


def _line(finding: Finding) -> str:
    """A finding as it is printed: aligned, with colour on a terminal, its remedy below."""
    status = f"{finding.status:7}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        status = f"\x1b[{_COLORS[finding.status]}m{status}\x1b[0m"
    line = f"{status}  {finding.name:{_NAME_WIDTH}} {finding.text}"
    return f"{line}\n{'':{_NAME_WIDTH + 10}}-> {finding.remedy}" if finding.remedy else line


if __name__ == "__main__":
    sys.exit(main())
