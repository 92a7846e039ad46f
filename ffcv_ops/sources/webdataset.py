"""List WebDataset shards: tar archives in which files of one key are one sample.

The key of a file is its path up to the first dot of its name, as in the package ``webdataset``. The rest is the
extension, in lower case. A sample has one image and one class. The class is the content of the file ``.cls``, or a
value in ``.json``. Unlike in ``webdataset``, the files of a sample may lie anywhere in a shard.
"""

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import beside, exists, expand, full_name, read
from ffcv_ops.sources.archives import ArchiveReader, Listing, Part, list_parts, whole_archives
from ffcv_ops.sources.in_threads import Count
from ffcv_ops.sources.index import load_index, with_index
from ffcv_ops.sources.ranges import RangeReader, list_file, list_files
from ffcv_ops.sources.remarks import listing_remarks
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.source import Source, SourceError, Stage
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.splits import choose_split, shard_remarks
from ffcv_ops.sources.tar import arrange, clean_name, is_image
from ffcv_ops.sources.tar_headers import FILE, Member

_KEY = re.compile(rb"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
# A line of a file of labels.
_LABEL = re.compile(r"[^,;\t]*[.](jpe?g|png|webp)\s*[,;\t]", re.IGNORECASE)
_META = re.compile(rb"__[^/]*__(/|$)")
_NAMES_FILES = ("classes.txt", "classnames.txt", "class_names.txt")
JSON_KEYS = ("label", "cls", "class")
_MOST_LABEL_BYTES = 1 << 20
_FIRST_MEMBERS = 64
MOST_CLASSES = 1_000_000


def has_labels(path: str) -> bool:
    """Return whether one of the first files of an archive tells the class of a sample."""
    try:
        file = list_file(path)
        reader = RangeReader([file])
        (part,) = whole_archives([file], reader)
        for number, member in enumerate(part.walk(reader)):
            if number == _FIRST_MEMBERS:
                return False
            if member.kind == FILE and member.name.lower().endswith((b".cls", b".json")):
                return True
    except SourceError:
        raise  # another time, the server may answer, and the kind would be another one
    except UserError:
        pass  # to be found again, and reported, when the archive is listed
    return False


def open_webdataset(spec: SourceSpec, stage: Stage) -> Source:
    """List the samples of shards. See `ffcv_ops.sources.kinds.Kind`."""
    paths = choose_split(expand(spec.address, (".tar",)), spec)
    files = list_files(paths)
    reader = RangeReader(files)
    parts = whole_archives(files, reader)
    names_file, names = _find_names(spec, files[0].path)
    rests_on = [spec.kind, spec.image_column, spec.label_column, names, *(file.identity for file in files)]
    archives = ArchiveReader(spec.address, files)
    earlier = load_index(spec.index, rests_on, spec.kind, spec.name, archives)
    if earlier is not None:
        return earlier
    listing = list_parts(parts, lambda part, count: _ShardLister(part, reader, count, spec).run(), stage)
    if not len(listing.names):
        raise UserError(f"{spec.name}: has no images")
    classes, table = name_classes(listing.found, names, names_file, spec.name)
    labels = table[np.frombuffer(listing.texts, np.int32)]
    facts = {"class_names": full_name(names_file)} if names_file else {}
    remarks = [*shard_remarks(paths), *listing_remarks(listing.tally, listing.extensions)]
    return with_index(arrange(spec, listing, classes, labels, archives, 0, facts, remarks), rests_on)


@dataclass(slots=True)
class _Sample:
    """Parts of a sample that have been found so far."""

    image: Member | None = None
    text: str | None = None
    is_json: bool = False


class _ShardLister:
    """The listing of one shard. Only samples that are not complete yet are kept as objects."""

    def __init__(self, part: Part, reader: RangeReader, count: Count, spec: SourceSpec):
        self.listing = Listing()
        self._part, self._count, self._walk = part, count, part.walk(reader)
        self._image_column = (spec.image_column or "").lower().removeprefix(".")
        self._label_column = spec.label_column
        self._class_extension = (spec.label_column or "cls").removeprefix(".")
        self._begun: dict[bytes, _Sample] = {}

    def run(self) -> Listing:
        """Return the samples of the shard."""
        sample, key = _Sample(), b""
        for member in self._walk:
            name = clean_name(member.name)
            if member.kind != FILE:
                if is_image(name.rpartition(b"/")[2]):
                    raise self._error(f"{os.fsdecode(name)} is a {member.kind}; make the shard again with files only")
                continue
            match = _KEY.fullmatch(name)
            if match is None or _META.match(name):
                self.listing.count_other(name)
                continue
            if match[1] != key:
                self._finish(key, sample)
                key = match[1]
                sample = self._begun.pop(key) if key in self._begun else _Sample()
            self._add(sample, member._replace(name=name), match[2].lower().decode("utf-8", "replace"))
        self._finish(key, sample)
        for key, sample in self._begun.items():
            self._report(key, sample)
        return self.listing

    def _finish(self, key: bytes, sample: _Sample) -> None:
        """Note a sample that is complete. If it is not, the rest may follow elsewhere in the shard."""
        image = sample.image
        if image is not None and sample.text is not None:
            self.listing.add(image.name, self._part, image.offset, image.size_bytes, sample.text)
        elif image is not None or sample.text is not None:
            self._begun[key] = sample

    def _add(self, sample: _Sample, member: Member, extension: str) -> None:
        """Add a file to its sample."""
        is_wanted = extension == self._image_column if self._image_column else is_image(member.name)
        if is_wanted:
            self._count(1)
            if sample.image is not None:
                raise self._error(
                    f"{os.fsdecode(sample.image.name)} and {os.fsdecode(member.name)} are images of one sample, "
                    "because a key ends at the first dot; choose the extension of one with --image_column, or rename "
                    "them"
                )
            sample.image = member
            return
        is_json = extension == "json" and self._class_extension != "json"
        text = None
        if is_json and sample.text is None:
            text = self._json_label(member)
        elif extension == self._class_extension:
            if sample.text is not None and not sample.is_json:
                raise self._error(
                    f"{os.fsdecode(member.name)} is the second class of its sample; give each sample its key"
                )
            text = self._label(member)
        if text is not None:
            sample.text, sample.is_json = text, is_json
        elif not is_json or sample.text is None:
            self.listing.tally.add(f"parts of samples left out with extension .{extension}", os.fsdecode(member.name))

    def _label(self, member: Member) -> str:
        text = self._content(member).strip()
        if not text or "\n" in text:
            raise self._error(f"{os.fsdecode(member.name)} is no class but {text[:40]!r}")
        return text

    def _json_label(self, member: Member) -> str | None:
        """Return the class in a JSON file; None if there is none."""
        try:
            found = json.loads(self._content(member))
        except (ValueError, RecursionError) as error:
            raise self._error(f"{os.fsdecode(member.name)} cannot be read as JSON ({error})") from error
        if not isinstance(found, dict):
            return None
        for key in [self._label_column] if self._label_column else JSON_KEYS:
            value = found.get(key)
            if isinstance(value, (int, str)) and not isinstance(value, bool) and str(value).strip():
                return str(value).strip()
        return None

    def _content(self, member: Member) -> str:
        if member.size_bytes > _MOST_LABEL_BYTES:
            raise self._error(f"{os.fsdecode(member.name)} is too large to be a label ({member.size_bytes} bytes)")
        try:
            return self._walk.content(member).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{os.fsdecode(member.name)} cannot be read as a label ({error})") from error

    def _report(self, key: bytes, sample: _Sample) -> None:
        if sample.image is None:
            raise self._error(f"the sample {os.fsdecode(key)} has a class but no image")
        where = f"no file .{self._label_column} or key of .json" if self._label_column else "no .cls, no label in .json"
        raise self._error(
            f"the sample {os.fsdecode(key)} has an image but no class ({where}); name the extension or the key of "
            ".json with --label_column"
        )

    def _error(self, message: str) -> UserError:
        return UserError(f"{self._part.where}: {message}")


def name_classes(
    texts: Collection[str], names: list[str] | None, whose: str | None, where: str
) -> tuple[list[str], np.ndarray]:
    """Return the classes, and the class number of each text. Raise UserError if the names of `whose` lack a class."""
    # Texts of digits are class numbers.
    if all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        numbers = np.array([int(text) for text in texts], np.int32)
        count = int(numbers.max()) + 1
        if count > MOST_CLASSES:
            raise UserError(f"{where}: has the class {count - 1}, which is no class number")
        if names is None:
            names = [str(number) for number in range(count)]
        elif count > len(names):
            raise UserError(f"{where}: has the class {count - 1}, but {whose} names {len(names)} classes")
        return names, numbers
    if names is None:
        names = sorted(texts)
    elif not set(texts) <= set(names):
        raise UserError(f"{where}: has the class {min(set(texts) - set(names))}, which {whose} does not name")
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[text] for text in texts], np.int32)


def _find_names(spec: SourceSpec, first: str) -> tuple[str | None, list[str] | None]:
    """Return the file with the names of the classes, and these names, if there are any. See `read_class_names`."""
    if spec.class_names:
        return public_name(spec.class_names), read_class_names(spec.class_names)
    for name in _NAMES_FILES:
        address = beside(first, name)
        if exists(address):
            return public_name(address), read_class_names(address)
    return None, None


def read_class_names(address: str) -> list[str]:
    """Return the names of classes from the lines of a file. Raise UserError if a line has a label, or a name again."""
    where = public_name(address)
    try:
        names = [line.strip() for line in read(address).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read as names of classes, one on each line ({error})") from error
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: names the class {name} twice")
    image = next((name for name in names if _LABEL.match(name)), None)
    if image:
        raise UserError(
            f"{where}: has labels of images, such as {image}; a file of class names has a class on each line"
        )
    return names


def fits_shards(spec: SourceSpec) -> bool:
    """Return whether an address names archives, of which the first one has labels."""
    if spec.labels:
        return False
    try:
        paths = expand(spec.address, (".tar",))
    except UserError:
        return False
    return has_labels(paths[0])
