"""The allocation table of a file, kept compact and in the order of the file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ffcv_ops.beton.layout import ALLOC_TYPE
from ffcv_ops.errors import UserError


@dataclass(frozen=True, eq=False)
class AllocationTable:
    """The stored values of a file by ascending offset: 16 bytes each, where the file's own rows have 24.

    Attributes
    ----------
    ptrs : ndarray uint64 (R,)
        Offsets in the file. An empty value comes before the value that begins at the same offset.
    sizes : ndarray uint32 (R,)
        Bytes.
    sample_ids : ndarray uint32 or uint64 (R,)
        The sample of each value.
    """

    ptrs: np.ndarray
    sizes: np.ndarray
    sample_ids: np.ndarray

    @classmethod
    def empty(cls, length: int, num_samples: int) -> AllocationTable:
        """Return a table of `length` values whose arrays have yet to be filled."""
        id_type = np.uint32 if num_samples <= 1 << 32 else np.uint64
        return cls(np.empty(length, np.uint64), np.empty(length, np.uint32), np.empty(length, id_type))

    def in_order(self) -> AllocationTable:
        """Return the table by ascending offset; itself if it is in this order."""
        if np.all(self.ptrs[1:] > self.ptrs[:-1]):
            return self
        order = np.lexsort((self.sizes, self.ptrs))
        return AllocationTable(self.ptrs[order], self.sizes[order], self.sample_ids[order])

    def __len__(self) -> int:
        return len(self.ptrs)

    @property
    def nbytes(self) -> int:
        """The bytes of the table in the file."""
        return len(self) * ALLOC_TYPE.itemsize

    def find(self, ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each offset the row of the value that begins there, and whether there is one.

        Of an empty value and the value behind it, which begin at the same offset, this finds the latter.
        """
        if not len(self):
            return np.zeros(len(ptrs), np.int64), np.zeros(len(ptrs), np.bool_)
        rows = np.maximum(np.searchsorted(self.ptrs, ptrs, side="right") - 1, 0)
        return rows, self.ptrs[rows] == ptrs

    def sizes_at(self, ptrs: np.ndarray) -> np.ndarray:
        """Return the bytes, uint32 (N,), of the values at offsets, uint64 (N,).

        Raises
        ------
        UserError
            If no value begins at one of the offsets.
        """
        rows, known = self.find(ptrs)
        if not known.all():
            raise UserError(
                f"the allocation table has no region at byte {ptrs[~known][0]}: the file is damaged, write it again"
            )
        return self.sizes[rows]
