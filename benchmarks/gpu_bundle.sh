#!/usr/bin/env bash
# Pack what a bare machine with a GPU lacks for benchmarks/gpu_check.sh into dist/gpu:
#
#   make gpu-bundle BUNDLE_ARGS="--data IMAGE_FOLDER [--cifar FOLDER] [--ffcv_imagenet CHECKOUT]"
#
#   --data           class folders of images, such as a sample of ImageNet
#   --cifar          a folder with train/ and val/, each with class folders of small images
#   --ffcv_imagenet  a checkout of github.com/libffcv/ffcv-imagenet, the peer
#
# The machine needs Python 3.10 or newer on x86-64 Linux, PyTorch, torchvision, Numba, OpenCV (opencv-python-headless
# will do), matplotlib, scikit-learn, and no network. The bundle brings FFCV with OpenCV and TurboJPEG inside, and pure
# Python packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python out=dist/gpu data= cifar= peer= limit_bytes=$((60 << 20))
# Without compiled code, so they serve every Python.
packages='assertpy fastargs iniconfig pluggy pygments pytest pytorch-pfn-extras terminaltables timm'

stop() {
    printf 'gpu-bundle: %s\n' "$*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || stop "$1 needs a value"
    case $1 in
    --data) data=$2 ;;
    --cifar) cifar=$2 ;;
    --ffcv_imagenet) peer=$2 ;;
    --out) out=$2 ;;
    --python) python=$2 ;;
    *) stop "$1 is unknown; the options are --data --cifar --ffcv_imagenet --out --python" ;;
    esac
    shift 2
done
[ -d "$data" ] || stop "--data=$data is no folder of class folders of images"
[ -z "$cifar" ] || [ -d "$cifar/train" ] || stop "--cifar=$cifar has no train/"
[ -z "$peer" ] || [ -f "$peer/train_imagenet.py" ] || stop "--ffcv_imagenet=$peer has no train_imagenet.py"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/gpu/wheels" "$work/gpu/data"

mkdir -p dist
wheel=$(find dist -maxdepth 1 -name 'ffcv-*-cp310-abi3-manylinux_*_x86_64.whl' | head -1)
if [ -n "$wheel" ]; then
    cp "$wheel" "$work/gpu/wheels/"
else
    PYTHON=$python FFCV_WHEEL_DIR="$work/gpu/wheels" bash launch/ffcv_wheel.sh
fi
# shellcheck disable=SC2086 # each package is a word
"$python" -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir "$work/gpu/wheels" $packages

write() { # a folder of class folders, the file
    mkdir -p "$(dirname "$2")"
    "$python" write_beton.py --split "$(basename "$2" .beton)" --source "$1" --target "$2" --max_side 500 --quality 90 \
        --page_size $((2 << 20)) # the smallest, because the last page of a file is filled up
}
write "$data" "$work/gpu/data/images/train.beton"
"$python" launch/make_digits.py "$work/digits"
for split in train val; do
    write "$work/digits/$split" "$work/gpu/data/digits/$split.beton"
    [ -z "$cifar" ] || write "$cifar/$split" "$work/gpu/data/cifar/$split.beton"
done
if [ -n "$peer" ]; then
    mkdir "$work/gpu/ffcv-imagenet"
    cp "$peer/train_imagenet.py" "$peer/LICENSE" "$work/gpu/ffcv-imagenet/"
fi

size_bytes=$(du -sb "$work/gpu" | cut -f1)
[ "$size_bytes" -le "$limit_bytes" ] || stop "the bundle has $((size_bytes >> 20)) MiB, more than $((limit_bytes >> 20)): give --data fewer images"
rm -rf "$out"
mkdir -p "$(dirname "$out")"
mv "$work/gpu" "$out"
printf 'gpu-bundle: made %s, %s MiB. There: bash benchmarks/gpu_check.sh %s OUT\n' "$out" "$((size_bytes >> 20))" "$out"
