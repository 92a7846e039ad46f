"""Find where each image of remote Parquet files lies, once, so that no worker has to look for it again.

A reader of local files finds the pages and values of a row group on first use (`ffcv_ops.sources.parquet_pages`). For
that it walks through the whole column, in each process. From a server, eight processes would get all images nine times.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops.sources.in_threads import Count, list_in_threads
from ffcv_ops.sources.parquet_content import PageError, decompress_blocks
from ffcv_ops.sources.ranges import RangeFile, RangeReader
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.source import SourceError, Stage

if TYPE_CHECKING:
    from ffcv_ops.sources.parquet_pages import ColumnPages

SIZE_COLUMN = 5
_THREADS = 16


class PlacedReader:
    """The images in Parquet files by their places.

    The place of an image has the number of its file, and offset and size of a range. If the range is compressed, the
    next number is its plain size, else 0. The last two are start and size of the image in the plain range. All sizes
    are in bytes.
    """

    def __init__(self, address: str, files: Sequence[RangeFile]):
        self.address, self._ranges = public_name(address), RangeReader(files)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self._ranges.files)

    def locate(self, key: str) -> str:
        """Return the address of the files and the name of the image."""
        return f"{self.address}/{key}"

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of an image. See `ffcv_ops.sources.source.Reader`."""
        file, offset, size_bytes, plain_bytes, start, image_bytes = place
        content = self._ranges.read(file, offset, size_bytes)
        if plain_bytes:
            try:
                content = decompress_blocks(content, plain_bytes)
            except PageError as error:
                raise SourceError(
                    f"{self._ranges.files[file].name}: is damaged at byte {offset}, at {key} ({error}), or its blocks "
                    "of Snappy cannot be read alone; copy the files to this machine"
                ) from error
        return content[start : start + image_bytes]

    def check(self) -> None:
        """See `ffcv_ops.sources.source.Reader`."""
        self._ranges.check()


def find_places(
    num_groups: int, pages_of: Callable[[int], tuple[int, "ColumnPages"]], stage: Stage
) -> np.ndarray | None:
    """Return the place of each image, by row, for `PlacedReader`: int64 (num_rows, SIZE_COLUMN + 1).

    The result is None if an image needs a whole large page.

    Parameters
    ----------
    num_groups : int
        The number of row groups.
    pages_of : callable
        Returns the number of the file and the pages of a row group.
    stage : callable

    Raises
    ------
    PageError
        If a page is damaged.
    """

    def list_group(number: int, count: Count) -> np.ndarray | None:
        file, pages = pages_of(number)
        places = np.empty((pages.num_rows, SIZE_COLUMN + 1), np.int64)
        for row in range(pages.num_rows):
            place = pages.place(row)
            if place is None:
                return None
            places[row] = file, *place
            count()
        return places

    found = list[np.ndarray]()
    for places in list_in_threads(range(num_groups), list_group, stage, _THREADS):
        if places is None:
            return None
        found.append(places)
    return np.concatenate(found)
