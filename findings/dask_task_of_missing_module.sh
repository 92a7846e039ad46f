#!/usr/bin/env bash
# distributed 2026.8.0: a worker that cannot import the module of a task ends itself, and the client is not told.
#
# The worker unpickles the function of a task while it reads the message of the scheduler. If that fails, the worker
# takes its connection for broken and closes, and its nanny does not start another one. The task goes to the next
# worker, which ends in the same way. With allowed-failures=3, a task takes up to four workers down. If no worker is
# left before, the future stays pending for ever. `Client.run` of the same function raises the error. So does `submit`,
# if the scheduler cannot import the module either, because it unpickles all tasks too.
#
# Here client and scheduler can import the module `mine`, and three workers cannot.
#
# Expected: ModuleNotFoundError from the future, and three workers.
# Seen:
#   run: ModuleNotFoundError("No module named 'mine'"), 3 workers
#   submit: pending after 20 s, 0 workers
#
# What helps: `client.submit(pickle.loads, content)`, where `content` is pickled by an object whose `__reduce__` returns
# the function and its arguments. Dask then sees bytes only, and the error arises in the task.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check dask==2026.8.0 distributed==2026.8.0
mkdir "$folder/client" "$folder/workers"
echo 'def double(x): return 2 * x' >"$folder/client/mine.py"
cd "$folder/workers"
PYTHONPATH="$folder/client" "$folder/venv/bin/dask" scheduler --host=127.0.0.1 --port=0 --scheduler-file="$folder/file" --no-dashboard \
    >log 2>&1 &
scheduler=$!
until [ -e "$folder/file" ]; do sleep 0.2; done
"$folder/venv/bin/dask" worker --scheduler-file="$folder/file" --nworkers=3 --nthreads=1 --no-dashboard >>log 2>&1 &
trap 'kill $scheduler || true; wait; rm -rf "$folder"' EXIT
cd "$folder/client"
cat >check.py <<'PYTHON'
import logging
import time

from distributed import Client

import mine

with Client(scheduler_file="../file") as client:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    client.wait_for_workers(3)
    try:
        client.run(mine.double, 1)
        seen = "no error"
    except Exception as error:
        seen = str(error)
    print(f"run: {seen}, {len(client.nthreads())} workers")
    future = client.submit(mine.double, 1)
    time.sleep(20)
    print(f"submit: {future.status} after 20 s, {len(client.nthreads())} workers")
PYTHON
"$folder/venv/bin/python" check.py 2>>log | tee seen
diff seen - <<'EXPECTED'
run: ModuleNotFoundError("No module named 'mine'"), 3 workers
submit: pending after 20 s, 0 workers
EXPECTED
