#!/usr/bin/env bash
# datasets 5.2.0, load_dataset("imagefolder"): a class named "bullet_train" puts test images into the training split.
#
# The loader finds the splits by words in paths: train, training, validation, valid, val, dev, test, testing, eval and
# evaluation. Any folder counts, also that of a class, if such a word is its name or a part of it beside " ", ".", "_",
# "-" or a digit. CIFAR-100 has the class "train", and ImageNet "bullet train". With the folders train and test, each
# with a folder per class, the test images of such a class come into the training split, and its training images twice.
# A class "test_tube" makes a split "test" out of training and validation images. Without folders for splits, all other
# classes are lost: `bus`, `car`, `train` is a dataset of one class, which then has no labels. There is no message.
#
# The documentation has the words for file names and for folders of splits. For a file named train.png, the loss of the
# others is known (https://github.com/huggingface/datasets/issues/7201). No report was found about class folders. Names
# such as n02917067 are safe. Otherwise pass the files of each split: data_files={"train": "train/**"}.
#
# Expected: each image once, in the split of its folder; all of them in one split if there are no folders for splits.
# Seen (two images in each folder):
#   bus, car, train: train has 2 of train, no labels
#   freight_car, bullet_train, dog: train has 2 of bullet_train, no labels
#   dog, test_tube, valid: validation has 2 of valid, labels test_tube valid
#   dog, test_tube, valid: test has 2 of test_tube, labels test_tube valid
#   train and test, with bullet_train and dog: train has 2 of test/bullet_train, 4 of train/bullet_train, 2 of train/dog
#   train and test, with bullet_train and dog: test has 2 of test/bullet_train, 2 of test/dog
#   train and val, with dog and test_tube: train has 2 of train/dog, 2 of train/test_tube
#   train and val, with dog and test_tube: validation has 2 of val/dog, 2 of val/test_tube
#   train and val, with dog and test_tube: test has 2 of train/test_tube, 2 of val/test_tube
#   the same with data_files: train has 2 of train/dog, 2 of train/test_tube
#   the same with data_files: validation has 2 of val/dog, 2 of val/test_tube
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.4.6 \
    pyarrow==26.0.1
cd "$folder"
cat >load.py <<'PYTHON'
import collections
from pathlib import Path

import datasets
from PIL import Image

root = Path("images").resolve()


def show(what, folders, labels=False, **options):
    """Print which folders the images of each split are from."""
    data = root / str(len(list(root.glob("*"))))
    for folder in folders:
        (data / folder).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8)).save(data / folder / f"{number}.png")
    for split, rows in datasets.load_dataset("imagefolder", data_dir=str(data), **options).items():
        paths = (row["image"]["path"] for row in rows.cast_column("image", datasets.Image(decode=False)))
        counts = collections.Counter(str(Path(path).parent.relative_to(data)) for path in paths)
        text = ", ".join(f"{count} of {folder}" for folder, count in sorted(counts.items()))
        if labels:
            found = rows.features.get("label")
            text += ", no labels" if found is None else f", labels {' '.join(found.names)}"
        print(f"{what}: {split} has {text}")


for classes in (["bus", "car", "train"], ["freight_car", "bullet_train", "dog"], ["dog", "test_tube", "valid"]):
    show(", ".join(classes), classes, labels=True)
show(
    "train and test, with bullet_train and dog",
    [f"{split}/{name}" for split in ("train", "test") for name in ("bullet_train", "dog")],
)
tubes = [f"{split}/{name}" for split in ("train", "val") for name in ("dog", "test_tube")]
show("train and val, with dog and test_tube", tubes)
show("the same with data_files", tubes, data_files={"train": "train/**", "validation": "val/**"})
PYTHON
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore load.py 2>errors | tee seen ||
    { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
bus, car, train: train has 2 of train, no labels
freight_car, bullet_train, dog: train has 2 of bullet_train, no labels
dog, test_tube, valid: validation has 2 of valid, labels test_tube valid
dog, test_tube, valid: test has 2 of test_tube, labels test_tube valid
train and test, with bullet_train and dog: train has 2 of test/bullet_train, 4 of train/bullet_train, 2 of train/dog
train and test, with bullet_train and dog: test has 2 of test/bullet_train, 2 of test/dog
train and val, with dog and test_tube: train has 2 of train/dog, 2 of train/test_tube
train and val, with dog and test_tube: validation has 2 of val/dog, 2 of val/test_tube
train and val, with dog and test_tube: test has 2 of train/test_tube, 2 of val/test_tube
the same with data_files: train has 2 of train/dog, 2 of train/test_tube
the same with data_files: validation has 2 of val/dog, 2 of val/test_tube
EXPECTED
