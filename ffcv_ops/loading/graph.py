"""The operations of a loader's pipelines as steps, and the buffers that they write into.

Every operation of FFCV's graph of pipelines becomes a step. A batch runs the steps one after the other, in a slot of
buffers that are allocated once. FFCV's operations keep FFCV's calling convention. Ours have that of `BatchOperation`.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import (
    INITIAL_STATE,
    AllocationQuery,
    BasicDecoder,
    Compiler,
    DecoderNode,
    Graph,
    RefNode,
    ToTensor,
    allocate_query,
)
from ffcv_ops.errors import UserError
from ffcv_ops.operations.base import Batch, BatchOperation


@dataclass(eq=False)
class _Sharing:
    """The use of one of our operations by several loaders. Its scratch serves one batch at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_users: int = 0


_sharing: weakref.WeakKeyDictionary[BatchOperation, _Sharing] = weakref.WeakKeyDictionary()
# It is reentrant, because garbage collection may call `_release` while the lock is held.
_sharing_lock = threading.RLock()


def _release(operations: Sequence[BatchOperation]) -> None:
    """Close the operations that no other loader uses."""
    for operation in operations:
        with _sharing_lock:
            sharing = _sharing[operation]
            sharing.num_users -= 1
            unused = sharing.num_users == 0
        if unused:
            with sharing.lock:
                operation.close()


class Step:
    """One operation at its place in the pipelines, with its code and the memory that it asked for.

    Parameters
    ----------
    node : ffcv.pipeline.graph.Node
    column : int
        The number of the field that the pipeline reads.
    """

    def __init__(self, node: Any, column: int):
        self.node_id: int = node.id
        self.column = column
        self.is_decoder = isinstance(node, DecoderNode)
        self.operation = node.decoder if self.is_decoder else node.operation
        parent = node.parent
        # A reference refers to the node of an operation, never to another reference.
        self.parent_id: int = (parent.parent if isinstance(parent, RefNode) else parent).id if parent else -1
        self.is_ours = isinstance(self.operation, BatchOperation)
        if self.is_ours:
            with _sharing_lock:
                self.lock = _sharing.setdefault(self.operation, _Sharing()).lock
        self.jit = False
        self.query: Any = None
        self.shared_query: Any = None
        self.code: Callable[..., Any]
        self.shared_code: Callable[..., Any] | None = None
        self.with_indices = False

    @property
    def is_number(self) -> bool:
        """True for FFCV's decoder of a number. It only selects from the metadata, so it needs no compilation."""
        return self.is_decoder and type(self.operation).generate_code is BasicDecoder.generate_code

    @property
    def is_compiled(self) -> bool:
        """True if FFCV compiles the operation."""
        return self.jit and not self.is_ours and not self.is_number

    @property
    def reads_stock_state(self) -> bool:
        """True for a decoder of FFCV that reads values by the storage state."""
        return self.is_decoder and not self.is_ours and not self.is_number

    def generate_code(self) -> None:
        """Ask the operation for its code."""
        self.code = self.operation.generate_code()
        if self.is_ours:
            return
        self.with_indices = getattr(self.code, "with_indices", False)
        self.shared_code = self.operation.generate_code_for_shared_state()
        if self.is_compiled:
            self.code = Compiler.compile(self.code)
            self.shared_code = self.shared_code and Compiler.compile(self.shared_code)

    def run(self, batch: Batch, inputs: Any, memory: Any, column: np.ndarray, state: Any, shared: Any) -> Any:
        """Run the operation on a batch.

        Parameters
        ----------
        batch : Batch
        inputs : array or tensor
            The previous operation's result. A decoder does not use it.
        memory, shared : array, tensor, tuple or None
            The memory that the operation asked for.
        column : structured ndarray (num_samples,)
            The metadata of the field.
        state : tuple of ndarray
            The storage state that FFCV's decoders pass to their reader.
        """
        if self.is_ours:
            with self.lock:
                if self.is_decoder:
                    return self.code(batch.sample_ids, memory, column, batch)
                return self.code(inputs, memory, batch)
        if self.is_number:
            memory[:, 0] = column[batch.sample_ids]
            return memory
        arguments = [batch.sample_ids if self.is_decoder else inputs, memory]
        if self.with_indices:
            arguments.append(batch.sample_ids)
        if self.is_decoder:
            arguments += [column, state]
        if self.shared_code is not None:
            arguments.append(shared)
        return self.code(*arguments)


class PipelineSteps:
    """The operations of all pipelines in the order in which they run, and the results that make a batch.

    Parameters
    ----------
    graph : ffcv.pipeline.graph.Graph
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.steps: list[Step] = []
        #: The CUDA device of the results, set by `declare`. None: the current device.
        self.device: torch.device | None = None
        self.outputs = [(leaf.parent if isinstance(leaf, RefNode) else leaf).id for leaf in graph.leaf_nodes.values()]
        for root in graph.root_nodes:
            self._add(root, graph.fieldname_to_fix[root.field_name])
        # An operation may stand at several places. Its shared memory is that of the first place.
        self.owners = {step.operation: step for step in reversed(self.steps)}
        ours = [operation for operation in self.owners if isinstance(operation, BatchOperation)]
        with _sharing_lock:
            for operation in ours:
                _sharing[operation].num_users += 1
        #: Frees the memory of our operations; garbage collection calls it too.
        self.close = weakref.finalize(self, _release, ours)
        self.close.atexit = False

    def _add(self, node: Any, column: int) -> None:
        if not isinstance(node, RefNode):
            self.steps.append(Step(node, column))
        for child in self.graph.adjacency_list[node]:
            self._add(child, column)

    @property
    def is_compiled(self) -> bool:
        """True if FFCV compiles one of the operations."""
        return any(step.is_compiled for step in self.steps)

    def declare(self) -> None:
        """Ask every operation for the memory it needs. Pass shape, type and device on to the next operation."""
        states: dict[int, Any] = {}
        names = {column: name for name, column in self.graph.fieldname_to_fix.items()}
        for step in self.steps:
            operation = step.operation
            operation.accept_field(self.graph.handlers[names[step.column]])
            operation.accept_globals(self.graph.metadata[f"f{step.column}"], self.graph.memory_read)
            state = INITIAL_STATE if step.is_decoder else states[step.parent_id]
            if type(operation) is ToTensor and isinstance(state.dtype, torch.dtype):
                raise UserError(
                    f'the pipeline of "{names[step.column]}" has tensors before ToTensor already: leave ToTensor out'
                )
            states[step.node_id], step.query = operation.declare_state_and_memory(state)
            step.shared_query = operation.declare_shared_memory(state)
            step.jit = step.is_decoder or states[step.node_id].jit_mode
        devices = {torch.device(state.device) for state in states.values() if torch.device(state.device).type == "cuda"}
        if len(devices) > 1:
            raise UserError(f"the pipelines lead to several devices: {', '.join(sorted(map(str, devices)))}")
        self.device = devices.pop() if devices else None

    def generate_code(self, *, only_ours: bool) -> None:
        """Ask the operations for their code."""
        for step in self.steps:
            if step.is_ours or not only_ours:
                step.generate_code()

    def run(self, batch: Batch, buffers: "Buffers", slot: int, state: Any) -> tuple[Any, ...]:
        """Prepare one batch in one slot of the buffers, and return the results of the pipelines."""
        count = len(batch.sample_ids)
        shared = {op: _select(buffers.shared[step.node_id], slot, count) for op, step in self.owners.items()}
        for operation, step in self.owners.items():
            if step.shared_code is not None:
                step.shared_code(shared[operation])
        results: dict[int, Any] = {}
        for step in self.steps:
            memory = _select(buffers.memory[step.node_id], slot, count)
            column = self.graph.metadata[f"f{step.column}"]
            inputs = results.get(step.parent_id)
            results[step.node_id] = step.run(batch, inputs, memory, column, state, shared[step.operation])
        return tuple(results[node_id] for node_id in self.outputs)


def _allocate(query: Any, batch_size: int, num_slots: int) -> Any:
    if isinstance(query, AllocationQuery):
        return allocate_query(query, batch_size, num_slots)
    return tuple(_allocate(part, batch_size, num_slots) for part in query) if isinstance(query, Sequence) else None


def _comparable(query: Any) -> Any:
    if isinstance(query, AllocationQuery):
        return tuple(int(side) for side in query.shape), str(query.dtype), str(query.device)
    return tuple(_comparable(part) for part in query) if isinstance(query, Sequence) else None


def _select(memory: Any, slot: int, count: int) -> Any:
    if isinstance(memory, tuple):
        return tuple(_select(part, slot, count) for part in memory)
    return None if memory is None else memory[slot][:count]


# Integer types by their size in bytes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class ReturnedBatch:
    """A batch in a slot that the consumer may still hold."""

    slot: int
    parts: list[weakref.ref[Any]]

    @property
    def is_held(self) -> bool:
        """True if a part of the batch is still referenced."""
        return any(part() is not None for part in self.parts)


def returned_batch(slot: int, result: tuple[Any, ...]) -> tuple[tuple[Any, ...], ReturnedBatch]:
    """Return a batch for the consumer, and the object that knows if the consumer still holds the batch.

    A dense tensor on the CPU, without a gradient, gets a storage of its own over the memory of the slot. An array is
    the owner of this storage, so it lives as long as any view of the tensor. Of other parts, only the object itself
    counts, and no view of it. A list or a tuple does not count.
    """
    parts, owners = [], []
    for part in result:
        owner = part
        # A subclass would lose its class. NumPy does not have all dtypes of PyTorch.
        if type(part) is torch.Tensor and part.device.type == "cpu" and not part.requires_grad:
            if part.layout == torch.strided and (integers := _INTEGERS.get(part.element_size())):
                with suppress(RuntimeError):  # nested, or a lazy conjugate
                    array = part.view(integers).numpy()
                    part, owner = torch.from_numpy(array).view(part.dtype), array
        parts.append(part)
        with suppress(TypeError):  # no weak references to lists and numbers
            owners.append(weakref.ref(owner))
    return tuple(parts), ReturnedBatch(slot, owners)


class Buffers:
    """The memory of an epoch: slots for batches, each with its CUDA stream, and pages of the file.

    Parameters
    ----------
    steps : PipelineSteps
        Their operations have declared the memory that they need.
    batch_size, num_slots : int
    """

    def __init__(self, steps: PipelineSteps, batch_size: int, num_slots: int):
        self.key = self.key_of(steps, batch_size, num_slots)
        self.num_slots = num_slots
        self.memory = {step.node_id: _allocate(step.query, batch_size, num_slots) for step in steps.steps}
        self.shared = {step.node_id: _allocate(step.shared_query, batch_size, num_slots) for step in steps.steps}
        self.pages = np.empty((0, 0), dtype=np.uint8)
        #: Batches that the consumer may still hold. Their slots are not written to, also not by the next epoch.
        self.returned: list[ReturnedBatch] = []
        self.streams: list[torch.cuda.Stream] = []
        if torch.cuda.is_available():
            self.streams = [torch.cuda.Stream(steps.device) for _ in range(num_slots)]

    @staticmethod
    def key_of(steps: PipelineSteps, batch_size: int, num_slots: int) -> tuple[Any, ...]:
        """Return the key of the buffers' shapes. Buffers fit a later epoch if its key is equal."""
        queries = ((_comparable(step.query), _comparable(step.shared_query)) for step in steps.steps)
        return batch_size, num_slots, *queries

    def take_dropped(self) -> list[ReturnedBatch]:
        """Remove the batches that the consumer has dropped, and return them."""
        batches, self.returned = self.returned, []
        dropped: list[ReturnedBatch] = []
        for batch in batches:
            (self.returned if batch.is_held else dropped).append(batch)
        return dropped

    def now(self) -> torch.cuda.Event | None:
        """Record an event behind all work that this thread has queued on the device. Other threads wait for it."""
        if not self.streams:
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.streams[0].device))
        return event

    def on_stream(self, slot: int) -> AbstractContextManager[None]:
        """Return the context in which the slot's stream is the current one."""
        return torch.cuda.stream(self.streams[slot]) if self.streams else nullcontext()

    def join(self, slot: int) -> None:
        """Let all further work of this thread wait for the work on the slot's stream."""
        if self.streams:
            torch.cuda.current_stream(self.streams[slot].device).wait_stream(self.streams[slot])

    def finish(self) -> None:
        """Wait until the device has done all work on the slots' streams."""
        for stream in self.streams:
            stream.synchronize()
