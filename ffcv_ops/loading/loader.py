"""The loader: batches from a ``.beton`` file.

`Loader` is a drop-in for ``ffcv.loader.Loader`` and a subclass of it. It raises errors, frees threads and buffers, can
resume an epoch, and draws by functions of the seed. FFCV's pipelines, fields and operations are used as they are. The
epoch's thread, the orders, the reading of the file and the checks before it are ours.
"""

import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import (
    DEFAULT_OS_CACHE,
    Compiler,
    Graph,
    OpenedReader,
    OrderOption,
    OSCacheManager,
    PipelineSpec,
    ProcessCacheManager,
    StockLoader,
    TraversalOrder,
)
from ffcv_ops.beton.reading import Beton, read_beton
from ffcv_ops.cgroups import available_bytes
from ffcv_ops.errors import UserError
from ffcv_ops.files import size_of
from ffcv_ops.loading.arguments import allowed_workers, at_least, checked_ids, chosen_seed, pipeline_spec, topology
from ffcv_ops.loading.epoch import EpochIterator, EpochProducer
from ffcv_ops.loading.epoch_length import batches_per_rank
from ffcv_ops.loading.graph import Buffers, PipelineSteps
from ffcv_ops.loading.order import EpochOrder, build_order
from ffcv_ops.loading.read_ahead import ReadAhead, values_of
from ffcv_ops.loading.storage import (
    MappedEpoch,
    MappedFile,
    PagedFile,
    PageSchedule,
    open_for,
    paged_reader,
    schedule_pages,
)

_MIB = 1 << 20


class Loader(StockLoader):
    """Load batches from a .beton file; a drop-in for ``ffcv.loader.Loader``.

    A batch is a function of the arguments, the epoch's number and the file. It depends neither on the number of
    workers nor on the place where an epoch was resumed. Batches are in buffers that are used again when the consumer
    has dropped them. If it holds more than two batches, the loader returns copies from then on.

    Parameters
    ----------
    fname : path-like or Beton
        A .beton file, whose header and tables are checked at once. Or the result of `read_beton`, which is not read
        again.
    batch_size : int
        Samples in a batch of one rank.
    num_workers : int
        Threads, at most the CPUs that the process may use. Below 1: as many as these CPUs.
    os_cache : bool
        If True, the operating system caches the file. If False, pages are read ahead of their use into this process.
    order : OrderOption, TraversalOrder subclass or TraversalOrder
        The order of samples. A class is called as ``order(loader, **order_kwargs)``.
    distributed : bool
        Share the samples between ranks. With drop_last all ranks get equally many batches. Without it their samples
        are disjoint and complete, and the ranks may differ by a batch.
    seed : int, optional
        0 to 2**63 - 1, for the order and all draws. The default is 0 if distributed, else a number drawn by NumPy.
    indices : sequence of int, optional
        Ids of the samples to use; all by default.
    pipelines : mapping of str to sequence of operations
        As for FFCV: for a field's name its decoder and transforms, or None to leave the field out. Other fields get
        their default decoder.
    custom_fields : mapping of str to Field class
        As for FFCV.
    drop_last : bool
        Leave out the last batch if it is not full.
    batches_ahead : int
        The number of batches that are prepared in advance.
    recompile : bool
        Let FFCV's operations generate and compile their code again in each epoch.
    order_kwargs : mapping
        Arguments for a TraversalOrder class, or ``{"buffer_pages": n}`` for QUASI_RANDOM (64).
    rank, world_size : int, optional
        By default those of torch.distributed.
    repeats : int
        Repeated augmentation: the number of copies of a sample, with different draws, on neighbouring ranks. See
        `ffcv_ops.loading.order.repeated_order`.
    copy : bool
        Return copies from the first batch on. The attribute becomes True when the consumer collects batches.
    on_error : {"raise", "skip"}
        For a sample that cannot be decoded: raise `SampleError`, or replace the sample in all fields by another one,
        drawn by (seed, epoch, sample id, copy), and count it.

    Attributes
    ----------
    beton : Beton
        The file.
    next_epoch : int
        The epoch with which the next ``for`` over the loader begins.
    skipped : dict of int to str
        The bad samples so far under ``on_error="skip"``: for each id the reason.
    num_skipped : int
        The number of replacements in the batches returned so far.
    wait_s : float
        Seconds that the consumer waited for batches; see `take_wait_s`.
    storage_wait_s : float
        Seconds that the preparation of batches waited for storage, up to now. The consumer need not have waited then.

    Raises
    ------
    UserError
        If an argument or the file is wrong, or the order needs more memory than there is.
    """

    def __init__(
        self,
        fname: str | os.PathLike[str] | Beton,
        batch_size: int,
        num_workers: int = -1,
        os_cache: bool = DEFAULT_OS_CACHE,
        order: Any = OrderOption.SEQUENTIAL,
        distributed: bool = False,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        pipelines: Mapping[str, Any] = {},  # noqa: B006  as in FFCV; never written to
        custom_fields: Mapping[str, Any] = {},  # noqa: B006
        drop_last: bool = True,
        batches_ahead: int = 3,
        recompile: bool = False,
        order_kwargs: Mapping[str, Any] = {},  # noqa: B006
        *,
        rank: int | None = None,
        world_size: int | None = None,
        repeats: int = 1,
        copy: bool = False,
        on_error: str = "raise",
    ):
        self._args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.batches_ahead = at_least(1, "batches_ahead", batches_ahead)
        self.repeats = at_least(1, "repeats", repeats)
        self.num_workers = self._args["num_workers"] = allowed_workers(num_workers)
        self.os_cache = bool(os_cache)
        self.drop_last = drop_last
        self.recompile = recompile
        self.copy = copy
        if on_error not in ("raise", "skip"):
            raise UserError(f'on_error is {on_error!r}; it must be "raise" or "skip"')
        self.on_error = on_error
        self.rank, self.world_size = topology(distributed, rank, world_size)
        self.distributed = distributed or self.world_size > 1
        self.seed = self._args["seed"] = chosen_seed(seed, self.distributed, order)

        self.beton = fname if isinstance(fname, Beton) else read_beton(fname, custom_fields=custom_fields)
        self._args["fname"] = self.beton
        self.fname = os.fspath(self.beton.path)
        self.reader = OpenedReader(self.beton, custom_fields)
        self.indices = checked_ids(indices, self.beton)
        self.skipped: dict[int, str] = {}
        self.num_skipped = 0
        self.wait_s = 0.0
        self._storage_wait: tuple[float, float | None] = (0.0, None)
        self.next_epoch = 0
        self._spare: Buffers | None = None
        self._producers: weakref.WeakSet[EpochProducer] = weakref.WeakSet()
        self._closed = False
        self._stock_memory_manager: Any = None

        self._mapped = MappedFile(self.fname, self.beton.allocations) if self.os_cache else None
        self._file = self._mapped.file if self._mapped else open_for(self, self.fname)
        status = os.fstat(self._file)
        if (status.st_size, int(status.st_mtime)) != (self.beton.size_bytes, self.beton.modified_s):
            raise UserError(f"{self.fname}: it was replaced or changed after its tables were read: read it again")
        self._build_pipelines(pipelines)
        self.traversal_order = build_order(self, order, order_kwargs)
        self._num_samples = self._count_samples()
        if len(self) == 0 and drop_last:
            warnings.warn(
                f"{self.fname}: no batch: this rank has {self._num_samples} samples an epoch, "
                f"a batch is {batch_size} and drop_last leaves out what does not fill one",
                stacklevel=2,
            )
        if not self.os_cache:
            self._check_memory(self._schedule(self._draw(0)[0]))

    # ------------------------------------------------------------------ construction

    def _build_pipelines(self, pipelines: Mapping[str, Any]) -> None:
        """Make FFCV's graph of the pipelines, and the steps that run it."""
        specs = {
            name: pipeline_spec(name, spec, self.reader.handlers)
            for name, spec in pipelines.items()
            if spec is not None
        }
        self.field_name_to_f_ix = {name: column for column, name in enumerate(self.reader.handlers)}
        self.pipeline_specs = {
            name: specs.pop(name, None) or PipelineSpec(name)
            for name in self.reader.handlers
            if pipelines.get(name, ()) is not None
        }
        self.pipeline_specs.update(specs)
        reader = self._mapped.reader() if self._mapped else paged_reader(self.beton.page_size)
        memory_read = Compiler.compile(reader)  # Numba compiles it at the first call, by a decoder of FFCV
        self.graph = Graph(
            self.pipeline_specs, self.reader.handlers, self.field_name_to_f_ix, self.reader.metadata, memory_read
        )
        self._steps = PipelineSteps(self.graph)
        self._steps.declare()
        columns = sorted({f"f{step.column}" for step in self._steps.steps})
        self._values_of = values_of(self.reader.metadata, columns, self.beton.allocations)
        self.generate_code()
        if self.on_error == "skip" and not self.os_cache:
            self._refuse_unscheduled_reads()

    def _refuse_unscheduled_reads(self) -> None:
        """Refuse FFCV's decoders, which find only pages that were scheduled. The pages of replacements are not."""
        for step in self._steps.steps:
            if step.reads_stock_state:
                raise UserError(
                    f'{type(step.operation).__name__} cannot replace samples (on_error="skip") with os_cache=False: '
                    "use a decoder of ffcv_ops, or os_cache=True"
                )

    @property
    def memory_manager(self) -> Any:
        """FFCV's memory manager, for orders that were written for it. The loader itself does not use it."""
        if self._stock_memory_manager is None:
            manager = OSCacheManager if self.os_cache else ProcessCacheManager
            self._stock_memory_manager = manager(self.reader)
        return self._stock_memory_manager

    def generate_code(self) -> None:
        """Ask all operations for their code, and FFCV to compile its own."""
        if self._steps.is_compiled:
            Compiler.num_threads = self.num_workers
        self._steps.generate_code(only_ours=False)

    @property
    def code(self) -> list[tuple[int, Callable[..., Any]]]:
        """The functions of FFCV's operations. They change between epochs only if `recompile` is set."""
        return [(step.node_id, step.code) for step in self._steps.steps if not step.is_ours]

    # ------------------------------------------------------------------ epochs

    def __len__(self) -> int:
        return self._num_batches(self._num_samples)

    def _count_samples(self) -> int:
        """Return how many samples this rank sees in an epoch. An order of the user has to be drawn to know that."""
        order = self.traversal_order
        return order.num_samples() if isinstance(order, EpochOrder) else len(self._draw(0)[0])

    @property
    def first_traversal_order(self) -> np.ndarray:
        """The order of epoch 0, drawn again at every access; ``ffcv.loader.Loader`` keeps it."""
        return self._draw(0)[0]

    def _num_batches(self, num_samples: int) -> int:
        return batches_per_rank(num_samples, self.batch_size, drop_last=self.drop_last)

    def __iter__(self) -> EpochIterator:
        return self.epoch(self.next_epoch)

    def epoch(self, epoch: int, skip: int = 0, *, skip_samples: int | None = None) -> EpochIterator:
        """Return the batches of an epoch, from the skip-th on.

        Parameters
        ----------
        epoch : int
            From 0. A ``for`` over the loader itself continues with the next epoch.
        skip : int
            The number of batches to leave out. The others are the same as in an uninterrupted epoch.
        skip_samples : int, optional
            Instead of `skip`, the number of this rank's samples to leave out. Batches are made of the others, so an
            epoch can continue with another batch size.

        Returns
        -------
        EpochIterator

        Raises
        ------
        UserError
            If the epoch has fewer batches than `skip` or fewer samples than `skip_samples`, or the size of the file has
            changed.
        ReadError
            If storage does not give the size of the file.
        ValueError
            If the loader is closed.
        """
        if self._closed:
            raise ValueError(f"{self.fname}: the loader is closed")
        ids, copies = self._draw(at_least(0, "epoch", epoch))
        num_batches = self._num_batches(len(ids))
        if not 0 <= skip <= num_batches:
            raise UserError(f"skip is {skip}; epoch {epoch} has {num_batches} batches")
        start = skip * self.batch_size
        if skip_samples is not None:
            if skip:
                raise UserError(f"skip is {skip} and skip_samples is {skip_samples}: pass only one of them")
            if not 0 <= skip_samples <= len(ids):
                raise UserError(f"skip_samples is {skip_samples}; this rank has {len(ids)} samples in epoch {epoch}")
            start = skip_samples
        if size_of(self.fname) != self.beton.size_bytes:
            raise UserError(f"{self.fname}: its size has changed since the loader was made: it was replaced or cut")
        for producer in list(self._producers):
            if producer.stopping:  # wait until it has given its buffers back, or new ones would be made
                producer.thread.join()
        self._steps.declare()
        if self.recompile:
            self.generate_code()
        else:
            # For our operations this costs nothing, and a size may change between epochs.
            self._steps.generate_code(only_ours=True)
        self.next_epoch = epoch + 1
        part = slice(start, min(len(ids), start + self._num_batches(len(ids) - start) * self.batch_size))
        producer = EpochProducer(self, epoch, ids[part], None if copies is None else copies[part])
        self._producers.add(producer)
        return EpochIterator(producer)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return sample ids and copies of an epoch; for the copies None if all are 0."""
        if isinstance(self.traversal_order, EpochOrder):
            return self.traversal_order.draw(epoch)
        return checked_ids(self.traversal_order.sample_order(epoch), self.beton, "the traversal order"), None

    def next_traversal_order(self) -> np.ndarray:
        """Return the sample ids of the next epoch, int64, including a last batch that is left out."""
        return self._draw(self.next_epoch)[0].astype(np.int64)

    def _schedule(self, ids: np.ndarray) -> PageSchedule:
        """Return the schedule of the pages of an epoch."""
        end = min(len(ids), self._num_batches(len(ids)) * self.batch_size)
        batches = [ids[start : start + self.batch_size] for start in range(0, end, self.batch_size)]
        return schedule_pages(self.beton.allocations, self.beton.page_size, batches)

    def _take_buffers(self) -> Buffers:
        """Return the last epoch's buffers if they fit and no other epoch has them, else new ones."""
        spare, self._spare = self._spare, None
        wanted = (self._steps, self.batch_size, self.batches_ahead + 3)
        if spare is not None and spare.key == Buffers.key_of(*wanted):
            return spare
        del spare  # free its memory first
        # The consumer may be in inference mode. The loader's thread could not write into tensors that were made in it.
        with torch.inference_mode(False):
            return Buffers(*wanted)

    def _open_storage(self, ids: np.ndarray, buffers: Buffers) -> MappedEpoch | PagedFile:
        if self._mapped is not None:
            size, values = self.batch_size, self._values_of
            read_ahead = ReadAhead(
                self._file,
                self.fname,
                lambda number: values(ids[number * size : (number + 1) * size]),
                self._num_batches(len(ids)),
            )
            return MappedEpoch(self._mapped, read_ahead)
        page_size = self.beton.page_size
        schedule = self._schedule(ids)
        if len(buffers.pages) < schedule.num_slots:
            buffers.pages = np.empty((0, 0), dtype=np.uint8)
            self._check_memory(schedule)
            buffers.pages = np.empty((schedule.num_slots, page_size), dtype=np.uint8)
        return PagedFile(self.fname, self._file, self.beton.allocations, page_size, schedule, buffers.pages)

    def _check_memory(self, schedule: PageSchedule) -> None:
        needed, available = schedule.num_slots * self.beton.page_size, available_bytes()
        if needed > available:
            raise UserError(
                f"{self.fname}: os_cache=False with this order holds {schedule.num_slots} pages at a time, "
                f"{needed // _MIB:,} MiB of memory, and {available // _MIB:,} MiB are available: use "
                "order=OrderOption.QUASI_RANDOM (if it is already, less buffer_pages in order_kwargs), or os_cache=True"
            )

    # ------------------------------------------------------------------ the rest

    @property
    def storage_wait_s(self) -> float:
        """Return the seconds that the preparation of batches waited for storage, with the wait that is not over."""
        total_s, since_s = self._storage_wait
        return total_s if since_s is None else total_s + time.perf_counter() - since_s

    def take_wait_s(self) -> float:
        """Return the seconds that the consumer has waited for batches since the last call."""
        waited, self.wait_s = self.wait_s, 0.0
        return waited

    def filter(self, field_name: str, condition: Callable[[Any], bool]) -> "Loader":
        """Return a loader of the samples for which the result of a field's pipeline meets a condition.

        Raises
        ------
        UserError
            If the field has no pipeline, or the order is an instance, which knows only the samples of this loader.
        """
        if field_name not in self.pipeline_specs:
            raise UserError(f"filter: no pipeline is named {field_name}; there are {', '.join(self.pipeline_specs)}")
        if isinstance(self._args["order"], TraversalOrder):
            raise UserError("filter: an order that is an instance is of this loader's samples; give its class instead")
        others: dict[str, Any] = {name: None for name in self.reader.handlers if name != field_name}
        if field_name in self._args["pipelines"]:
            others[field_name] = self._args["pipelines"][field_name]
        scan = {
            "pipelines": others,
            "indices": self.indices,
            "order": OrderOption.SEQUENTIAL,
            "order_kwargs": {},
            "drop_last": False,
            "distributed": False,
            "rank": None,
            "world_size": None,
            "repeats": 1,
            "on_error": "raise",
        }
        kept: list[bool] = []
        with type(self)(**{**self._args, **scan}) as values:
            for (batch,) in values:
                kept.extend(bool(condition(value)) for value in batch)
        return type(self)(**{**self._args, "indices": self.indices[np.array(kept, dtype=bool)]})

    def close(self) -> None:
        """End epochs in progress, wait for their threads, and free buffers and the memory of operations."""
        self._closed = True
        for producer in list(self._producers):
            producer.stop()
            producer.thread.join()
        self._spare = None
        self._steps.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
