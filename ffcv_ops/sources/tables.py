"""Find the files of a table, and name and order its rows: what Parquet and Arrow files share.

The name of an image is the path that its row holds, which `datasets` fills with the file name. Images are ordered by
class number, then by this name, as in a folder. So the order is that of a folder with the same names. If a row has no
path, or if two rows of a class have the same one, all images are named by file and row, such as
``train-00000.parquet/000000007``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import expand, full_name, is_folder, join, list_names, name_files
from ffcv_ops.sources.columns import Columns, Labels, select
from ffcv_ops.sources.folder import FolderReader, stat_image
from ffcv_ops.sources.ranges import RangeFile
from ffcv_ops.sources.remarks import Remark, similar_names
from ffcv_ops.sources.remote import is_remote, public_name
from ffcv_ops.sources.source import PackedKeys, Reader, Source, sort_keys
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.splits import shard_remarks

if TYPE_CHECKING:
    import pyarrow as pa

# A dataset's folder holds its files, or a folder `data`, or one folder for each split. Others may be classes of images.
_FOLDERS = frozenset("data default train training validation valid val dev test".split())
_MOST_DEPTH = 2
_ROW_DIGITS = 9
EMBED = "store the bytes of all images, as save_to_disk and push_to_hub of `datasets` do"
# Number of images that are looked at.
_SAMPLE = 32
# The start of libjpeg's table for brightness at quality 75, in the order of the file.
_LUMA_75 = bytes.fromhex("080606070605080707070909080a0c140d0c0b0b0c191213")


def find_files(address: str, suffix: str) -> list[str]:
    """Return the files with a suffix at an address, also in `data` and splits. Raise UserError if there is none."""
    return (walk(address, suffix) if is_folder(address) else None) or expand(address, (suffix,))


def walk(folder: str, suffix: str, depth: int = 0) -> list[str]:
    """Return the files of a folder; if there are none, those of `data` and of folders of splits within it."""
    names = [(name, is_inner) for name, is_inner in list_names(folder) if not name.startswith(".")]
    found = [join(folder, name) for name, _ in names if name.endswith(suffix)]
    if found or depth == _MOST_DEPTH:
        return found
    folders = (join(folder, name) for name, is_inner in names if is_inner and name.lower() in _FOLDERS)
    return [path for inner in folders for path in walk(inner, suffix, depth + 1)]


@dataclass
class FileRows:
    """The rows of a file as the listing finds them."""

    names: bytearray = field(default_factory=bytearray)  # what the rows hold as path, which may be empty
    labels: list["pa.Array"] = field(default_factory=list)
    num_rows: int = 0
    num_unnamed: int = 0
    num_outer: int = 0  # of the rows without bytes, which may have the path of a file

    def add(self, batch: "pa.RecordBatch", columns: Columns, path: str) -> None:
        """Add the names and classes of further rows. Raise UserError if a name holds a zero byte."""
        block, num_unnamed = pack_names(select(batch, columns.path) if columns.path else None, len(batch), path)
        self.names += block
        self.num_unnamed += num_unnamed
        self.labels.append(select(batch, columns.label))
        self.num_rows += len(batch)


class Rows:
    """The rows of files, in the order of files and rows. See `FileRows` for the attributes."""

    def __init__(self, paths: Sequence[str], labels: Labels):
        self.paths, self.labels = paths, labels
        self.counts: list[int] = []  # of the rows of each file
        self.names = PackedKeys()
        self.num_unnamed = self.num_outer = 0

    def add(self, found: FileRows) -> None:
        """Add the rows of the next file. Raise UserError if a class is missing, or no class."""
        path, first_row = self.paths[len(self.counts)], 0
        for values in found.labels:
            self.labels.add(values, path, first_row)
            first_row += len(values)
        self.names.extend(found.names)
        self.counts.append(found.num_rows)
        self.num_unnamed += found.num_unnamed
        self.num_outer += found.num_outer

    def are_outer(self, name: str) -> bool:
        """Return whether the rows hold paths of images instead of bytes. `name` is that of the source in messages.

        Raises
        ------
        UserError
            If there are no rows, or if only some of them have bytes.
        """
        total = sum(self.counts)
        if not total:
            raise UserError(f"{name}: has no rows")
        if 0 < self.num_outer < total:
            column = self.labels.columns.image
            raise UserError(f"{name}: {self.num_outer} of {total} rows have no bytes in {column}; {EMBED}")
        return bool(self.num_outer)

    def arrange(self, labels: np.ndarray) -> tuple[np.ndarray, PackedKeys, list[Remark]]:
        """Return the order of the images, their keys in this order, and remarks. The names are then forgotten."""
        names, self.names = self.names, PackedKeys()
        if not self.num_unnamed:
            order = sort_keys(names, labels)
            keys = names.take(order)
            del names  # with those of ImageNet, 40 MB
            twice = _find_twice(keys, labels[order])
            if twice is None:
                return order, keys, []
            why, count, example = "one class has a path twice", len(labels), twice
        else:
            why, count, example = "rows without a path", self.num_unnamed, ""
        names = self._number()
        order = sort_keys(names, labels)
        keys = names.take(order)
        what = f"images named by file and row ({why})"
        return order, keys, [Remark(what, count, example or keys[0], "their order is that of the rows in each class")]

    def _number(self) -> PackedKeys:
        """Return names of files and rows."""
        names = PackedKeys()
        for path, count in zip(name_files(self.paths), self.counts, strict=True):
            prefix = os.fsencode(path) + b"/%0" + b"%dd\0" % _ROW_DIGITS
            for start in range(0, count, 4096):
                names.extend(b"".join(prefix % row for row in range(start, min(start + 4096, count))))
        return names


def pack_names(values: "pa.Array | None", count: int, where: str) -> tuple[bytes, int]:
    """Return names for `PackedKeys.extend`, and how many are missing. Raise UserError if a name holds a zero byte."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if values is None:
        return bytes(count), count
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    # A string of Python for each name would take more memory than all that is kept.
    empty, zero = pa.scalar(b"", pa.large_binary()), pa.scalar(b"\0", pa.large_binary())
    joined = pc.binary_join_element_wise(values.cast(pa.large_binary()).fill_null(b""), empty, zero)
    bounds = np.frombuffer(joined.buffers()[1], np.int64)[joined.offset : joined.offset + count + 1]
    block = joined.buffers()[2][bounds[0] : bounds[-1]].to_pybytes()
    if block.count(0) != count:
        raise UserError(f"{where}: the path of an image has a zero character, which no file name has")
    return block, int(np.count_nonzero(np.diff(bounds) == 1))


def _find_twice(keys: PackedKeys, labels: np.ndarray) -> str | None:
    """Return a key that two images of one class have; None if there is none. Equal ones are neighbours."""
    before = b""
    for index, is_other_class in enumerate((np.diff(labels, prepend=-1) != 0).tobytes()):
        key = keys.encoded(index)
        if key == before and not is_other_class:
            return os.fsdecode(key)
        before = key
    return None


def outer_files(rows: Rows) -> tuple[Reader, np.ndarray]:
    """Return reader and places of the images that rows name by path. Raise UserError if one is not a file here."""
    where = rows.paths[0]
    if is_remote(where):
        raise UserError(f"{public_name(where)}: holds paths of images and not their bytes; {EMBED}")
    if rows.num_unnamed:
        raise UserError(f"{where}: has {rows.num_unnamed} rows with neither bytes nor a path; remove them")
    folders = {os.path.dirname(os.path.abspath(path)) for path in rows.paths}
    root = min(folders)
    places = np.empty((len(rows.names), 2), np.int64)
    for index, name in enumerate(rows.names):
        if "://" in name:
            raise UserError(f"{where}: holds addresses of images and not their bytes, such as {name}; {EMBED}")
        if len(folders) > 1 and not os.path.isabs(name):
            raise UserError(f"{where}: {name} is relative, and the files lie in several folders; name those of one")
        try:
            places[index] = stat_image(os.path.join(root, name))
        except FileNotFoundError:
            raise UserError(
                f"{where}: holds paths of images and not their bytes, and {os.path.join(root, name)} is not there; put "
                f"the images there, or {EMBED}"
            ) from None
        except OSError as error:
            raise UserError(f"{os.path.join(root, name)}: cannot be read ({error.strerror})") from error
    return FolderReader(root), places


def build_source(
    spec: SourceSpec, rows: Rows, embedded: tuple[Reader, np.ndarray] | None, files: Sequence[RangeFile]
) -> Source:
    """Return the source of rows, in the order of a folder. Classes or images that are missing are a UserError.

    Parameters
    ----------
    spec : SourceSpec
    rows : Rows
    embedded : tuple or None
        The reader and the places of the images, whose last column is the size. If None, the rows hold paths of images.
    files : sequence of RangeFile
        The files of the rows.
    """
    classes, numbers, remarks = rows.labels.finish(spec)
    columns = rows.labels.columns
    identity: list[Any] = [spec.kind, [file.identity for file in files], columns.image, columns.label]
    if embedded is not None:
        reader, places = embedded
        sizes_bytes = places[:, -1]
    else:
        reader, places = outer_files(rows)
        sizes_bytes, identity = places[:, 0], []
    order, keys, order_remarks = rows.arrange(numbers)
    places = places[order]
    remarks = [*shard_remarks(rows.paths), *remarks, *order_remarks, *similar_names(classes)]
    if columns.mode not in (None, "RGB"):
        what = "columns whose images `datasets` would convert, written as they are stored"
        remarks.append(Remark(what, 1, f"{columns.image} (mode {columns.mode})"))
    if rows.num_unnamed:
        remarks += sample_remarks(reader, keys, places)
    facts = {"path": full_name(spec.address), "num_files": len(rows.paths), "num_images": len(keys)}
    facts |= {"image_column": columns.image, "label_column": columns.label}
    return Source(
        spec.kind, spec.name, classes, keys, numbers[order], places, sizes_bytes[order], reader,
        identity=identity, facts=facts, remarks=remarks,
    )  # fmt: skip


def sample_remarks(reader: Reader, keys: PackedKeys, places: np.ndarray) -> list[Remark]:
    """Return a remark if images without a path look as if `datasets` had encoded them again.

    If the function of `datasets.map` gets decoded images, `map` stores all images again: JPEGs with Pillow's default
    quality of 75, and without their path. This also happens if the function only looks at the images.
    """
    chosen = np.linspace(0, len(keys) - 1, min(len(keys), _SAMPLE)).astype(int).tolist()
    count = sum(is_pillow_default(reader.read(keys[index], places[index].tolist())) for index in chosen)
    if count * 2 <= len(chosen):
        return []
    what = f"images without a path that are JPEGs of quality 75 ({count} of {len(chosen)} looked at)"
    advice = (
        "`datasets.map` stores decoded images so; if yours were better, map over cast_column(..., Image(decode=False))"
    )
    return [Remark(what, count, keys[chosen[0]], advice)]


def is_pillow_default(content: bytes) -> bool:
    """Return whether a JPEG has the quantization that Pillow chooses by default."""
    position = content.find(b"\xff\xdb", 0, 4096) if content.startswith(b"\xff\xd8") else -1
    return position > 0 and content[position + 5 : position + 5 + len(_LUMA_75)] == _LUMA_75
