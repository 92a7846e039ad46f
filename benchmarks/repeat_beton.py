"""A .beton file that is another one, so many times: an epoch of many batches from few images.

python benchmarks/repeat_beton.py FILE TARGET TIMES
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ffcv_ops import read_beton  # noqa: E402
from ffcv_ops.beton.layout import FIELD_TYPE, HEADER_TYPE  # noqa: E402


def repeat_file(source: Path, target: Path, times: int) -> int:
    """Write a .beton whose pages, and the samples on them, are those of another, so many times. Return its samples."""
    beton = read_beton(source)
    with open(source, "rb") as file:
        header = np.frombuffer(file.read(HEADER_TYPE.itemsize), HEADER_TYPE).copy()
        fields = file.read(FIELD_TYPE.itemsize * int(header["num_fields"][0]))
    page_size, count = int(header["page_size"][0]), beton.num_samples
    data = np.fromfile(source, np.uint8, int(header["alloc_table_ptr"][0]))
    table = beton.alloc_table
    first = int(table["ptr"].min()) // page_size * page_size
    pages = data[first:]
    span = -(-len(pages) // page_size) * page_size
    head_size = HEADER_TYPE.itemsize + len(fields) + count * times * beton.metadata.itemsize
    start = -(-head_size // page_size) * page_size
    rows, entries = np.tile(beton.metadata, times), np.tile(table, times)
    shift = np.repeat(start - first + span * np.arange(times, dtype=np.int64), count).astype(np.uint64)
    rows["f0"]["data_ptr"] += shift
    entries["ptr"] += shift
    entries["sample_id"] += np.repeat(np.arange(times, dtype=np.uint64) * np.uint64(count), count)
    header["num_samples"], header["alloc_table_ptr"] = count * times, start + span * times
    with open(target, "wb") as file:
        for part in (header.tobytes(), fields, rows.tobytes()):
            file.write(part)
        for number in range(times):
            file.seek(start + span * number)
            file.write(pages.data)
        file.seek(start + span * times)
        file.write(entries.tobytes())
    return int(read_beton(target).num_samples)


if __name__ == "__main__":
    print(repeat_file(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
