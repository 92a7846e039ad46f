#!/usr/bin/env bash
# webdataset 1.0.2: TarWriter ignores its `format`, and a key with a dot comes back as another key.
#
# TarWriter chooses ustar, also as its documented default, but never hands the choice to tarfile. tarfile then writes
# pax. The time of change is a float, so each file gets an extended header of 1,024 bytes more. ImageNet as pairs of
# .jpeg and .cls has 2.6 million files: 2.6 GB, and twice the headers to read. Pass an integer `mtime` to avoid them.
#
# The reader takes the path up to the first dot of the file name as key. TarWriter accepts keys with a dot. The samples
# "img.1" and "img.2" are read as one sample "img" with the parts "1.cls", "1.jpg", "2.cls" and "2.jpg". No error is
# raised, and of two samples one is left.
#
# Output seen:
#   format=ustar: 4 extended headers for 4 files
#   mtime=0: 0 extended headers for 4 files
#   written img.1 img.2, read img
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check webdataset==1.0.2
cd "$folder"
cat >shards.py <<'PYTHON'
import io
import tarfile

import webdataset

KEYS = "img.1", "img.2"
for options in {"format": "USTAR_FORMAT"}, {"mtime": 0}:
    content = io.BytesIO()
    with webdataset.TarWriter(content, encoder=False, **options) as writer:
        for key in KEYS:
            writer.write({"__key__": key, "jpg": b"image", "cls": b"1"})
    num_headers = sum(content.getvalue()[place + 156 : place + 157] == b"x" for place in range(0, 8192, 512))
    name = "format=ustar" if "format" in options else "mtime=0"
    content.seek(0)
    print(f"{name}: {num_headers} extended headers for {len(tarfile.open(fileobj=content).getnames())} files")
with open("x.tar", "wb") as file:
    file.write(content.getvalue())
read = [sample["__key__"] for sample in webdataset.WebDataset("x.tar", shardshuffle=False)]
print(f"written {' '.join(KEYS)}, read {' '.join(read)}")
PYTHON
"$folder/venv/bin/python" -W ignore shards.py | tee seen
diff seen - <<'EXPECTED'
format=ustar: 4 extended headers for 4 files
mtime=0: 0 extended headers for 4 files
written img.1 img.2, read img
EXPECTED
