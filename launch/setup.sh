#!/usr/bin/env bash
# Make .venv, with everything the project needs: `make setup`, or bash launch/setup.sh
#
# The script installs missing system packages with apt, as root or through sudo. If that is impossible, it prints their
# names for apt, dnf, brew and conda and stops. If .venv already fits pyproject.toml, constraints.txt and this script,
# nothing is done.
#
# If dist/ has a wheel of FFCV that fits (make ffcv-wheel), the wheel is installed and nothing needs to be compiled.
#
#   PYTHON=python3.12   the interpreter, 3.10 to 3.14. By default that of an existing .venv, else the first of python3,
#                       python3.14 ... python3.10.
#   pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...) apply as usual.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/setup.stamp

# A need, then its packages for apt, dnf, brew, conda. VERSION is the interpreter's. '-' means that none is needed.
packages='
python         python3,python3-dev,python3-venv  python3,python3-devel  python@3.12  python=3.12
venv           pythonVERSION-venv                python3-pip            -            -
python-headers pythonVERSION-dev                 python3-devel          -            -
compiler       g++                               gcc-c++                -            cxx-compiler
pkg-config     pkg-config                        pkgconf-pkg-config     pkgconf      pkg-config
opencv         libopencv-dev                     opencv-devel           opencv       libopencv
turbojpeg      libturbojpeg0-dev                 turbojpeg-devel        jpeg-turbo   libjpeg-turbo
libGL          libgl1                            libglvnd-glx           -            libgl
glib           libglib2.0-0                      glib2                  -            glib
xcb            libxcb1                           libxcb                 -            libxcb
'

main() {
    python=$(find_python)
    if [ -n "$python" ] && fits "$python"; then
        return
    fi
    [ -z "$python" ] || wheel=$(find_wheel "$python")
    meet_needs
    build_venv "$python"
    fingerprint "$python" >"$stamp"
    printf 'setup: .venv is ready.\n'
}

# The interpreter and, if one fits it, the wheel of FFCV in dist/.
python= wheel=

# Install the missing packages, or stop.
meet_needs() {
    local needs
    needs=$(missing "$python")
    [ -n "$needs" ] || return 0
    install_system "$python" $needs
    python=$(find_python)
    needs=$(missing "$python")
    [ -z "$needs" ] || give_up "apt installed its packages, but not what is needed" "$python" $needs
}

# Print the interpreter to use. Print nothing if there is none, but apt may install python3.
find_python() {
    local candidate
    for candidate in ${PYTHON:-.venv/bin/python python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    [ -z "${PYTHON:-}" ] || stop "PYTHON=$PYTHON is no Python from 3.10 to 3.14."
    [ ! -x /usr/bin/python3 ] ||
        stop "no Python from 3.10 to 3.14 on the PATH: install one and name it, as in make setup PYTHON=python3.12"
}

# Print the wheel of FFCV in dist/ for this interpreter, processor and C library, if there is one.
find_wheel() {
    "$1" - <<'END'
import glob, platform, re, sys

python = "cp%d%d" % sys.version_info[:2]
glibc = [int(part) for part in re.findall(r"\d+", platform.libc_ver()[1])[:2]]
# cp310-abi3 serves every version. Earlier versions of launch/ffcv_wheel.sh made a wheel for one.
paths = [f"dist/ffcv-*-{tag}-manylinux_*_{platform.machine()}.whl" for tag in ("cp310-abi3", f"{python}-{python}")]
for path in (path for pattern in paths for path in glob.glob(pattern)):
    if [int(part) for part in re.search(r"manylinux_(\d+)_(\d+)_", path).groups()] <= glibc:
        print(path)
        break
END
}

# Print what .venv depends on. If this changes, .venv is updated or made again.
fingerprint() {
    cat pyproject.toml constraints.txt launch/setup.sh | cksum
    interpreter "$1"
    pwd -P
}

interpreter() {
    "$1" -c 'import sys; print(sys.base_prefix, sys.version.split()[0])'
}

fits() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$1")" ]
}

# Print the needs that this machine does not meet, by their names in the table above.
missing() {
    local python=$1
    if [ -z "$python" ]; then
        printf 'python libGL glib xcb '
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null || printf 'venv '
        loads "$python" libGL.so.1 || printf 'libGL '
        loads "$python" libgthread-2.0.so.0 || printf 'glib '
        loads "$python" libxcb.so.1 || printf 'xcb '
    fi
    [ -z "$wheel" ] || return 0
    if [ -n "$python" ]; then
        "$python" -c 'import pathlib, sysconfig; (pathlib.Path(sysconfig.get_path("include")) / "Python.h").open()' \
            2>/dev/null || printf 'python-headers '
    fi
    command -v "${CXX:-c++}" >/dev/null || printf 'compiler '
    if command -v pkg-config >/dev/null; then
        pkg-config --exists opencv4 || pkg-config --exists opencv || printf 'opencv '
        pkg-config --exists libturbojpeg || printf 'turbojpeg '
    else
        printf 'pkg-config opencv turbojpeg '
    fi
}

# Test whether the interpreter can load a shared library. The opencv-python wheel needs some of a Linux desktop.
loads() {
    [ "$(uname)" != Linux ] || "$1" -c "import ctypes; ctypes.CDLL('$2')" 2>/dev/null
}

# Print the packages of one manager (2 apt, 3 dnf, 4 brew, 5 conda) for the given needs.
named() {
    local column=$1 python=$2 version
    shift 2
    version=$([ -z "$python" ] || "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    printf '%s\n' "$packages" | awk -v column="$column" -v version="$version" -v needs=" $* " '
        index(needs, " " $1 " ") && $column != "-" { gsub(",", " ", $column); gsub("VERSION", version, $column); print $column }
    ' | paste -sd ' ' -
}

install_system() {
    local python=$1 sudo=
    shift
    command -v apt-get >/dev/null || give_up "there is no apt here" "$python" "$@"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || give_up "you are not root, and there is no sudo" "$python" "$@"
        sudo -n true 2>/dev/null || [ -t 0 ] || give_up "sudo wants a password, and there is no terminal" "$python" "$@"
        sudo=sudo
    fi
    printf 'setup: installing %s with apt\n' "$(named 2 "$python" "$@")"
    $sudo apt-get update -qq || give_up "apt could not read its package lists" "$python" "$@"
    # shellcheck disable=SC2046 # each package is a word
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        $(named 2 "$python" "$@") </dev/null >/dev/null || give_up "apt could not install it" "$python" "$@"
}

# Print what to install by hand, and stop. The arguments are the reason, the interpreter and the needs.
give_up() {
    local reason=$1 python=$2
    shift 2
    {
        printf 'setup: missing: %s\n' "$*"
        printf 'setup: not installed, because %s. Install it with one of\n' "$reason"
        printf '  apt    sudo apt-get install %s\n' "$(named 2 "$python" "$@")"
        printf '  dnf    sudo dnf install %s\n' "$(named 3 "$python" "$@")"
        printf '  brew   brew install %s\n' "$(named 4 "$python" "$@")"
        printf '  conda  conda install -c conda-forge %s\n' "$(named 5 "$python" "$@")"
        printf 'setup: and run make setup again.\n'
        if [[ "$*" =~ compiler|headers|pkg-config|opencv|turbojpeg ]]; then
            printf 'setup: Or have FFCV built elsewhere: run make ffcv-wheel on a machine that has these, with no newer\n'
            printf 'setup: C library, copy its dist/ here, and run make setup again.\n'
        fi
    } >&2
    exit 1
}

stop() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Test whether there is a .venv of this interpreter that was made in this folder. Its scripts contain the path.
serves() {
    .venv/bin/python -c 'import pip' 2>/dev/null &&
        [ "$(interpreter .venv/bin/python)" = "$(interpreter "$1")" ] &&
        grep -qsF "$(pwd -P)/.venv" .venv/bin/activate
}

build_venv() {
    local python=$1
    if ! serves "$python"; then
        printf 'setup: making .venv with %s\n' "$("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    printf 'setup: installing the Python packages (several GB the first time, most of it PyTorch)\n'
    [ -t 1 ] || export PIP_QUIET=1
    .venv/bin/python -m pip install --constraint constraints.txt pip setuptools
    [ -z "$wheel" ] || .venv/bin/python -m pip install --constraint constraints.txt "$wheel"
    # Link ffcv only against the libraries that it calls, not all of OpenCV. It then loads faster and fails less often.
    [ "$(uname)" != Linux ] || export LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}"
    .venv/bin/python -m pip install --constraint constraints.txt --build-constraint constraints.txt \
        --editable '.[dev]'
    .venv/bin/python -c 'import cv2, ffcv, timm, torch, torchvision' ||
        stop "the packages are installed, but do not import: see the error above."
}

# launch/ffcv_wheel.sh uses only the functions.
[ "${BASH_SOURCE[0]}" != "$0" ] || main
