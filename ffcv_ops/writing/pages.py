"""Lay out encoded images on pages, one after the other, and note the pages that have been written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.writing.encode import Encoded, Entry
from ffcv_ops.writing.partial_file import PartialFile
from ffcv_ops.writing.plan import BadImage, WritePlan

_SAMPLE_TYPE = np.dtype(
    [
        *(("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8"), ("size", "<u4")),
        *(("checksum", beton.CHECKSUM_TYPE), ("changes", "u1")),
    ]
)


class StoredImages:
    """The images of a plan that have their places, from the first of the storage order on."""

    def __init__(self, plan: WritePlan):
        self.samples = np.zeros(plan.num_images, _SAMPLE_TYPE)  # of a bad image, zeros
        self.reasons: dict[int, str] = {}  # the positions of the bad images, and what is wrong with each
        self.position = 0  # the number of images so far

    @classmethod
    def from_pages(cls, plan: WritePlan, pages: Sequence[dict[str, Any]]) -> "StoredImages":
        """Return the images on the pages that a journal describes."""
        stored = cls(plan)
        for number, page in enumerate(pages):
            ptr = plan.data_start + number * plan.settings.page_size
            for entry in page["samples"]:
                if isinstance(entry, str):
                    stored.skip(entry)
                else:
                    stored.add(entry, ptr)
                    ptr += entry[3]
        return stored

    def add(self, entry: Sequence[int], ptr: int) -> None:
        """Store the next image, given as mode, width, height, size, checksum and `Change`, at an offset."""
        mode, width, height, size, checksum, *changes = entry  # a journal has only changes that are not 0
        self.samples[self.position] = mode, width, height, ptr, size, checksum, sum(changes)
        self.position += 1

    def skip(self, reason: str) -> None:
        """Leave out the next image."""
        self.reasons[self.position] = reason
        self.position += 1

    def kept(self) -> np.ndarray:
        """Return which images are in the file, bool (num_images,)."""
        kept = np.ones(len(self.samples), bool)
        kept[list(self.reasons)] = False
        return kept


@dataclass
class _Page:
    """The page that is being filled."""

    start: int
    used: int = 0
    record: list[list[int] | str] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)


class PageLayout:
    """The places of encoded images, page by page. The bytes of a file depend on no other code but the encoder.

    Parameters
    ----------
    plan : WritePlan
    partial : PartialFile
        Its pages, if the run was interrupted, come first. It gets a note of each page that is written.
    """

    def __init__(self, plan: WritePlan, partial: PartialFile):
        self.plan, self.partial = plan, partial
        self.stored = StoredImages.from_pages(plan, partial.resumed)
        self._page = _Page(plan.data_start + len(partial.resumed) * plan.settings.page_size)
        partial.resumed.clear()

    def add(self, encoded: Encoded) -> None:
        """Write the next images behind the others. Raise BadImage if an image is larger than a page."""
        contents = iter(encoded.contents)
        for entry in encoded.entries:
            if isinstance(entry, str):
                self.stored.skip(entry)
                self._page.record.append(entry)
            else:
                self.partial.write(next(contents).data, self._place(entry))

    def _place(self, entry: Entry) -> int:
        """Give an image its place behind the others and return its offset in bytes. It may begin a page."""
        mode, width, height, size, digest, changes = entry
        page_size = self.plan.settings.page_size
        if size > page_size:
            raise BadImage(
                f"{self.plan.locate(self.stored.position)}: {width} x {height} px take {size} bytes, a page has "
                f"{page_size}; use --page_size={1 << (size - 1).bit_length()} or a smaller --max_side"
            )
        if self._page.used + size > page_size:
            self._note()
            self._page = _Page(self._page.start + page_size)
        page = self._page
        ptr = page.start + page.used
        checksum = int(np.frombuffer(digest, beton.CHECKSUM_TYPE)[0])
        record = [mode, width, height, size, checksum, *([changes] if changes else [])]
        self.stored.add(record, ptr)
        page.used += size
        page.record.append(record)
        page.hashes += digest
        return ptr

    def close(self) -> None:
        """Note the last page, and wait until all pages are on disk."""
        if self._page.record:
            self._note()
        self.partial.flush()

    def _note(self) -> None:
        page = self._page
        self.partial.append_page(sha256(page.hashes).hexdigest(), {"samples": page.record}, page.used)
