#!/usr/bin/env bash
# distributed 2026.8.0: a task that never started is given up with KilledWorker, and `retries` does not prevent it.
#
# If a worker process ends, Dask counts every task that was assigned to this worker as a suspect, also those that only
# waited behind another task. A task that was assigned to more than three such workers (allowed-failures) is given up.
# So on machines that are preempted, or beside one task that takes its workers down, sound tasks fail. The message says
# that workers died "while trying to run it". `retries` counts errors that a task raised, and no lost workers.
#
# Here one worker with one thread works on a long task, while a short one with retries=100 waits behind it. The worker
# process is ended four times, and its nanny starts the next one.
#
# Expected: the short task is tried again elsewhere, up to 100 times.
# Seen:
#   the short task: KilledWorker, started 0 times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check dask==2026.8.0 distributed==2026.8.0
cd "$folder"
cat >waiting.py <<'PYTHON'
import os
import signal
import time
from pathlib import Path

from distributed import Client, LocalCluster

STARTED = Path("started").absolute()


def long_task():
    time.sleep(600)


def short_task():
    with open(STARTED, "a") as file:
        file.write("x")


def end_worker(client, ended):
    """End the process of the worker, once the long task runs there, and wait for its successor."""
    while True:
        time.sleep(0.2)
        calls = client.call_stack() if client.nthreads() else {}
        pids = [pid for pid in client.run(os.getpid).values() if pid not in ended] if calls else []
        if pids:
            os.kill(pids[0], signal.SIGTERM)
            ended.append(pids[0])
            return


if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=60) as cluster:
        with Client(cluster) as client:
            first = client.submit(long_task, pure=False)
            second = client.submit(short_task, pure=False, retries=100)
            ended = []
            for _ in range(4):
                end_worker(client, ended)
            error = second.exception(timeout=120)
    num_started = len(STARTED.read_text()) if STARTED.exists() else 0
    print(f"the short task: {type(error).__name__}, started {num_started} times", flush=True)
PYTHON
"$folder/venv/bin/python" waiting.py 2>errors | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
the short task: KilledWorker, started 0 times
EXPECTED
