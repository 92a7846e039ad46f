"""Count what a folder of images loses or gains when it is written, and put each kind into one line."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

# Folders that systems and tools make beside images. Names with a dot in front are hidden everywhere.
_SYSTEM_FOLDERS = frozenset(
    "__macosx __pycache__ @eadir @tmp @recycle @recently-snapshot #recycle #snapshot ~snapshot lost+found $recycle.bin "
    "recycler".split()
) | {"system volume information"}
_MOST_EXTENSIONS = 8


@dataclass(frozen=True)
class Remark:
    """One kind of thing that was left out, changed or chosen."""

    what: str
    count: int
    example: str  # the first of them in the order of the folder
    advice: str = ""  # what follows for the user; empty if nothing does

    def line(self) -> str:
        """Return the remark as a line for the user."""
        return f"{self.what}: {self.count:,}, such as {self.example}" + (f"; {self.advice}" if self.advice else "")

    def entry(self) -> dict[str, str | int]:
        """Return the remark in JSON's types, for the manifest."""
        return {"what": self.what, "count": self.count, "example": self.example}


class Tally:
    """Counts by kind, each with its first example."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count more of a kind. The example counts only if it is the first."""
        if count:
            before, first = self.found.get(kind, (0, example))
            self.found[kind] = before + count, first

    def text(self) -> str:
        """Return the counts in words, of files by their extensions."""
        return ", ".join(f"{count} {kind or 'without extension'}" for kind, (count, _) in self.found.items())

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        for kind, (count, example) in other.found.items():
            self.add(kind, example, count)


HIDDEN_FOLDERS = "hidden folders left out"
HIDDEN_FILES = "hidden files left out"
BESIDE = "images beside the class folders left out"
DEEPER = "images in folders within a class folder"
TWICE = "images read twice through links"
_ADVICE = {
    BESIDE: "move each into the folder of its class",
    DEEPER: "their class is the folder at the top",
    TWICE: "they are written once under each name",
}


def is_hidden(name: str) -> bool:
    """Return whether a folder is hidden, or made by a system or a tool, and so holds no class."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def listing_remarks(tally: Tally, extensions: Tally) -> list[Remark]:
    """Return the remarks on a listing, from its counts by kind and those of other files by extension."""
    remarks = [Remark(kind, *found, _ADVICE.get(kind, "")) for kind, found in tally.found.items()]
    by_count = sorted(extensions.found.items(), key=lambda item: (-item[1][0], item[0]))
    for extension, found in by_count[:_MOST_EXTENSIONS]:
        what = f"files left out for their extension {extension}" if extension else "files left out without extension"
        remarks.append(Remark(what, *found, "convert or rename the images among them"))
    rest = by_count[_MOST_EXTENSIONS:]
    if rest:
        what = f"files left out for {len(rest)} more extensions"
        remarks.append(Remark(what, sum(count for _, (count, _) in rest), rest[0][1][1]))
    return remarks


def similar_names(classes: Iterable[str]) -> list[Remark]:
    """Return a remark if names of classes differ only in case, in the form of Unicode, or in spaces around them."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
    similar = [names for names in groups.values() if len(names) > 1]
    if not similar:
        return []
    example = " and ".join(map(repr, similar[0]))
    what = "classes that differ only in case, spaces or form of Unicode"
    return [Remark(what, sum(map(len, similar)), example, "each is a class of its own")]
