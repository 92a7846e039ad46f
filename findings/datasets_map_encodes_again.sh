#!/usr/bin/env bash
# datasets 5.2.0: a map that only looks at its images stores all of them again, at JPEG quality 75, and drops their names.
#
# The function of `map` gets the row decoded and returns one new column. The image column is not changed, so one expects
# the stored bytes to stay. They are replaced: Pillow encodes each image again with its defaults, and `path` becomes null.
# The function that does not touch the image column leaves the bytes alone. So does Image(decode=False).
#
# Output seen:
#   map that returns a number only: same bytes, path 0.jpg
#   map that reads the image's width: 2 times smaller or more, first quantizer 8 instead of 1, path None
#   the same with decode=False: same bytes, path 0.jpg
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pillow==12.3.0 numpy==2.2.6
cd "$folder"
cat >map.py <<'PYTHON'
import io

import numpy as np
from datasets import Dataset, Features, Image, disable_progress_bars
from PIL import Image as Pillow

disable_progress_bars()
pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
content = io.BytesIO()
Pillow.fromarray(pixels).save(content, "JPEG", quality=98)
before = content.getvalue()
rows = Dataset.from_dict({"image": [{"bytes": before, "path": "0.jpg"}]}, features=Features({"image": Image()}))
raw = rows.cast_column("image", Image(decode=False))


def show(what, mapped):
    found = mapped.cast_column("image", Image(decode=False))[0]["image"]
    after, path = found["bytes"], found["path"]
    if after == before:
        print(f"{what}: same bytes, path {path}")
        return
    first = [Pillow.open(io.BytesIO(data)).quantization[0][0] for data in (after, before)]
    smaller = "2 times smaller or more" if len(before) >= 2 * len(after) else "about as large"
    print(f"{what}: {smaller}, first quantizer {first[0]} instead of {first[1]}, path {path}")


show("map that returns a number only", rows.map(lambda row: {"number": 1}))
show("map that reads the image's width", rows.map(lambda row: {"width": row["image"].width}))
show("the same with decode=False", raw.map(lambda row: {"size": len(row["image"]["bytes"])}))
PYTHON
HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore map.py | tee seen
diff seen - <<'EXPECTED'
map that returns a number only: same bytes, path 0.jpg
map that reads the image's width: 2 times smaller or more, first quantizer 8 instead of 1, path None
the same with decode=False: same bytes, path 0.jpg
EXPECTED
