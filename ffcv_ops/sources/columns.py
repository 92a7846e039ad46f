"""Choose the columns of a table that hold images and classes, and number the classes.

Tables are those of Hugging Face's `datasets`: in Parquet, and in Arrow files as ``save_to_disk`` leaves them. Their
schema carries metadata with the kind of each column (`Image`, `ClassLabel`) and the names of the classes. Tables of
other writers have no such metadata. Then names and types of columns decide.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.webdataset import JSON_KEYS, MOST_CLASSES, name_classes, read_class_names
from ffcv_ops.units import show_names

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "pixels", "bytes", "data")
_LABEL_NAMES = ("label", "labels", "cls", "class", "class_name", "target", "category", "y")


@dataclass(frozen=True)
class Columns:
    """The columns of images and classes, by their dotted paths, such as ``image.bytes``."""

    image: str
    label: str
    content: str | None  # the column with the bytes of the images, within that of the images
    path: str | None  # the column with their names
    mode: str | None  # the mode to which `datasets` converts the images when it decodes them
    names: list[str] | None  # the names of class numbers, if the metadata has any

    def check_same(self, other: "Columns", path: str) -> None:
        """Raise UserError if another file has other columns."""
        for what, mine, its in (
            (
                "columns",
                (self.image, self.content, self.path, self.label),
                (other.image, other.content, other.path, other.label),
            ),
            ("names of classes", self.names, other.names),
        ):
            if mine != its:
                raise UserError(f"{path}: has other {what} than the first file; name files of one table only")


def select(batch: Any, name: str) -> Any:
    """Return a column of a batch or table by its dotted path. What is null within a null struct is null."""
    import pyarrow as pa

    first, *rest = name.split(".")
    values = batch.column(first)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    for part in rest:
        values = values.flatten()[values.type.get_field_index(part)]
    return values


def import_pyarrow(address: str) -> Any:
    """Return the package pyarrow. Raise UserError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{address}: Parquet and Arrow files need the package pyarrow ({error}); pip install pyarrow, or this "
            "package with its extra, pip install '.[parquet]'"
        ) from error
    return pyarrow


def choose_columns(schema: "pa.Schema", spec: SourceSpec, path: str) -> Columns:
    """Return the columns with images and classes. Raise UserError if one is missing, not clear, or of another type."""
    fields = dict(_flatten(schema))
    features = _read_features(schema)
    images = [
        [name for name in fields if _feature(features, name).get("_type") == "Image"],
        [name for name, kind in fields.items() if _is_image_struct(kind)],
        [name for name, kind in fields.items() if _is_binary(kind) and name.lower() in _IMAGE_NAMES],
    ]
    labels = [
        [name for name in fields if _feature(features, name).get("_type") == "ClassLabel"],
        [name for name in fields if name.lower() in _LABEL_NAMES and "." not in name],
        [f"json.{name}" for name in JSON_KEYS if f"json.{name}" in fields][:1],
    ]
    image = _choose("image", spec.image_column, images, ("image", "jpg"), fields, path)
    label = _choose("label", spec.label_column, labels, ("label",), fields, path)
    content, names = _find_content(image, fields[image], path)
    mode, classes = _feature(features, image).get("mode"), _feature(features, label).get("names")
    known = [str(name) for name in classes] if isinstance(classes, list) and classes else None
    return Columns(image, label, content, names, mode, known)


def _flatten(fields: Any, prefix: str = "") -> Iterator[tuple[str, "pa.DataType"]]:
    """Yield the dotted path and the type of each column, also of those within a struct."""
    for found in fields:
        yield prefix + found.name, found.type
        if _is_struct(found.type) and not _is_image_struct(found.type):
            yield from _flatten(found.type, f"{prefix}{found.name}.")


def _value_type(kind: "pa.DataType") -> str:
    """Return a type as text, of a dictionary that of its values."""
    return str(kind.value_type if str(kind).startswith("dictionary<") else kind)


def _is_struct(kind: "pa.DataType") -> bool:
    return str(kind).startswith("struct<")


def _is_image_struct(kind: "pa.DataType") -> bool:
    return _is_struct(kind) and any(child.name == "bytes" and _is_binary(child.type) for child in kind)


def _is_binary(kind: "pa.DataType") -> bool:
    return _value_type(kind) in ("binary", "large_binary", "binary_view")


def _is_text(kind: "pa.DataType") -> bool:
    return _value_type(kind) in ("string", "large_string", "string_view")


def _is_number(kind: "pa.DataType") -> bool:
    return _value_type(kind).lstrip("u") in ("int8", "int16", "int32", "int64")


def _read_features(schema: "pa.Schema") -> dict[str, Any]:
    """Return what `datasets` tells about the columns; nothing if another writer wrote the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _feature(features: dict[str, Any], name: str) -> dict[str, Any]:
    found: Any = features
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _choose(
    what: str,
    wanted: str | None,
    candidates: list[list[str]],
    preferred: tuple[str, ...],
    fields: dict[str, "pa.DataType"],
    path: str,
) -> str:
    """Return the column that the user wants, or the only one of the first candidates, or a preferred one of them."""
    if wanted is not None:
        if wanted not in fields:
            raise UserError(f"{path}: has no column {wanted} but {_list(fields)}; choose one with --{what}_column")
        return wanted
    found = next((names for names in candidates if names), [])
    if len(found) > 1:
        found = [name for name in found if name in preferred] or found
    if len(found) == 1:
        return found[0]
    problem = f"has several columns for the {what}" if found else f"has no column that is known to hold the {what}"
    raise UserError(f"{path}: {problem} ({_list({name: fields[name] for name in found or fields})}); "
                    f"choose one with --{what}_column")  # fmt: skip


def _list(fields: dict[str, "pa.DataType"]) -> str:
    return show_names([f"{name} ({_name_type(kind)})" for name, kind in fields.items()], 8)


def _name_type(kind: "pa.DataType") -> str:
    text = str(kind)
    return text if len(text) < 50 else f"{text[:47]}..."


def _find_content(name: str, kind: "pa.DataType", path: str) -> tuple[str | None, str | None]:
    """Return the columns with the bytes and with the names of the images."""
    if _is_binary(kind):
        return name, None
    if _is_text(kind):
        return None, name
    if _is_image_struct(kind):
        return f"{name}.bytes", f"{name}.path" if "path" in {child.name for child in kind} else None
    raise UserError(
        f"{path}: the column {name} is of the type {_name_type(kind)}; images are binary, or a struct of bytes and "
        "path, one in each row; choose another with --image_column, or write the table again"
    )


@dataclass
class Labels:
    """The classes of rows: for each row, the position in `found` of its text, which may be a number."""

    columns: Columns
    numbers: list[np.ndarray] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    is_text: bool | None = None

    def add(self, values: "pa.Array", path: str, first_row: int) -> None:
        """Add the classes of the next rows of a file. Raise UserError if a row has none, or what is no class."""
        import pyarrow as pa

        where = f"{path}: the column {self.columns.label}"
        is_text = _is_text(values.type)
        if not is_text and not _is_number(values.type):
            raise UserError(
                f"{where} is of the type {_name_type(values.type)}; a class is a number or a text; choose another "
                "column with --label_column"
            )
        if self.is_text not in (None, is_text):
            raise UserError(f"{where} has texts in some files and numbers in others; write them with one schema")
        self.is_text = is_text
        if values.null_count:
            row = first_row + int(np.flatnonzero(values.is_null())[0])
            raise UserError(f"{where} has {values.null_count} rows without a class, such as row {row}; remove them")
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if is_text:
            encoded = values.dictionary_encode()
            texts, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        else:
            try:
                numbers = values.cast(pa.int64()).to_numpy()
            except pa.ArrowInvalid as error:
                raise UserError(f"{where} has numbers that are no classes ({error})") from error
            bad = np.flatnonzero((numbers < 0) | (numbers >= MOST_CLASSES))
            if len(bad):
                hint = ", as test splits without classes have" if numbers[bad[0]] == -1 else ""
                raise UserError(f"{where} has {numbers[bad[0]]} in row {first_row + bad[0]}, which is no class{hint}")
            unique, indices = np.unique(numbers, return_inverse=True)
            texts = [str(number) for number in unique.tolist()]
        table = np.array([self.found.setdefault(text, len(self.found)) for text in texts], np.int32)
        self.numbers.append(table[indices])

    def finish(self, spec: SourceSpec) -> tuple[list[str], np.ndarray, list[Remark]]:
        """Return classes, class numbers of rows, and remarks. Raise UserError if a name is missing, or twice there."""
        labels = np.concatenate(self.numbers)
        self.numbers = []
        names, whose = self.columns.names, f"the metadata of the column {self.columns.label}"
        if spec.class_names:
            names, whose = read_class_names(spec.class_names), public_name(spec.class_names)
        if names is not None and len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{spec.name}: {whose} has the class {name} twice; give the names with --class_names FILE")
        classes, table = name_classes(self.found, names, whose, spec.name)
        labels = table[labels]
        remarks: list[Remark] = []
        if names is None and classes == [str(number) for number in range(len(classes))]:
            what = "classes without names, which are named by their numbers"
            remarks.append(Remark(what, len(classes), "0", "name them with --class_names FILE, one on each line"))
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty):
            remarks.append(Remark("classes without an image", len(empty), classes[empty[0]]))
        return classes, labels, remarks
