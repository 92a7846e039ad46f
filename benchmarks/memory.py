"""Memory that the tables of a large file cost each rank, compared with another version of this project.

    python benchmarks/memory.py --other WORKTREE [--num_samples 1281167]

Makes two files of tiny raw images, one with as many samples as ImageNet and one with few. For each version and file a
process of its own opens the file as ``train_imagenet.py`` does, makes a loader and gets one batch. Prints the seconds
that opening took, and the memory above that of the small file: peak and steady resident memory (RSS), and steady
proportional memory (PSS), which counts pages shared by processes only once. Needs Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIDE = 2
PAGE_SIZE = 1 << 21

MEASURED = """
import json, sys, time
from ffcv_ops import Label, Loader, OrderOption, RandomResizedCrop, read_beton
path, twice, rank, world_size = sys.argv[1], sys.argv[2] == "path", int(sys.argv[3]), int(sys.argv[4])
started = time.process_time()
beton = read_beton(path)
opened_s = time.process_time() - started
pipelines = {"image": [RandomResizedCrop(8)], "label": [Label()]}
loader = Loader(path if twice else beton, 64, 1, order=OrderOption.RANDOM, seed=0, pipelines=pipelines,
                rank=rank, world_size=world_size)
made_s = time.process_time() - started
batches = iter(loader)
next(batches)
pss_kib = next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Pss:"))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
kib = {name: int(status[name].split()[0]) for name in ("VmHWM", "VmRSS")}
print(json.dumps({"peak": kib["VmHWM"], "rss": kib["VmRSS"], "pss": pss_kib, "read_beton_s": opened_s,
                  "loader_s": made_s}))
"""


def write_tiny(path: Path, num_samples: int) -> None:
    """Write a file of raw images of 2 x 2 px, and its manifest, with the layout of this project's writer."""
    sys.path.insert(0, str(ROOT))
    from ffcv_ops.beton import layout

    sample_bytes = SIDE * SIDE * 3
    per_page = PAGE_SIZE // sample_bytes
    rows = np.zeros(num_samples, np.dtype([("", layout.IMAGE_TYPE), ("", "<i8")], align=True))
    head_bytes = layout.HEADER_TYPE.itemsize + 2 * layout.FIELD_TYPE.itemsize + rows.nbytes
    first_page = -(-head_bytes // PAGE_SIZE)
    ids = np.arange(num_samples)
    place = (first_page + ids // per_page) * PAGE_SIZE + ids % per_page * sample_bytes
    num_pages = -(-num_samples // per_page)
    header = np.zeros(1, layout.HEADER_TYPE)
    header["version"], header["num_fields"], header["page_size"] = layout.VERSION, 2, PAGE_SIZE
    header["num_samples"], header["alloc_table_ptr"] = num_samples, (first_page + num_pages) * PAGE_SIZE
    fields = np.zeros(2, layout.FIELD_TYPE)
    for i, (name, type_id) in enumerate((("image", layout.IMAGE_FIELD), ("label", layout.INT_FIELD))):
        fields["name"][i, : len(name)] = np.frombuffer(name.encode(), np.uint8)
        fields["type_id"][i] = type_id
    rows["f0"]["mode"], rows["f0"]["height"], rows["f0"]["width"] = layout.MODE_RAW, SIDE, SIDE
    rows["f0"]["data_ptr"], rows["f1"] = place, ids % 1000
    table = np.zeros(num_samples, layout.ALLOC_TYPE)
    table["sample_id"], table["ptr"], table["size"] = ids, place, sample_bytes
    head = header.tobytes() + fields.tobytes() + rows.tobytes()
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(int(header["alloc_table_ptr"][0]))
        file.seek(0, os.SEEK_END)
        file.write(table.tobytes())
    manifest = {
        "format": layout.MANIFEST_VERSION,
        "size_bytes": path.stat().st_size,
        "num_samples": num_samples,
        "classes": [str(label) for label in range(1000)],
        "class_counts": np.bincount(ids % 1000, minlength=1000).tolist(),
        "tables": layout.tables_digest(head, table),
        "digest": "sha256:0",
        "checksums": "",
    }
    layout.manifest_path(path).write_text(json.dumps(manifest))


def measure(root: Path, path: Path, passed: str, world_size: int) -> dict[str, float]:
    """Return memory in KiB and CPU time in seconds of one process that uses the version in `root`."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(path), passed, "0", str(world_size)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"error: the process of {root} failed, see above")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a worktree of the version to compare with")
    parser.add_argument("--other_passes", choices=("beton", "path"), default="path", help="what it gives its Loader")
    parser.add_argument("--num_samples", type=int, default=1_281_167, help="samples of the large file (1281167)")
    parser.add_argument("--world_size", type=int, default=1, help="ranks (1)")
    options = parser.parse_args()
    versions = [("this", ROOT, "beton")]
    if options.other:
        versions.append(("other", options.other.resolve(), options.other_passes))
    print("| version | peak MiB | RSS MiB | PSS MiB | read_beton s | with Loader s |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.beton", Path(folder) / "small.beton"
        write_tiny(large, options.num_samples)
        write_tiny(small, 1000)
        for name, root, passed in versions:
            measure(root, small, passed, options.world_size)  # compiles what is not in Numba's cache
            base, full = (measure(root, path, passed, options.world_size) for path in (small, large))
            mib = [(full[key] - base[key]) / 1024 for key in ("peak", "rss", "pss")]
            row = [name, *(f"{value:.0f}" for value in mib), f"{full['read_beton_s']:.2f}", f"{full['loader_s']:.2f}"]
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
