"""Small .beton files for tests: photographs laid out here in plain NumPy, and digits written by the user's script."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_images

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.reading import read_beton

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = load_sample_images().images
PAGE_SIZE = beton.MIN_PAGE_SIZE


def photographs(count, side=64):
    """Return `count` different square crops of photographs, uint8 (side, side, 3)."""
    crops = []
    for i in range(count):
        image = PHOTOGRAPHS[i % 2]
        y, x = (37 * i) % (image.shape[0] - 160), (101 * i) % (image.shape[1] - 160)
        crops.append(cv2.resize(image[y : y + 160, x : x + 160], (side, side), interpolation=cv2.INTER_AREA))
    return crops


def jpeg_bytes(image, quality=90):
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].reshape(-1)


def write_images(path, images, *, labels=None, raw=False, per_page=None, encode=jpeg_bytes):
    """Write images, as JPEGs or raw, `per_page` of them in a page (default: as many as fit); labels are 0, 1, 2, ..."""
    payloads = [np.ascontiguousarray(image).reshape(-1) if raw else encode(image) for image in images]
    sizes = np.array([payload.size for payload in payloads])
    if per_page is None:
        pages, offsets, page, offset = [], [], 0, 0
        for size in sizes:
            if offset + size > PAGE_SIZE:
                page, offset = page + 1, 0
            pages.append(page)
            offsets.append(offset)
            offset += int(size)
    else:
        pages = np.arange(len(images)) // per_page
        offsets = np.concatenate(
            [np.cumsum(part) - part for part in np.split(sizes, range(per_page, len(sizes), per_page))]
        )
    place = (1 + np.array(pages)) * PAGE_SIZE + np.array(offsets)
    write_tables(path, images, sizes, place, raw, labels)
    with open(path, "r+b") as file:
        for pointer, payload in zip(place.tolist(), payloads, strict=True):
            file.seek(pointer)
            file.write(payload.tobytes())
    return path


def write_tables(path, images, sizes, place, raw, labels, page_size=PAGE_SIZE):
    """Write header, metadata and allocation table of a file whose payloads lie at `place`; the pages are a hole."""
    count = len(sizes)
    table_ptr = (int(place.max()) // page_size + 1) * page_size
    header = np.zeros(1, beton.HEADER_TYPE)
    header["version"], header["num_fields"], header["page_size"] = beton.VERSION, 2, page_size
    header["num_samples"], header["alloc_table_ptr"] = count, table_ptr
    fields = np.zeros(2, beton.FIELD_TYPE)
    for i, (name, type_id) in enumerate((("image", beton.IMAGE_FIELD), ("label", beton.INT_FIELD))):
        fields["name"][i, : len(name)] = np.frombuffer(name.encode(), np.uint8)
        fields["type_id"][i] = type_id
    rows = np.zeros(count, np.dtype([("", beton.IMAGE_TYPE), ("", "<i8")], align=True))
    rows["f0"]["mode"] = beton.MODE_RAW if raw else beton.MODE_JPG
    rows["f0"]["height"] = [image.shape[0] for image in images]
    rows["f0"]["width"] = [image.shape[1] for image in images]
    rows["f0"]["data_ptr"] = place
    rows["f1"] = np.arange(count) if labels is None else labels
    table = np.zeros(count, beton.ALLOC_TYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), place, sizes
    with open(path, "wb") as file:
        for part in (header, fields, rows):
            file.write(part.tobytes())
        file.truncate(table_ptr)
        file.seek(table_ptr)
        file.write(table.tobytes())


def spoil(path, sample_id):
    """Overwrite the JPEG of one sample with zeros, leaving the tables right."""
    entry = read_beton(path).alloc_table[sample_id]
    with open(path, "r+b") as file:
        file.seek(int(entry["ptr"]))
        file.write(bytes(int(entry["size"])))


def write_digits(folder, *, num_train, num_val):
    """Write handwritten digits as JPEGs in class folders, and the two .beton files by the user's script."""
    digits = load_digits()
    splits = {"train": slice(0, num_train), "val": slice(num_train, num_train + num_val)}
    for split, chosen in splits.items():
        for number, (pixels, label) in enumerate(zip(digits.images[chosen], digits.target[chosen], strict=True)):
            path = folder / split / str(label) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            gray = cv2.resize((pixels * 15.9).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
            assert cv2.imwrite(str(path), cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR))
        written = subprocess.run(
            [sys.executable, ROOT / "write_beton.py", "--split", split, "--source", folder / split]
            + ["--target", folder / f"{split}.beton", "--num_workers", "1"],
            capture_output=True,
            text=True,
        )
        assert written.returncode == 0, written.stderr
