"""A recorder for the CPU, with the rules of CUDA graphs: fixed tensors, frozen numbers, no value read by the host."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operations that ran, with their arguments. `replay` runs them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads the value of a tensor, which no CUDA graph can record")
        results = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.operations:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A `Recorder` of tapes. Unlike a CUDA graph, work that is recorded also runs once."""

    def __init__(self):
        self.tapes = []

    def warm_up(self, work):
        return work()

    def record(self, work):
        tape = Tape()
        with tape:
            result = work()
        self.tapes.append(tape)
        return result, tape.replay


class ForgetfulRecorder(TapeRecorder):
    """A recorder whose replays of one of the records do nothing."""

    def __init__(self, forgotten):
        super().__init__()
        self.forgotten = forgotten

    def record(self, work):
        result, replay = super().record(work)
        return result, (lambda: None) if len(self.tapes) - 1 == self.forgotten else replay


class BrokenRecorder(TapeRecorder):
    """A recorder that fails when it has recorded some work."""

    def __init__(self, num_successes=0):
        super().__init__()
        self.num_successes = num_successes

    def record(self, work):
        if len(self.tapes) == self.num_successes:
            work()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return super().record(work)
