"""The base class of our operations, and the batch that they work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ffcv_ops import rng
from ffcv_ops._ffcv import Operation
from ffcv_ops.errors import UserError
from ffcv_ops.operations.threads import WorkerPool


class SampleError(UserError):
    """Samples that cannot be decoded.

    Parameters
    ----------
    failures : sequence of (int, str)
        One pair for each sample: the sample's id in the file, and the reason.
    file : str, optional
        The file of the samples. The loader sets it.
    """

    def __init__(self, failures: Sequence[tuple[int, str]], file: str | None = None):
        super().__init__(list(failures), file)
        self.failures = [(int(sample_id), message) for sample_id, message in failures]
        self.file = file

    def __str__(self) -> str:
        shown = "; ".join(f"sample {sample_id}: {message}" for sample_id, message in self.failures[:5])
        more = f"; and {len(self.failures) - 5} more" if len(self.failures) > 5 else ""
        return f"{self.file + ': ' if self.file else ''}{shown}{more}"


class Storage(Protocol):
    """The storage of the samples. A batch needs only this method of it."""

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for offsets in the file, uint64 (N,), the addresses in memory and the sizes; see `Batch.locate`."""


class Batch:
    """The batch that an operation works on.

    Parameters
    ----------
    seed, epoch : int
        The loader's seed and the number of the epoch.
    sample_ids : ndarray int (N,)
        Ids in the file; converted to int64.
    pool : WorkerPool
        The workers that `run` uses.
    storage : Storage
        The place of the samples.
    copies : ndarray int (N,), optional
        The number of each sample's copy under repeated augmentation, converted to int64. Zeros by default.

    Attributes
    ----------
    num_workers : int
        The number of workers. The ``worker`` of a kernel is below it, so scratch can have one entry for each worker.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        sample_ids: np.ndarray,
        pool: WorkerPool,
        storage: Storage,
        copies: np.ndarray | None = None,
    ):
        self.seed = int(seed)
        self.epoch = int(epoch)
        self.sample_ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
        self.copies = np.zeros_like(self.sample_ids) if copies is None else np.ascontiguousarray(copies, dtype=np.int64)
        self.num_workers = pool.num_workers
        self._pool = pool
        self._storage = storage

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the addresses of samples in memory, where the file is mapped or was read to.

        Parameters
        ----------
        data_ptrs : ndarray uint64 (N,)
            Offsets in the file, from the metadata of the field, of samples of this batch.

        Returns
        -------
        addresses : ndarray uint64 (N,)
            Absolute memory addresses. They are valid while the batch is being prepared.
        sizes_bytes : ndarray uint64 (N,)

        Raises
        ------
        UserError
            If the allocation table does not have an offset.
        """
        return self._storage.locate(data_ptrs)

    def draw_uniforms(self, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return random numbers for each sample of the batch; see `rng.draw_uniforms`."""
        return rng.draw_uniforms(self.seed, self.epoch, self.sample_ids, self.copies, stream, shape)

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        """Call ``kernel(worker, counter, *args)`` once on every worker; see `WorkerPool.run`.

        A kernel reads::

            while True:
                i = take(counter)
                if i >= len(sample_ids):
                    break
                ...
        """
        self._pool.run(kernel, *args)


class BatchOperation(Operation):
    """The base class of our operations. They stand in the same pipelines as FFCV's operations.

    The loader calls FFCV's method ``declare_state_and_memory`` at the start of every epoch. So a size may change
    between epochs. ``generate_code`` returns a Python callable, which the loader does not compile:

    - for a decoder ``fn(sample_ids, destination, field_metadata, batch)``,
    - for a transform ``fn(inputs, destination, batch)``.

    ``destination`` is the memory that the AllocationQuery asked for, cut to the size of the batch: a tuple for a tuple
    of queries, None without a query. ``batch`` is a `Batch`. The callable returns the array or tensor for the next
    operation. A decoder raises `SampleError` for samples that cannot be decoded.

    If the first operation of a pipeline that reads a field is one of ours, it is the decoder.
    """

    def close(self) -> None:
        """Free the memory of the workers. Called when the last loader of the operation is closed or collected."""
