"""Choose the files of a split by their names, and notice files that a series lacks: for shards and tables."""

import os
import re
from collections.abc import Sequence

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import is_folder, relative_name
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.spec import SourceSpec

_SPLIT = re.compile(r"(?:^|[-_./])(train|training|validation|valid|val|dev|test)(?=[-_./]|$)", re.IGNORECASE)
_SPLITS = {"training": "train", "validation": "val", "valid": "val", "dev": "val"}
_SHARD = re.compile(r"(.*?)(\d+)((?:-of-\d+)?\.\w+)")
_COUNT = re.compile(r"-of-(\d+)")


def _split_of(path: str, address: str, is_inside: bool) -> str | None:
    """Return the split that the name of a file tells, or that of a folder between the file and the address."""
    path = relative_name(path, address) if is_inside else public_name(path)
    for part in (os.path.basename(path), os.path.dirname(path) if is_inside else ""):
        if match := _SPLIT.search(part):
            return split_name(match[1])
    return None


def split_name(name: str) -> str:
    """Return the name of a split as ``--split`` has it, such as ``val`` for ``validation``."""
    return _SPLITS.get(name.lower(), name.lower())


def choose_split(paths: Sequence[str], spec: SourceSpec) -> list[str]:
    """Return the files of the wanted split. Raise UserError if it is not clear which of several splits is wanted."""
    is_inside = is_folder(spec.address)
    splits = {path: _split_of(path, spec.address, is_inside) for path in paths}
    found = sorted({str(split) for split in splits.values() if split})
    if len(found) > 1 or (found and spec.split and is_inside):
        if spec.split not in found:
            many = f"holds the splits {', '.join(found)}" if len(found) > 1 else f"holds only the split {found[0]}"
            raise UserError(f"{spec.name}: {many}; choose one with --split, or name its files")
        paths = [path for path in paths if splits[path] == spec.split]
    folders = sorted({os.path.dirname(public_name(path)) for path in paths})
    if len(folders) > 1 and is_inside:
        raise UserError(
            f"{spec.name}: has such files in several folders, {folders[0]} and {folders[1]}; name the files of one"
        )
    return list(paths)


def shard_remarks(paths: Sequence[str]) -> list[Remark]:
    """Return a remark if files of a series are missing.

    In ``train-00000-of-00294.parquet``, the name tells how many there are. Of ``train-0000.tar``, the numbers between
    the first and the last should be there.
    """
    series: dict[tuple[str, str, int], set[int]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(public_name(path)):
            series.setdefault((match[1], match[3], len(match[2])), set()).add(int(match[2]))
    remarks = []
    for (before, behind, width), numbers in series.items():
        count = _COUNT.match(behind)
        missing = sorted(set(range(int(count[1])) if count else range(min(numbers), max(numbers))) - numbers)
        if missing:
            name = f"{os.path.basename(before)}{missing[0]:0{width}d}{behind}"
            remarks.append(Remark("shards that are not there", len(missing), name, "the file will be without them"))
    return remarks
