"""List tar archives: of class folders, of class archives as ILSVRC's training images, or flat with labels."""

import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import expand, full_name
from ffcv_ops.sources.archives import IMAGE_ENDINGS, ArchiveReader, Listing, Part, list_parts, whole_archives
from ffcv_ops.sources.in_threads import Count
from ffcv_ops.sources.index import load_index, with_index
from ffcv_ops.sources.labels import FLAT, assign, find_labels, number_remarks, read_labels
from ffcv_ops.sources.ranges import RangeFile, RangeReader, list_file, list_files
from ffcv_ops.sources.remarks import BESIDE, DEEPER, Remark, Tally, is_hidden, listing_remarks, similar_names
from ffcv_ops.sources.source import PackedKeys, Source, Stage, find_twice, sort_keys
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.tar_headers import FOLDER, HARD_LINK, SYMBOLIC_LINK, TarError

SPLITS = frozenset(["train", "val", "test"])
_OTHER_SPLITS = "images outside of the split left out"
_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")  # the compressed ones are refused


def open_tar(spec: SourceSpec, stage: Stage) -> Source:
    """List the images of one archive, or of several. See `ffcv_ops.sources.kinds.Kind`."""
    files = list_files(expand(spec.address, _ENDINGS))
    labels_path = Path(spec.labels) if spec.labels else find_labels(spec.address)
    labels_identity = list_file(labels_path).identity if labels_path and labels_path.is_file() else None
    rests_on = [spec.kind, spec.split, *(file.identity for file in files), labels_identity]
    reader = ArchiveReader(spec.address, files)
    earlier = load_index(spec.index, rests_on, spec.kind, spec.name, reader)
    if earlier is not None:
        return earlier
    table = read_labels(spec.labels) if spec.labels else None  # a mistake in it is found before the archive is listed
    listing = _list(files, RangeReader(files), stage)
    if not len(listing.names):
        others = f" but other files ({listing.extensions.text()})" if listing.extensions.found else ""
        raise UserError(f"{spec.name}: has no images{others}")
    if spec.split == "train" and _is_ilsvrc_val(listing):
        whole = "" if spec.hold_out is None else ", without --hold_out"
        raise UserError(f"{spec.name}: holds ILSVRC's validation images; use --split val{whole}")
    if labels_path and (table or _is_ilsvrc_val(listing)):
        classes, labels = assign(listing.names, table or read_labels(labels_path), spec.name, str(labels_path))
        start, remarks = 0, number_remarks(classes)
    else:
        labels_path = None
        classes, labels, start, remarks = _read_classes(listing, spec)
    facts = {"labels": str(labels_path.absolute())} if labels_path else {}
    remarks = [*listing_remarks(listing.tally, listing.extensions), *remarks]
    return with_index(arrange(spec, listing, classes, labels, reader, start, facts, remarks), rests_on)


def arrange(
    spec: SourceSpec,
    listing: Listing,
    classes: list[str],
    labels: np.ndarray,
    reader: ArchiveReader,
    start: int,
    facts: dict[str, str],
    remarks: list[Remark],
) -> Source:
    """Return the source of a listing, in the order of `sort_keys`, and empty the listing.

    Images with the label -1 are left out. `start` is the number of bytes at the beginning of all names that are no part
    of the keys.

    Raises
    ------
    UserError
        If several images have one name.
    """
    twice = find_twice(listing.names)
    if twice is not None:
        raise UserError(
            f"{spec.name}: holds {twice} more than once, so it is not clear which one counts; give each image a "
            "name of its own, or make the archive again"
        )
    order = sort_keys(listing.names, labels)[np.count_nonzero(labels < 0) :]
    is_sorted = len(order) == len(listing.names) and bool((order == np.arange(len(order))).all())
    keys = listing.names if is_sorted and not start else listing.names.take(order, start)
    listing.names = PackedKeys()
    places = np.frombuffer(listing.places, np.int64).reshape(-1, 3)[order]
    listing.places = array("q")
    told: dict[str, Any] = {
        "path": full_name(spec.address),
        "num_archives": len(reader.files),
        **facts,
        "num_images": len(keys),
    }
    return Source(
        spec.kind, spec.name, classes, keys, labels[order], places, places[:, 2], reader,
        identity=[file.identity for file in reader.files], facts=told,
        remarks=[*remarks, *similar_names(classes)],
    )  # fmt: skip


def _list(files: list[RangeFile], reader: RangeReader, stage: Stage) -> Listing:
    """Walk the archives, then the class archives within them."""
    parts, inner = whole_archives(files, reader), list[Part]()
    listing = list_parts(parts, lambda part, count: _list_part(part, reader, count, inner, len(files) > 1), stage)
    if not inner:
        return listing
    whole = list_parts(inner, lambda part, count: _list_part(part, reader, count, None, False), stage)
    for part in inner:
        if part.prefix[:-1] not in {folder.partition(b"/")[0] for folder in whole.folders}:
            raise UserError(f"{part.where}: class archive without an image; make the archive without it, or again")
    whole.tally.merge(listing.tally)
    whole.extensions.merge(listing.extensions)
    if len(listing.names):
        whole.tally.add(BESIDE, listing.names[0], len(listing.names))
    return whole


def _list_part(part: Part, reader: RangeReader, count: Count, inner: list[Part] | None, is_class: bool) -> Listing:
    """List an archive.

    Parameters
    ----------
    inner : list of Part or None
        Where archives within this one are added.
    is_class : bool
        Images at the top belong to the class that the archive's name tells.

    Raises
    ------
    TarError
        If the archive is damaged or cut, or if an image is stored as a link that cannot be followed.
    """
    listing = Listing()
    links: list[tuple[bytes, bytes]] = []
    folder, hidden = None, b""
    class_prefix = os.fsencode(os.path.basename(part.where).removesuffix(".tar")) + b"/"
    for member in part.walk(reader):
        name = clean_name(member.name).removeprefix(part.prefix)
        if member.kind == FOLDER:
            listing.entries.add(part.prefix + name.rstrip(b"/"))
            continue
        inside, _, base = name.rpartition(b"/")
        if inside != folder:
            folder, hidden = inside, hidden_part(inside)
            if hidden:
                listing.hidden.add(part.prefix + hidden)
        if hidden:
            continue
        if not is_image(base):
            if base.endswith(b".tar") and inner is not None:
                class_name = base.removesuffix(b".tar")
                where = f"{part.where}/{os.fsdecode(name)}"
                inner.append(
                    Part(part.file, member.offset, member.offset + member.size_bytes, where, class_name + b"/")
                )
            else:
                listing.count_other(part.prefix + name)
            continue
        count(1)
        whole = (class_prefix if is_class and not inside else part.prefix) + name
        listing.folders.add(whole.rpartition(b"/")[0])
        if member.kind == SYMBOLIC_LINK:
            raise TarError(
                f"{part.where}: {os.fsdecode(name)} is a symbolic link, whose target may lie elsewhere; make the "
                "archive with --dereference"
            )
        if member.kind == HARD_LINK:
            links.append((whole, part.prefix + clean_name(member.target).removeprefix(part.prefix)))
        else:
            listing.add(whole, part, member.offset, member.size_bytes)
    _follow(links, listing, part)
    return listing


def clean_name(name: bytes) -> bytes:
    """Return the name of a member without ``./`` or ``/`` at its beginning."""
    while name.startswith((b"./", b"/")):
        name = name[1:].lstrip(b"/") if name.startswith(b"./") else name.lstrip(b"/")
    return name


def is_image(base: bytes) -> bool:
    """Return whether a file name is that of an image, as in a folder."""
    return base.lower().endswith(IMAGE_ENDINGS) and not base.startswith(b".")


def hidden_part(folder: bytes) -> bytes:
    """Return the path of the first hidden folder on the way to a folder; nothing if there is none."""
    parts = os.fsdecode(folder).split("/")
    for number, name in enumerate(parts, 1):
        if name and is_hidden(name):
            return os.fsencode("/".join(parts[:number]))
    return b""


def _follow(links: list[tuple[bytes, bytes]], listing: Listing, part: Part) -> None:
    """Add images that are stored as a link to an earlier member. GNU tar does so for files with several names."""
    if not links:
        return
    targets = {target for _, target in links}
    names = bytes(listing.block).split(b"\0")[:-1]
    places = {name: listing.places[3 * i + 1 : 3 * i + 3] for i, name in enumerate(names) if name in targets}
    for name, target in links:
        if target not in places:
            raise TarError(
                f"{part.where}: {os.fsdecode(name)} is a hard link to {os.fsdecode(target)}, which is no image of this "
                "archive; make the archive with --hard-dereference"
            )
        listing.add(name, part, *places[target])


def _is_ilsvrc_val(listing: Listing) -> bool:
    """Return whether these are ILSVRC's validation images without class folders."""
    is_flat = {folder.rpartition(b"/")[2] for folder in listing.folders} <= {b"", b"val", b"validation"}
    return is_flat and listing.names[0].rpartition("/")[2].startswith("ILSVRC2012_val_")


def _read_classes(listing: Listing, spec: SourceSpec) -> tuple[list[str], np.ndarray, int, list[Remark]]:
    """Return classes, labels, the length of what stands before the class in all names, and remarks."""
    root = _class_root(listing.folders, spec)
    noted = {kind: array("i") for kind in (BESIDE, DEEPER, _OTHER_SPLITS)}
    numbers: dict[bytes, int] = {}
    labels = array("i")
    for index in range(len(listing.names)):
        name = listing.names.encoded(index)
        class_name, slash, rest = name[len(root) :].partition(b"/")
        if not name.startswith(root) or not slash:
            noted[BESIDE if name.startswith(root) else _OTHER_SPLITS].append(index)
            labels.append(-1)
            continue
        if b"/" in rest:
            noted[DEEPER].append(index)
        labels.append(numbers.setdefault(class_name, len(numbers)))
    for entry in sorted(listing.entries):
        name = entry.removeprefix(root)
        is_class = entry.startswith(root) and name and b"/" not in name and not is_hidden(os.fsdecode(name))
        if is_class and name not in numbers:
            raise UserError(
                f"{spec.name}/{os.fsdecode(entry)}: class folder without an image; make the archive without it, or "
                "with its images"
            )
    classes = sorted(map(os.fsdecode, numbers))
    places = {os.fsencode(name): place for place, name in enumerate(classes)}
    table = np.array([*(places[name] for name in numbers), -1], np.int32)
    tally = Tally()
    for kind, indices in noted.items():
        if indices:
            first = min((listing.names[index] for index in indices), key=lambda name: name.rpartition("/")[::2])
            tally.add(kind, first[len(os.fsdecode(root)) :] if kind == DEEPER else first, len(indices))
    return classes, table[np.frombuffer(labels, np.int32)], len(root), listing_remarks(tally, Tally())


def _class_root(folders: set[bytes], spec: SourceSpec) -> bytes:
    """Return what stands before the class folder in the names of the images, such as ``train/``."""
    parts = [folder.split(b"/") for folder in folders if folder]
    if not parts:
        raise UserError(f"{spec.name}: {FLAT}")
    depth = 0
    if b"" not in folders:
        while len({part[depth] for part in parts}) == 1 and all(len(part) > depth + 1 for part in parts):
            depth += 1
    names = {os.fsdecode(part[depth]) for part in parts}
    if names <= SPLITS:
        if all(len(part) == depth + 1 for part in parts):
            raise UserError(f"{spec.name}: {FLAT}")
        if spec.split not in names:
            raise UserError(f"{spec.name}: holds the splits {', '.join(sorted(names))}; choose one with --split")
        return b"/".join([*parts[0][:depth], os.fsencode(spec.split or ""), b""])
    return b"/".join([*parts[0][:depth], b""]) if depth else b""
