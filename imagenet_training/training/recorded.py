"""A step that was recorded once and is replayed: fixed tensors, and one call in place of a thousand launches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from imagenet_training.training.trainer import Trainer

# Kernels are compiled and chosen, and the optimizer's state is created, in the first steps. They cannot be recorded.
NUM_WARM_UP_STEPS = 3
# Replayed steps must move the weights as plain steps do, but for this share of the way. Some kernels add in no order.
TOLERANCE = 0.1


class Recorder(Protocol):
    """The way to record work on a device. `CudaRecorder` is that of a run; the tests have one for the CPU."""

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Do the work where it will be recorded, and return its result."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record the work.

        Parameters
        ----------
        work : callable
            It works on tensors only. Whatever else it reads, such as a number, keeps its value in all replays.

        Returns
        -------
        result
            What the work returned. Every replay fills these tensors again.
        replay : callable
            Queues the recorded work again.
        """


class CudaRecorder:
    """A recorder of CUDA graphs. Its graphs share their memory, so they are replayed in the order of their recording.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Do the work on the stream that records."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record the work as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that ends an epoch, may allocate memory meanwhile. If recording fails, the context
        # of the graph may leave its stream in place. The outer context does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.stream.device)),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return result, graph.replay


class Snapshot:
    """Copies of everything that a step changes, to undo steps of trial.

    Parameters
    ----------
    trainer : Trainer
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        if trainer.scaler.is_enabled():
            trainer.scaler.scale(torch.zeros((), device=trainer.world.device))  # creates its tensors
        self.scaler = trainer.scaler.state_dict()
        modules = [trainer.model, *([trainer.ema] if trainer.ema is not None else [])]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        tensors += self._optimizer_tensors()
        self.copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self.groups = [{**group, "params": None} for group in trainer.optimizer.param_groups]

    def _optimizer_tensors(self) -> list[torch.Tensor]:
        states = self.trainer.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """Give all tensors their values again, in place. Tensors that steps have added to the optimizer become 0."""
        known = {id(tensor) for tensor, _ in self.copies}
        for tensor, copy in self.copies:
            tensor.copy_(copy)
        for tensor in self._optimizer_tensors():
            if id(tensor) not in known:
                tensor.zero_()  # as every optimizer of this project begins
        for group, copy in zip(self.trainer.optimizer.param_groups, self.groups, strict=True):
            for key in group.keys() - copy.keys():
                del group[key]
            group.update({key: value for key, value in copy.items() if key != "params"})
        self.trainer.scaler.load_state_dict(self.scaler)


def can_record(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if an optimizer's step works on tensors only.

    LAMB counts its steps in Python. Optimizers that are not fused have the host wait for the result of a gradient
    scaler's check.
    """
    return isinstance(optimizer, (torch.optim.SGD, torch.optim.AdamW)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


class RecordedStep:
    """The step of a trainer on batches of one shape, recorded: `backward` and `optimizer_step` as `Trainer` has them.

    Each batch is copied into the same two tensors, and each gradient lies in the same tensor. The learning rates of
    the groups are tensors too. Random numbers of the model are drawn again in each replay, from PyTorch's generator,
    so they depend on its seed as in a step that was not recorded. If the optimizer cannot be recorded, it does its step
    as usual, on the recorded gradients.

    To record, some steps are taken and undone. Then two replayed steps are compared with two plain ones, on other
    batches than the recorded one.

    Parameters
    ----------
    trainer : Trainer
        In training mode. It has no distributed wrapper.
    recorder : Recorder
    images, targets : torch.Tensor
        A batch of the shape, the type and the memory format of all batches. It becomes the place of the batches.

    Raises
    ------
    RuntimeError
        If replayed steps are not the plain ones. What cannot be recorded raises errors of many kinds.
    """

    def __init__(self, trainer: "Trainer", recorder: Recorder, images: torch.Tensor, targets: torch.Tensor):
        self.trainer, self.images, self.targets = trainer, images, targets
        device, self.groups = trainer.world.device, trainer.optimizer.param_groups
        # CUDA's fused optimizers insist on float32. Those of the CPU compute with a float64, as with a number.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self.lrs = [torch.zeros((), dtype=dtype, device=device) for _ in self.groups]
        trainer.optimizer.zero_grad(set_to_none=True)
        snapshot = Snapshot(trainer)
        try:
            for _ in range(NUM_WARM_UP_STEPS):
                recorder.warm_up(self._plain_step)
            snapshot.restore()
            plain = self._moved_weights(lambda *batch: trainer.add_gradient(*batch[:2]), self._plain_update)
            snapshot.restore()
            self._record(recorder)
            snapshot.restore()
            self._compare(plain, self._moved_weights(self.backward, self.optimizer_step), snapshot)
        except BaseException:
            trainer.optimizer.zero_grad(set_to_none=True)
            # A scaler that was left within a step would refuse the next one.
            trainer.scaler = torch.amp.GradScaler(device.type, enabled=trainer.scaler.is_enabled())
            raise
        finally:
            snapshot.restore()

    def _plain_step(self) -> None:
        self._add_gradient()
        self._plain_update()

    def _plain_update(self) -> None:
        self.trainer.update_weights()
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def _add_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.trainer.add_gradient(self.images, self.targets)

    def _record(self, recorder: Recorder) -> None:
        """Record the first batch of a step, the further ones, the update of the weights and that of the average."""
        trainer = self.trainer
        self.batches = [recorder.record(self._add_gradient)]  # makes the tensors of the gradients
        if trainer.accumulation > 1:
            self.batches.append(recorder.record(self._add_gradient))  # adds to them
        self.update: Callable[[], None] | None = None
        if can_record(trainer.optimizer):
            with self._recordable_groups():
                _, self.update = recorder.record(trainer.update_weights)
        self.average: Callable[[], None] | None = None
        if trainer.ema is not None:
            _, self.average = recorder.record(trainer.move_average)

    def _moved_weights(self, backward: Callable[..., Any], update: Callable[[], None]) -> list[torch.Tensor]:
        """Take two steps on random batches, and return copies of the weights."""
        accumulation = self.trainer.accumulation
        for number in range(2 * accumulation):
            torch.manual_seed(number)
            images, targets = torch.randn_like(self.images), torch.rand_like(self.targets)
            backward(images, targets / targets.sum(dim=1, keepdim=True), number % accumulation)
            if (number + 1) % accumulation == 0:
                for group in self.groups:
                    group["lr"] = 0.01 * (number + 1) * group.get("lr_scale", 1.0)
                update()
        return [parameter.detach().clone() for parameter in self.trainer.model.parameters()]

    def _compare(self, plain: list[torch.Tensor], replayed: list[torch.Tensor], snapshot: Snapshot) -> None:
        """Compare the weights after plain and after replayed steps."""
        snapshot.restore()
        start = [parameter.detach() for parameter in self.trainer.model.parameters()]
        moved, differing = (
            torch.stack(torch._foreach_norm(torch._foreach_sub(plain, others))).norm().item()
            for others in (start, replayed)
        )
        if not differing <= TOLERANCE * moved:
            raise RuntimeError(f"replayed steps differ from plain ones: {differing:.3g}, where these move {moved:.3g}")

    @contextlib.contextmanager
    def _recordable_groups(self) -> Iterator[None]:
        """Let the optimizer read the learning rates from the tensors. Its groups keep their numbers for checkpoints."""
        kept = [dict(group) for group in self.groups]
        for group, lr in zip(self.groups, self.lrs, strict=True):
            group["lr"] = lr
            if "capturable" in group and lr.is_cuda:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, values in zip(self.groups, kept, strict=True):
                group.update(values)

    def backward(self, images: torch.Tensor, targets: torch.Tensor, number: int) -> Sequence[torch.Tensor]:
        """Add one batch's share to the gradient. Return loss (scalar) and logits (N, K), valid until the next batch."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        results, replay = self.batches[min(number, 1)]
        replay()
        return results

    def optimizer_step(self) -> None:
        """Change the weights by the gradient, with the learning rates that the optimizer's groups have now."""
        if self.update is None:
            self.trainer.update_weights()
            return
        for group, lr in zip(self.groups, self.lrs, strict=True):
            lr.fill_(group["lr"])
        self.update()
