"""Read the classes of images from a file: two columns, Kaggle's solution, or the development kit of ILSVRC."""

import csv
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.remote import is_remote
from ffcv_ops.sources.source import PackedKeys

FLAT = (
    "holds images but no class folders; name their classes with --labels FILE, for ILSVRC's validation images "
    "ILSVRC2012_devkit_t12.tar.gz or LOC_val_solution.csv. If the folder is one class, pass the one above it"
)
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
KAGGLE_FILE = "LOC_val_solution.csv"
ILSVRC_VAL_NAME = "ILSVRC2012_val_{:08d}"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_KAGGLE_HEADER = ["imageid", "predictionstring"]
_NAME_HEADERS = frozenset("name image images image_name file filename file_name path id image_id imageid key".split())
_CLASS_HEADERS = frozenset("class label class_name category wnid synset target".split())
# Kaggle's file lies beside ILSVRC/Data/CLS-LOC/val.
_FOLDERS_ABOVE = 5


def find_labels(address: str) -> Path | None:
    """Return the labels of ILSVRC's validation images that lie beside them, or above them in Kaggle's layout."""
    if is_remote(address):
        return None
    folder = Path(os.path.abspath(address)).parent
    for place in [folder, *folder.parents][:_FOLDERS_ABOVE]:
        for name in (*DEVKITS, KAGGLE_FILE):
            if (place / name).exists():
                return place / name
        if place.name not in ("CLS-LOC", "Data", "ILSVRC"):
            break
    return None


def read_labels(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the class of each name in a file of labels.

    Parameters
    ----------
    path : path
        Text with two columns, name and class, between them a comma, a tab or spaces. Or Kaggle's
        ``LOC_val_solution.csv``. Or the development kit ``ILSVRC2012_devkit_t12.tar.gz``, packed or unpacked.

    Raises
    ------
    UserError
        If the file cannot be read as such, or names an image twice.
    """
    path = Path(path)
    labels: dict[str, str] = {}
    try:
        is_devkit = path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar"))
        for line, name, class_name in _devkit_rows(path) if is_devkit else _text_rows(path):
            name = name.removeprefix("./")
            if not name or not class_name:
                raise UserError(f"{path}: line {line} has no name or no class")
            if name in labels:
                raise UserError(f"{path}: line {line} names {name} again")
            labels[name] = class_name
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not labels:
        raise UserError(f"{path}: has no line with a name and a class")
    return labels


def _text_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, name and class of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8; --labels takes lines of a name and a class") from error
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in "\t,;" if mark in first), None)
    header = _split(first, delimiter)
    is_kaggle = [field.lower() for field in header] == _KAGGLE_HEADER
    has_header = is_kaggle or (
        len(header) == 2 and header[0].lower() in _NAME_HEADERS and header[1].lower() in _CLASS_HEADERS
    )
    for number, line in enumerate(lines, 1):
        if not line.strip() or (has_header and line == first):
            continue
        fields = _split(line, delimiter)
        if len(fields) != 2:
            raise UserError(f"{path}: line {number} has {len(fields)} columns; it should have a name and a class")
        # Kaggle's second column has class and box of each object. All objects of an image have one class.
        yield number, fields[0], fields[1].split(" ")[0] if is_kaggle else fields[1]


def _split(line: str, delimiter: str | None) -> list[str]:
    fields = line.rsplit(None, 1) if delimiter is None else next(csv.reader([line], delimiter=delimiter))
    return [field.strip() for field in fields]


def _devkit_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, name without extension, and WordNet id of each validation image, as torchvision reads them.

    The ground truth has the ILSVRC id of each image. ``meta.mat`` has the WordNet id of each ILSVRC id, also of synsets
    that are no class but have children.

    Raises
    ------
    UserError
        If a file of the development kit is missing or damaged.
    """
    files = _devkit_files(path)
    missing = [name for name in (_TRUTH, _META) if name not in files]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}, so it is not the development kit of ILSVRC 2012")
    names = _wordnet_ids(files[_META], path)
    for number, line in enumerate(files[_TRUTH].split(), 1):
        if not line.isdigit() or int(line) not in names:
            raise UserError(f"{path}: {_TRUTH} has {line.decode(errors='replace')!r} for image {number}, no ILSVRC id")
        yield number, ILSVRC_VAL_NAME.format(number), names[int(line)]


def _devkit_files(path: Path) -> dict[str, bytes]:
    wanted = (_TRUTH, _META)
    if path.is_dir():
        places = {name: path / "data" / name for name in wanted}
        return {name: place.read_bytes() for name, place in places.items() if place.exists()}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if name in wanted and (content := archive.extractfile(member)):
                    files[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as an archive ({error}); download it again") from error
    return files


def _wordnet_ids(meta: bytes, path: Path) -> dict[int, str]:
    """Return the WordNet id of each ILSVRC id that is a class."""
    from scipy.io import loadmat  # takes a while to import
    from scipy.io.matlab import MatReadError

    try:
        synsets = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in synsets]
    except (MatReadError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{path}: {_META} cannot be read ({error}); download the development kit again") from error
    return {number: name for number, name, num_children in rows if num_children == 0}


def assign(keys: PackedKeys, table: dict[str, str], source: str, path: str) -> tuple[list[str], np.ndarray]:
    """Give each image its class. A label names the path of an image, or its file name, with or without extension.

    Returns
    -------
    classes : list of str
        Sorted.
    labels : ndarray of int32, shape (len(keys),)

    Raises
    ------
    UserError
        If an image has no label, or a label has no image.
    """
    classes = sorted(set(table.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.empty(len(keys), np.int32)
    used: set[str] = set()
    missing: list[str] = []
    for index, key in enumerate(keys):
        found = next((name for name in _names(key) if name in table), None)
        if found is None:
            missing.append(key)
            continue
        if found in used:
            raise UserError(f"{source}: {key} and another image have one label, {found} in {path}; use paths as names")
        used.add(found)
        labels[index] = numbers[table[found]]
    if missing:
        more = f", nor have {len(missing) - 1} more images" if len(missing) > 1 else ""
        raise UserError(f"{source}: {missing[0]} has no label in {path}{more}; add the labels or remove the images")
    if len(used) < len(table):
        surplus = next(name for name in table if name not in used)
        raise UserError(
            f"{path}: {len(table) - len(used)} labels have no image in {source}, such as {surplus}; remove these "
            "labels, or check that the source is whole"
        )
    return classes, labels


def _names(key: str) -> tuple[str, str, str, str]:
    name = key.rpartition("/")[2]
    return key, os.path.splitext(key)[0], name, os.path.splitext(name)[0]


def number_remarks(classes: Sequence[str]) -> list[Remark]:
    """Return a remark if classes are named by numbers whose order as text is another."""
    if not all(name.isdigit() for name in classes) or sorted(classes, key=int) == list(classes):
        return []
    place, name = next((place, name) for place, name in enumerate(classes) if int(name) != place)
    what = "classes that are named by numbers, in the order of text as in a folder"
    return [Remark(what, len(classes), f"{name}, which is class {place}", "write the numbers with leading zeros")]
