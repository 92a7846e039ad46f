#!/usr/bin/env bash
# pyarrow 26.0.1: dictionary_pagesize_limit and data_page_size do not limit a page, so 100 images make one page of 10 MB.
#
# Both limits are 1 MiB by default, so one expects pages of about ten images of 100 kB. The writer looks at the sizes only
# after each write_batch_size rows, 1,024 by default. A row group of 100 images, as `datasets` wrote before version 5,
# becomes one page, the dictionary, which holds all images, compressed together. To read one image costs the reading and
# decompression of 10 MB. Set write_batch_size, or use no dictionary and content-defined chunking, as `datasets` 5 does.
#
# Output seen:
#   defaults: dictionary of 10.0 MB
#   write_batch_size=1: dictionary of 1.1 MB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==26.0.1
cd "$folder"
cat >pages.py <<'PYTHON'
import os

import pyarrow as pa
import pyarrow.parquet as pq

table = pa.table({"image": [os.urandom(100_000) for _ in range(100)]})
for what, options in {"defaults": {}, "write_batch_size=1": {"write_batch_size": 1}}.items():
    pq.write_table(table, "a.parquet", row_group_size=100, **options)
    column = pq.read_metadata("a.parquet").row_group(0).column(0)
    print(f"{what}: dictionary of {(column.data_page_offset - column.dictionary_page_offset) / 1e6:.1f} MB")
PYTHON
"$folder/venv/bin/python" pages.py | tee seen
diff seen - <<'EXPECTED'
defaults: dictionary of 10.0 MB
write_batch_size=1: dictionary of 1.1 MB
EXPECTED
