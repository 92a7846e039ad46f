"""Loader: FFCV's, with errors raised, threads and buffers freed, epochs resumable, and draws that are functions.

A drop-in for ``ffcv.loader.Loader`` and a subclass of it. FFCV's pipelines, fields and operations are used as they are;
the epoch's thread, the orders, the reading of the file and the checks before it are ours.
"""

import atexit
import itertools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numba as nb
import numpy as np
import torch
from numba.core import config

from ffcv_ops import rng
from ffcv_ops._ffcv import (
    DEFAULT_OS_CACHE,
    Compiler,
    Graph,
    OrderOption,
    OSCacheManager,
    PipelineSpec,
    ProcessCacheManager,
    Reader,
    StockLoader,
    TraversalOrder,
)
from ffcv_ops.beton.layout import Beton, read_beton
from ffcv_ops.loading.epoch_length import batches_per_rank
from ffcv_ops.loading.graph import Buffers, Plan
from ffcv_ops.loading.order import EpochOrder, QuasiRandom, Random, Repeated, Sequential
from ffcv_ops.loading.storage import MappedFile, PagedFile, Regions, available_bytes, paged_reader, plan_pages
from ffcv_ops.machine import allowed_cpus
from ffcv_ops.operations.base import Batch, BatchOperation, SampleError, WorkerPool

_MIB = 1 << 20
# How often replacements of one batch may turn out bad, and how many draws look for a good one among few samples.
_MAX_ROUNDS = 50
_MAX_DRAWS = 1000


@dataclass
class _Prepared:
    """One batch on its way to the consumer."""

    slot: int
    result: tuple
    num_replaced: int


class _Run:
    """One epoch in progress: what its thread and its iterator share."""

    def __init__(self, loader: "Loader", epoch: int, ids: np.ndarray, copies: np.ndarray, skip: int):
        size = loader.batch_size
        self.loader = loader
        self.epoch = epoch
        starts = range(skip * size, len(ids), size)
        self.batches = [ids[start : start + size] for start in starts]
        self.copies = [copies[start : start + size] for start in starts]
        self.stopping = False
        self._num_done = itertools.count()
        self.ready: SimpleQueue = SimpleQueue()
        self.free: SimpleQueue = SimpleQueue()
        self.pool = WorkerPool(loader.num_workers)
        self.buffers = loader._take_buffers()
        try:
            self.memory = loader._open_memory(self.batches, self.buffers)
        except BaseException:
            loader._spare = self.buffers
            raise
        # Whatever the consumer has queued on the last epoch's batches comes before anything written over them.
        released = self.buffers.now()
        for slot in range(self.buffers.num_slots):
            self.free.put((slot, released))
        self.thread = threading.Thread(target=self._produce, name=f"ffcv_ops epoch {epoch}", daemon=True)

    def stop(self) -> None:
        """Make the thread end soon; does not wait, since garbage collection may call it in any thread."""
        self.stopping = True
        self.pool.stop()
        self.memory.stop()
        self.free.put(None)

    def leave(self) -> None:
        """Stop, for the consumer needs no more batches; to be called once."""
        self.stop()
        self._done_with_buffers()

    def _done_with_buffers(self) -> None:
        """Give the buffers back when thread and consumer, who call this once each, are both done with them."""
        if next(self._num_done) == 1 and not self.loader._closed:
            self.loader._spare = self.buffers

    def _produce(self) -> None:
        """Prepare all batches, hand them to the consumer, and end with None or the exception that was raised."""
        last: BaseException | None = None
        try:
            if self.loader._plan.is_compiled:
                nb.set_num_threads(min(self.loader.num_workers, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            for number in range(len(self.batches)):
                slot_and_event = self.free.get()
                if slot_and_event is None or self.stopping:
                    break
                self.ready.put(self._prepare(number, *slot_and_event))
        except BaseException as error:  # the consumer raises it, whatever it is
            last = error
        try:
            self.pool.close()
            self.memory.close()
            self.buffers.finish()
        except BaseException as error:
            last = last or error
        self._done_with_buffers()
        self.ready.put(last)
        del last  # this frame is in its traceback: a cycle that would keep the buffers until it is collected

    def _prepare(self, number: int, slot: int, released: Any) -> _Prepared:
        if released is not None:
            # Host memory of the slot is written next, so the host waits for the copies out of it, not just the stream.
            released.synchronize()
        self.memory.begin_batch(number)
        with self.buffers.on_stream(slot):
            ids, result = self._run_until_good(self.batches[number], self.copies[number], slot)
            if self.loader.copy:
                result = tuple(_copied(part) for part in result)
        return _Prepared(slot, result, int(np.count_nonzero(ids != self.batches[number])))

    def _run_until_good(self, wanted: np.ndarray, copies: np.ndarray, slot: int) -> tuple[np.ndarray, tuple]:
        """Run the pipelines, under ``on_error="skip"`` until no sample of the batch is a bad one.

        What is known of earlier batches is of no account: whether a sample is bad may depend on which part of it is
        decoded, and a resumed epoch must make the same choices.
        """
        loader = self.loader
        bad: dict[int, str] = {}
        for attempt in range(1, _MAX_ROUNDS + 1):
            ids = loader._without_bad(wanted, copies, self.epoch, bad) if bad else wanted
            batch = Batch(loader.seed, self.epoch, ids, self.pool, self.memory, copies)
            try:
                result = loader._plan.run(batch, self.buffers, slot, self.memory.storage_state)
                self.memory.check()
                return ids, result
            except SampleError as error:
                self.memory.check()  # first: what is not there any more is no sample's fault
                error.file = loader.fname
                if loader.on_error == "raise" or attempt == _MAX_ROUNDS or bad.keys() >= dict(error.failures).keys():
                    raise
                bad.update(error.failures)
                loader.skipped.update(error.failures)
        raise AssertionError("the last attempt returns or raises")


def _copied(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.clone()
    return part.copy() if isinstance(part, np.ndarray) else part


def _keep_for_this_stream(result: tuple) -> None:
    """Copies belong to a slot's stream: its next ones must not get their memory before the current stream is done."""
    for part in result:
        if isinstance(part, torch.Tensor) and part.is_cuda:
            part.record_stream(torch.cuda.current_stream(part.device))


_runs: "weakref.WeakSet[_Run]" = weakref.WeakSet()


def _stop_all() -> None:
    """Before the interpreter goes: a daemon thread inside a kernel would outlive what the kernel uses."""
    runs = list(_runs)
    for run in runs:
        run.stop()
    for run in runs:
        run.thread.join(timeout=10)


atexit.register(_stop_all)


class EpochIterator(Iterator):
    """The batches of one epoch; made by `Loader.epoch`.

    Leaving it, by ``break``, by an exception, by dropping the last reference, ends its threads; `close` also waits for
    them. ``len()`` is the number of batches from the start of this iterator, those already seen included.
    """

    def __init__(self, run: _Run):
        self._run = run
        self._slot: int | None = None
        self._finished = False
        self._num_replaced = 0
        self._finalizer = weakref.finalize(self, run.leave)
        self._finalizer.atexit = False
        _runs.add(run)
        run.thread.start()

    def __len__(self) -> int:
        return len(self._run.batches)

    def __iter__(self) -> "EpochIterator":
        return self

    def __next__(self) -> tuple:
        if self._finished:
            raise StopIteration
        run = self._run
        if self._slot is not None:
            # By asking for the next batch the consumer says that all work on this one is queued.
            run.free.put((self._slot, run.buffers.now()))
            self._slot = None
        started = time.perf_counter()
        prepared = self._wait()
        run.loader.wait_s += time.perf_counter() - started
        if not isinstance(prepared, _Prepared):
            self.close()
            if prepared is None:
                if self._num_replaced:
                    warnings.warn(
                        f"{run.loader.fname}: epoch {run.epoch}: others stood in for samples that cannot be decoded, "
                        f"{self._num_replaced} times; loader.skipped tells which and why",
                        stacklevel=2,
                    )
                raise StopIteration
            try:
                if isinstance(prepared, StopIteration):  # which would pass for the end
                    raise RuntimeError("an operation raised StopIteration, see above") from prepared
                raise prepared
            finally:
                del prepared  # its traceback holds this frame
        self._slot = prepared.slot
        self._num_replaced += prepared.num_replaced
        run.loader.num_skipped += prepared.num_replaced
        run.buffers.join(prepared.slot)
        if run.loader.copy:
            _keep_for_this_stream(prepared.result)
        return prepared.result

    def _wait(self) -> _Prepared | BaseException | None:
        while True:
            try:
                return self._run.ready.get(timeout=5)
            except Empty:
                if not self._run.thread.is_alive() and self._run.ready.empty():
                    raise RuntimeError(
                        "the loader's thread is gone: was this process forked during an epoch?"
                    ) from None

    def close(self) -> None:
        """End the epoch and wait for its threads; further batches are not returned."""
        self._finished = True
        self._finalizer()
        self._run.thread.join()


class Loader(StockLoader):
    """Load batches from a .beton file; a drop-in for ``ffcv.loader.Loader``.

    What a batch is depends on the arguments, the epoch's number and the file alone: not on the number of workers, nor
    on where an epoch was resumed. Batches live in buffers that are written again: a batch is valid until the next is
    asked for.

    Parameters
    ----------
    fname : path-like
        A .beton file; its header and tables are checked at once.
    batch_size : int
        Samples a batch, on each rank.
    num_workers : int
        Threads. Below 1: as many as CPUs are allowed to the process, which is also the most.
    os_cache : bool
        Leave the caching of the file to the operating system; else read pages ahead of their use into this process.
    order : OrderOption, TraversalOrder subclass or TraversalOrder
        The order of samples. A class is called as ``order(loader, **order_kwargs)``.
    distributed : bool
        Share the samples between ranks: with drop_last equally many batches each, without it disjoint samples that
        together are all, each once (ranks may then differ by a batch).
    seed : int, optional
        0 to 2**63 - 1, for the order and all draws. When not given: 0 if distributed, else drawn by NumPy.
    indices : sequence of int, optional
        Ids of the samples to use; all by default.
    pipelines : mapping of str to sequence of operations
        As for FFCV: field name -> decoder and transforms, None to leave a field out; the default decoder for others.
    custom_fields : mapping of str to Field class
        As for FFCV.
    drop_last : bool
        Leave out the last batch if it is not full.
    batches_ahead : int
        Batches prepared in advance.
    recompile : bool
        Have FFCV's operations generate and compile their code anew each epoch.
    order_kwargs : mapping
        For a TraversalOrder class, or ``{"buffer_pages": n}`` for QUASI_RANDOM (64).
    rank, world_size : int, optional
        Instead of those of torch.distributed.
    repeats : int
        Repeated augmentation: copies of a sample, with different draws, on neighbouring ranks; see
        `ffcv_ops.loading.order.repeated_order`.
    copy : bool
        Return batches that may be kept.
    on_error : {"raise", "skip"}
        What a sample that cannot be decoded does: raise `SampleError`, or be replaced by another, drawn by (seed,
        epoch, sample id), in all fields, and be counted.

    Attributes
    ----------
    beton : Beton
        The file.
    skipped : dict of int to str
        Bad samples met so far under ``on_error="skip"``: id -> what is wrong.
    num_skipped : int
        How many places in the batches returned so far were filled by replacements.
    wait_s : float
        Seconds that the consumer waited for batches; see `take_wait_s`.

    Raises
    ------
    ValueError
        When an argument or the file is wrong, or the order needs more memory than there is.
    """

    def __init__(
        self,
        fname: str | os.PathLike[str],
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
        self.fname = os.fspath(fname)
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.batches_ahead = _at_least(1, "batches_ahead", batches_ahead)
        self.repeats = _at_least(1, "repeats", repeats)
        self.num_workers = self._args["num_workers"] = _allowed_workers(num_workers)
        self.os_cache = bool(os_cache)
        self.drop_last = drop_last
        self.recompile = recompile
        self.copy = copy
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error is {on_error!r}; it must be "raise" or "skip"')
        self.on_error = on_error
        self.rank, self.world_size = _topology(distributed, rank, world_size)
        self.distributed = distributed or self.world_size > 1
        self.seed = self._args["seed"] = _chosen_seed(seed, self.distributed, order)

        self.beton: Beton = read_beton(fname, custom_fields=custom_fields)
        self.reader = Reader(self.fname, custom_fields)
        self.indices = _checked_ids(indices, self.beton)
        self.skipped: dict[int, str] = {}
        self.num_skipped = 0
        self.wait_s = 0.0
        self.next_epoch = 0
        self._spare: Buffers | None = None
        self._runs: weakref.WeakSet[_Run] = weakref.WeakSet()
        self._closed = False
        self._stock_memory_manager: Any = None

        self._memory: MappedFile | None = MappedFile(fname, self.beton.alloc_table) if self.os_cache else None
        self._regions = self._memory.regions if self._memory else Regions.of(self.beton.alloc_table)
        self._build_pipelines(pipelines)
        self.traversal_order = self._build_order(order, order_kwargs)
        self._num_samples = self._count_samples()
        if len(self) == 0 and drop_last:
            warnings.warn(
                f"{self.fname}: no batch: this rank has {self._num_samples} samples an epoch, "
                f"a batch is {batch_size} and drop_last leaves out what does not fill one",
                stacklevel=2,
            )
        if not self.os_cache:
            self._check_memory(
                plan_pages(self._regions, self.beton.page_size, self._batches_of(self.next_traversal_order()))
            )

    # ------------------------------------------------------------------ construction

    def _build_pipelines(self, pipelines: Mapping[str, Any]) -> None:
        """Make FFCV's graph of the pipelines, and our plan of how it runs."""
        specs = {
            name: _specification(name, spec, self.reader.handlers)
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
        reader = self._memory.reader() if self._memory else paged_reader(self.beton.page_size)
        memory_read = Compiler.compile(reader)  # lazily: only if a decoder of FFCV calls it
        self.graph = Graph(
            self.pipeline_specs, self.reader.handlers, self.field_name_to_f_ix, self.reader.metadata, memory_read
        )
        self._plan = Plan(self.graph)
        self._plan.declare()
        self.generate_code()
        if self.on_error == "skip" and not self.os_cache:
            self._refuse_unplanned_reads()

    def _refuse_unplanned_reads(self) -> None:
        """FFCV's decoders find only the pages that were planned; a replacement's are not."""
        for step in self._plan.steps:
            if step.is_decoder and not step.is_ours and not step.is_number:
                raise ValueError(
                    f'{type(step.operation).__name__} cannot replace samples (on_error="skip") with os_cache=False: '
                    "use a decoder of ffcv_ops, or os_cache=True"
                )

    def _build_order(self, order: Any, order_kwargs: Mapping[str, Any]) -> TraversalOrder:
        if self.repeats > 1:
            if order not in (OrderOption.SEQUENTIAL, OrderOption.RANDOM) or not self.drop_last:
                raise ValueError("repeats need the order SEQUENTIAL or RANDOM, and drop_last=True")
            return Repeated(self, shuffle=order == OrderOption.RANDOM)
        ours = {OrderOption.SEQUENTIAL: Sequential, OrderOption.RANDOM: Random, OrderOption.QUASI_RANDOM: QuasiRandom}
        if isinstance(order, OrderOption):
            return ours[order](self, **order_kwargs)
        if isinstance(order, type) and issubclass(order, TraversalOrder):
            return order(self, **order_kwargs)
        if isinstance(order, TraversalOrder):
            if not hasattr(order, "loader"):
                TraversalOrder.__init__(order, self)
            return order
        raise ValueError(f"order is {order!r}; it must be an OrderOption, or a TraversalOrder, class or instance")

    @property
    def memory_manager(self) -> Any:
        """FFCV's memory manager, for orders that were written for it; the loader itself has no use for one."""
        if self._stock_memory_manager is None:
            manager = OSCacheManager if self.os_cache else ProcessCacheManager
            self._stock_memory_manager = manager(self.reader)
        return self._stock_memory_manager

    def generate_code(self) -> None:
        """Ask all operations for their code, and FFCV to compile its own."""
        if self._plan.is_compiled:
            Compiler.num_threads = self.num_workers
        self._plan.generate_code(only_ours=False)

    @property
    def code(self) -> list[tuple[int, Callable[..., Any]]]:
        """The functions of FFCV's operations, which stay the same between epochs unless `recompile` is set."""
        return [(step.node_id, step.code) for step in self._plan.steps if not step.is_ours]

    # ------------------------------------------------------------------ epochs

    def __len__(self) -> int:
        return self._num_batches(self._num_samples)

    def _count_samples(self) -> int:
        """Return how many samples this rank sees in an epoch. Only an order of the user has to be drawn for that."""
        order = self.traversal_order
        return order.num_samples() if isinstance(order, EpochOrder) else len(self.next_traversal_order())

    @property
    def first_traversal_order(self) -> np.ndarray:
        """Draw the order of epoch 0, as ``ffcv.loader.Loader`` keeps it."""
        return self._draw(0)[0]

    def _num_batches(self, num_samples: int) -> int:
        return batches_per_rank(num_samples, self.batch_size, drop_last=self.drop_last)

    def __iter__(self) -> EpochIterator:
        return self.epoch(self.next_epoch)

    def epoch(self, epoch: int, skip: int = 0) -> EpochIterator:
        """Return the batches of an epoch, from the skip-th on.

        Parameters
        ----------
        epoch : int
            From 0. A ``for`` over the loader itself goes on with the epoch after this.
        skip : int
            Batches already done; the rest is what an uninterrupted epoch would have returned.

        Returns
        -------
        EpochIterator
        """
        if self._closed:
            raise ValueError(f"{self.fname}: the loader is closed")
        ids, copies = self._draw(_at_least(0, "epoch", epoch))
        num_batches = self._num_batches(len(ids))
        if not 0 <= skip <= num_batches:
            raise ValueError(f"skip is {skip}; epoch {epoch} has {num_batches} batches")
        if os.stat(self.fname).st_size != self.beton.size_bytes:
            raise ValueError(f"{self.fname}: its size has changed since the loader was made: it was replaced or cut")
        for run in list(self._runs):
            if run.stopping:  # so that its buffers come back before others are made
                run.thread.join()
        self._plan.declare()
        if self.recompile:
            self.generate_code()
        else:
            # Ours only bind kernels and sizes, which costs nothing and lets both change between epochs.
            self._plan.generate_code(only_ours=True)
        self.next_epoch = epoch + 1
        end = min(len(ids), num_batches * self.batch_size)
        run = _Run(self, epoch, ids[:end], copies[:end], skip)
        self._runs.add(run)
        return EpochIterator(run)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sample ids and copies of an epoch."""
        if isinstance(self.traversal_order, EpochOrder):
            ids, copies = self.traversal_order.draw(epoch)
        else:
            ids = _checked_ids(self.traversal_order.sample_order(epoch), self.beton, "the traversal order")
            copies = None
        return ids, np.zeros(len(ids), dtype=np.int64) if copies is None else copies

    def next_traversal_order(self) -> np.ndarray:
        """Return the sample ids of the next epoch, before the last batch is left out."""
        return self._draw(self.next_epoch)[0]

    def _batches_of(self, ids: np.ndarray) -> list[np.ndarray]:
        end = self._num_batches(len(ids)) * self.batch_size
        return [ids[start : start + self.batch_size] for start in range(0, min(end, len(ids)), self.batch_size)]

    def _take_buffers(self) -> Buffers:
        """Take the last epoch's buffers if they fit and no other epoch has them, else make new ones."""
        spare, self._spare = self._spare, None
        wanted = (self._plan, self.batch_size, self.batches_ahead + 2)
        if spare is not None and spare.key == Buffers.key_of(*wanted):
            return spare
        del spare  # before others are made
        # Made under the consumer's inference mode, tensors could not be written in the loader's thread.
        with torch.inference_mode(False):
            return Buffers(*wanted)

    def _open_memory(self, batches: Sequence[np.ndarray], buffers: Buffers) -> MappedFile | PagedFile:
        if self._memory is not None:
            return self._memory
        page_size = self.beton.page_size
        schedule = plan_pages(self._regions, page_size, batches)
        if len(buffers.pages) < schedule.num_slots:
            buffers.pages = np.empty((0, 0), dtype=np.uint8)
            self._check_memory(schedule)
            buffers.pages = np.empty((schedule.num_slots, page_size), dtype=np.uint8)
        return PagedFile(self.fname, self._regions, page_size, schedule, buffers.pages)

    def _check_memory(self, schedule: Any) -> None:
        needed, available = schedule.num_slots * self.beton.page_size, available_bytes()
        if needed > available:
            raise ValueError(
                f"{self.fname}: os_cache=False with this order holds {schedule.num_slots} pages at a time, "
                f"{needed // _MIB:,} MiB of memory, and {available // _MIB:,} MiB are available: use "
                "order=OrderOption.QUASI_RANDOM (if it is already, less buffer_pages in order_kwargs), or os_cache=True"
            )

    def _without_bad(self, ids: np.ndarray, copies: np.ndarray, epoch: int, bad: Mapping[int, str]) -> np.ndarray:
        """Replace bad samples by the first good one of the draws of (seed, epoch, sample id, copy)."""
        ids = ids.copy()
        for i in np.flatnonzero(np.isin(ids, list(bad))):
            ids[i] = self._replacement(int(ids[i]), int(copies[i]), epoch, bad)
        return ids

    def _replacement(self, sample_id: int, copy: int, epoch: int, bad: Mapping[int, str]) -> int:
        for draw in range(_MAX_DRAWS):
            uniform = rng.uniform(self.seed, epoch, sample_id, copy, rng.REPLACEMENT, draw)
            candidate = int(self.indices[int(uniform * len(self.indices))])
            if candidate not in bad:
                return candidate
        raise SampleError([(sample_id, f"{bad[sample_id]}; no good sample to replace it was found")], self.fname)

    # ------------------------------------------------------------------ the rest

    def take_wait_s(self) -> float:
        """Return the seconds the consumer waited for batches since the last call of this."""
        waited, self.wait_s = self.wait_s, 0.0
        return waited

    def filter(self, field_name: str, condition: Callable[[Any], bool]) -> "Loader":
        """Return a loader of the samples whose value of a field, as its pipeline gives it, meets a condition.

        Raises
        ------
        ValueError
            A field without a pipeline, or an order given as an instance, which knows this loader's samples alone.
        """
        if field_name not in self.pipeline_specs:
            raise ValueError(f"filter: no pipeline is named {field_name}; there are {', '.join(self.pipeline_specs)}")
        if isinstance(self._args["order"], TraversalOrder):
            raise ValueError("filter: an order that is an instance is of this loader's samples; give its class instead")
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
        """End epochs in progress, wait for their threads, and free buffers and what the operations hold."""
        self._closed = True
        for run in list(self._runs):
            run.stop()
            run.thread.join()
        self._spare = None
        self._plan.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _at_least(least: int, name: str, value: int) -> int:
    if int(value) != value or value < least:
        raise ValueError(f"{name} is {value}; it must be a whole number of at least {least}")
    return int(value)


def _allowed_workers(num_workers: int) -> int:
    allowed = allowed_cpus()
    if num_workers > allowed:
        warnings.warn(
            f"num_workers is {num_workers}; {allowed} CPUs are allowed to this process, using {allowed}", stacklevel=3
        )
    return allowed if num_workers < 1 else min(int(num_workers), allowed)


def _topology(distributed: bool, rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size go together: give both or neither")
    if rank is None or world_size is None:
        if not distributed:
            return 0, 1
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                "distributed=True needs torch.distributed.init_process_group before, or rank and world_size"
            )
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}; ranks go from 0 to world_size - 1")
    return rank, world_size


def _chosen_seed(seed: int | None, distributed: bool, order: Any) -> int:
    if seed is None:
        if not distributed:
            return int(np.random.randint(0, np.iinfo("int32").max))
        if order != OrderOption.SEQUENTIAL:
            warnings.warn("no seed was given with distributed=True: using 0 on all ranks", stacklevel=3)
        return 0
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2**63 - 1")
    return int(seed)


def _checked_ids(indices: Any, beton: Beton, name: str = "indices") -> np.ndarray:
    """Return sample ids as int64, having checked that the file has them."""
    if indices is None:
        return np.arange(beton.num_samples, dtype=np.int64)
    given = np.asarray(indices)
    if given.ndim != 1 or not (np.issubdtype(given.dtype, np.integer) or given.size == 0):
        raise ValueError(f"{name}: expected a sequence of sample ids, got {given.dtype} of shape {given.shape}")
    ids = given.astype(np.int64)
    outside = (ids < 0) | (ids >= beton.num_samples)
    if outside.any():
        raise ValueError(
            f"{name}: sample {ids[outside][0]} is not in {beton.path}, which has {beton.num_samples} samples"
        )
    return ids


def _specification(name: str, pipeline: Any, handlers: Mapping[str, Any]) -> PipelineSpec:
    """Copy a pipeline as the user gave it (FFCV takes decoders out of the list), with our decoder in its place."""
    if isinstance(pipeline, PipelineSpec):
        spec = PipelineSpec(pipeline.source, pipeline.decoder, list(pipeline.transforms))
    elif isinstance(pipeline, Sequence):
        spec = PipelineSpec(name, decoder=None, transforms=list(pipeline))
    else:
        raise ValueError(f"the pipeline of {name} must be a PipelineSpec or a sequence of operations, not {pipeline!r}")
    if isinstance(spec.source, str) and spec.source not in handlers:
        raise ValueError(f"the pipeline of {name} reads the field {spec.source}; the file has {', '.join(handlers)}")
    if isinstance(spec.source, str) and spec.decoder is None and spec.transforms:
        if isinstance(spec.transforms[0], BatchOperation):
            spec.decoder = spec.transforms.pop(0)
    return spec
