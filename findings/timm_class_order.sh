#!/usr/bin/env bash
# timm 1.0.31: the classes of a folder of images have other numbers than in torchvision, DALI and datasets.
#
# timm sorts the names of the class folders in lower case, with digits as numbers. The others sort them as text. The
# WordNet names of ImageNet come out alike, but names such as class10 and class2, or ant and Zebra, do not. Weights that
# one trained load into the model of another without a word. Their predictions then have the numbers of other classes.
#
# Output seen (timm 1.0.31, torchvision 0.29.1, datasets 5.2.0; DALI 2.4.0 has the order of the latter two):
#   torchvision: Zebra ant class10 class2
#   datasets: Zebra ant class10 class2
#   timm: ant class2 class10 Zebra
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
    timm==1.0.31 pillow==13.0.0 datasets==5.2.0
cd "$folder"
cat >order.py <<'PYTHON'
from pathlib import Path

import datasets
import timm.data
import torchvision
from PIL import Image

datasets.disable_progress_bars()
for name in ("class2", "class10", "Zebra", "ant"):
    Path("images", name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(f"images/{name}/0.jpg")
print("torchvision:", *torchvision.datasets.ImageFolder("images").classes)
loaded = datasets.load_dataset("imagefolder", data_dir="images", split="train", cache_dir="cache")
print("datasets:", *loaded.features["label"].names)
numbers = timm.data.create_dataset("", "images").reader.class_to_idx
print("timm:", *sorted(numbers, key=numbers.get))
PYTHON
"$folder/venv/bin/python" order.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'EXPECTED'
torchvision: Zebra ant class10 class2
datasets: Zebra ant class10 class2
timm: ant class2 class10 Zebra
EXPECTED
