"""Check that this machine has what reading, writing and training need, and print what fixes each fault.

    make doctor                            # or: python -m imagenet_training.doctor, ffcv-doctor
    python -m imagenet_training.doctor --data /data/train.beton /data/val.beton --num_workers 16
    python -m imagenet_training.doctor --json

Exit status: 0 without an error, 1 with an error, 2 for a wrong option, 130 for Ctrl-C.

The checks are in `imagenet_training.doctor_checks`. Each check runs in a process of its own, because a broken library
may crash or hang. Only the standard library is imported here, because the doctor also runs before the setup.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ffcv_ops.console import protect_output
from ffcv_ops.machine import allowed_cpus
from imagenet_training.doctor_checks import CHECKS, DATA, Finding, one_line, setup_command

STATUSES = ("ok", "warning", "error")
_COLORS = {"ok": "32", "warning": "33", "error": "31"}
_NAME_WIDTH = 13
_TIME_LIMIT_S = 300
_NUM_AT_ONCE = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks, print their findings, and return the exit status."""
    protect_output()
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
    data_help = f".beton files, or folders of them; by default {' and '.join(DATA)}"
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help=data_help)
    workers_help = "threads that will load; by default all CPUs allowed"
    parser.add_argument("--num_workers", type=int, default=-1, metavar="N", help=workers_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(argv)
    if options.num_workers < 1:
        options.num_workers = allowed_cpus()
    return options


def examine(options: argparse.Namespace) -> Iterator[Finding]:
    """Run all checks and yield their findings in the order of `CHECKS`."""
    first, *others, last = CHECKS
    python = run_check(first, options)
    yield from python
    if python[0].status == "error":
        return
    with ThreadPoolExecutor(_NUM_AT_ONCE) as threads:
        for findings in threads.map(lambda name: run_check(name, options), others):
            yield from findings
    # The check of the data runs after all others, because it measures the CPUs and the disk.
    yield from run_check(last, options)


def run_check(name: str, options: argparse.Namespace) -> list[Finding]:
    """Run one check of `CHECKS` in a process of its own. If the process does not answer, return that as the finding."""
    root = str(Path(__file__).resolve().parents[1])
    path = [folder for folder in (os.environ.get("PYTHONPATH"), root) if folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    code = "from imagenet_training.doctor import answer; answer()"
    command = [sys.executable, "-c", code, name, json.dumps(vars(options))]
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=_TIME_LIMIT_S, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return [Finding("error", f"no answer after {_TIME_LIMIT_S} s", name=name)]
    if done.returncode == 0 and done.stdout:
        return [Finding(*found) for found in json.loads(done.stdout)]
    status = done.returncode
    ending = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    text = ": ".join([f"the check {ending}", *done.stderr.strip().splitlines()[-1:]])
    return [Finding("error", text, setup_command(), name)]


def answer() -> None:
    """Run the check that the command line names, and print its findings as JSON. `run_check` starts this."""
    stdout = os.dup(1)
    os.dup2(2, 1)  # libraries may print: their output is no part of the answer
    name, options = sys.argv[1:]
    findings = []
    try:
        for finding in CHECKS[name](argparse.Namespace(**json.loads(options))):
            findings.append(finding if finding.name else finding._replace(name=name))
    except Exception as error:
        remedy = setup_command(is_missing=isinstance(error, ModuleNotFoundError))
        findings.append(Finding("error", one_line(error), remedy, name))
    with open(stdout, "w", encoding="utf-8") as file:
        json.dump(findings, file)


def _line(finding: Finding) -> str:
    """Return the text of a finding: aligned, coloured on a terminal, with the remedy below."""
    status = f"{finding.status:7}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        status = f"\x1b[{_COLORS[finding.status]}m{status}\x1b[0m"
    line = f"{status}  {finding.name:{_NAME_WIDTH}} {finding.text}"
    return f"{line}\n{'':{_NAME_WIDTH + 10}}-> {finding.remedy}" if finding.remedy else line


if __name__ == "__main__":
    sys.exit(main())
