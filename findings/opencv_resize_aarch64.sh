#!/usr/bin/env bash
# OpenCV 5.0.0: cv2.resize of one image gives other pixels on aarch64 than on x86-64, with the same wheel version.
#
# The wheels of both machines have the same version and the same documentation. Those for aarch64 contain KleidiCV and
# Carotene, which replace the code of OpenCV. The bilinear reduction of an 8-bit image then differs in a fifth of its
# values, by up to 2. INTER_AREA differs in 1 of 10,000 or fewer, by 1. On x86-64, neither depends on IPP or AVX. So
# files and digests of resized images, and the accuracies of models on them, are those of one kind of machine. Pillow
# gives the same pixels on both. So does INTER_LINEAR_EXACT, and INTER_NEAREST. For INTER_CUBIC this was reported for
# 4.6 (https://github.com/opencv/opencv/issues/22477), where INTER_LINEAR was still equal.
#
# Output seen (opencv-python-headless 5.0.0.93, pillow 13.0.0, numpy 2.4.6; aarch64 under QEMU 7.2):
#   INTER_NEAREST: equal
#   INTER_LINEAR_EXACT: equal
#   INTER_AREA: at most 1 in 1,000 values differ, by up to 1
#   INTER_LINEAR: more than 10 % of the values differ, by up to 2
#   INTER_CUBIC: more than 1 % of the values differ, by up to 1
#   Pillow BILINEAR: equal
# It needs Debian on x86-64, and downloads 150 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
wheels=(--quiet --no-deps --only-binary=:all: --python-version 3.11)
packages=(numpy==2.4.6 opencv-python-headless==5.0.0.93 pillow==13.0.0)
for machine in x86_64 aarch64; do
    venv/bin/pip install "${wheels[@]}" --target "$machine" --no-compile \
        --platform "manylinux_2_28_$machine" --platform "manylinux_2_27_$machine" "${packages[@]}"
done

# Python 3.11 of Debian 12 for both machines, and an emulator: unpacked here, not installed.
apt=(-qq -o Dir::State::status=/dev/null -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
for arch in amd64 arm64; do
    mkdir -p "apt-$arch/lists/partial" "apt-$arch/archives/partial" "root-$arch"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" >"apt-$arch/list"
    options=("${apt[@]}" -o "APT::Architecture=$arch" -o "APT::Architectures=$arch" -o "Dir::State::lists=$folder/apt-$arch/lists"
        -o "Dir::Cache=$folder/apt-$arch" -o "Dir::Etc::sourcelist=$folder/apt-$arch/list" -o Dir::Etc::sourceparts=-)
    names=(python3.11 libstdc++6)
    if [ "$arch" = amd64 ]; then names+=(qemu-user-static); fi
    apt-get "${options[@]}" update
    apt-get "${options[@]}" install --download-only --no-install-recommends -y "${names[@]}" >/dev/null
    for package in "apt-$arch"/archives/*.deb; do dpkg-deb -x "$package" "root-$arch"; done
done

cat >resize.py <<'PYTHON'
import sys

import cv2
import numpy as np
from PIL import Image

noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (700, 900, 3), dtype=np.uint8)
resized = {}
for size in ((500, 388), (333, 259), (300, 233)):
    for name in ("NEAREST", "LINEAR_EXACT", "AREA", "LINEAR", "CUBIC"):
        resized[f"INTER_{name} {size}"] = cv2.resize(noise, size, interpolation=getattr(cv2, f"INTER_{name}"))
    resized[f"Pillow BILINEAR {size}"] = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR))
np.savez(sys.argv[1], **resized)
PYTHON
loader=(root-amd64/lib64/ld-linux-x86-64.so.2 --library-path "root-amd64/lib/x86_64-linux-gnu:root-amd64/usr/lib/x86_64-linux-gnu")
PYTHONHOME=root-amd64/usr PYTHONPATH=x86_64 "${loader[@]}" root-amd64/usr/bin/python3.11 resize.py x86_64.npz
root-amd64/usr/bin/qemu-aarch64-static -L root-arm64 -E PYTHONPATH=aarch64 -E OPENBLAS_NUM_THREADS=1 \
    root-arm64/usr/bin/python3.11 resize.py aarch64.npz

cat >compare.py <<'PYTHON'
import numpy as np

files = [np.load(f"{machine}.npz") for machine in ("x86_64", "aarch64")]
found = {}
for key in files[0]:
    difference = np.abs(files[0][key].astype(int) - files[1][key])
    share, most = found.get(name := key.partition(" (")[0], (0, 0))
    found[name] = max(share, (difference > 0).mean()), max(most, difference.max())
for name, (share, most) in found.items():
    size = "at most 1 in 1,000" if share < 1e-3 else "more than 10 % of the" if share > 0.1 else "more than 1 % of the"
    print(f"{name}: equal" if not most else f"{name}: {size} values differ, by up to {most}")
PYTHON
export PYTHONHOME=root-amd64/usr PYTHONPATH=x86_64
"${loader[@]}" root-amd64/usr/bin/python3.11 compare.py | tee seen
diff seen - <<'SEEN'
INTER_NEAREST: equal
INTER_LINEAR_EXACT: equal
INTER_AREA: at most 1 in 1,000 values differ, by up to 1
INTER_LINEAR: more than 10 % of the values differ, by up to 2
INTER_CUBIC: more than 1 % of the values differ, by up to 1
Pillow BILINEAR: equal
SEEN
