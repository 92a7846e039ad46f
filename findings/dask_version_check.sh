#!/usr/bin/env bash
# distributed 2026.8.0: Client.get_versions(check=True) does not raise where versions differ, against its documentation.
#
# The documentation says: "raise ValueError if all required & optional packages do not match". A worker has another
# NumPy and another toolz than the client here. The call only warns. A program that relies on the error goes on, and its
# results mix versions. The check knows a fixed list of packages. Others, such as Pillow, have to be named. Only the
# name of the distribution counts: `packages=["PIL"]` finds nothing on either side, and so nothing that differs. The
# example of the documentation, `packages=['sklearn', 'geopandas']`, names an import too, and finds no scikit-learn.
#
# Expected: ValueError for both calls.
# Seen:
#   check=True: no error, a warning about numpy, toolz
#   check=True, packages=["PIL"], Pillow 11.3.0 and 12.0.0: no error, no warning about PIL
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    dask==2026.8.0 distributed==2026.8.0 numpy==2.2.6 toolz==1.0.0 pillow==11.3.0
# What a worker finds first.
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$folder/other" \
    numpy==2.2.5 toolz==0.12.1 pillow==12.0.0
cd "$folder"
"$folder/venv/bin/dask" scheduler --host=127.0.0.1 --port=0 --scheduler-file=scheduler.json --no-dashboard \
    >log 2>&1 &
scheduler=$!
until [ -e scheduler.json ]; do sleep 0.2; done
PYTHONPATH="$folder/other" "$folder/venv/bin/dask" worker --scheduler-file=scheduler.json --nworkers=1 --nthreads=1 \
    --no-dashboard >>log 2>&1 &
worker=$!
trap 'kill $worker $scheduler || true; wait; rm -rf "$folder"' EXIT
cat >check.py <<'PYTHON'
import warnings

from distributed import Client


def pillow_version():
    import PIL

    return PIL.__version__


def outcome(packages):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            client.get_versions(check=True, packages=packages)
            error = "no error"
        except ValueError:
            error = "ValueError"
    text = "\n".join(str(warning.message) for warning in caught)
    return error, text


with Client(scheduler_file="scheduler.json") as client:
    client.wait_for_workers(1)
    error, text = outcome([])
    named = [name for name in ("numpy", "toolz") if f"| {name} " in text]
    print(f"check=True: {error}, a warning about {', '.join(named)}")
    error, text = outcome(["PIL"])
    (theirs,) = client.run(pillow_version).values()
    warned = "a warning" if "| PIL " in text else "no warning"
    print(f'check=True, packages=["PIL"], Pillow {pillow_version()} and {theirs}: {error}, {warned} about PIL')
PYTHON
"$folder/venv/bin/python" check.py 2>>log | tee seen
diff seen - <<'EXPECTED'
check=True: no error, a warning about numpy, toolz
check=True, packages=["PIL"], Pillow 11.3.0 and 12.0.0: no error, no warning about PIL
EXPECTED
