"""How a step runs on its device: compiled or not, recorded as CUDA graphs or not; and the choice between the modes."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from imagenet_training import distributed
from imagenet_training.distributed import World
from imagenet_training.models.architectures import can_compile, compiled, reason_of, unwrapped
from imagenet_training.reports.logs import RunLog
from imagenet_training.training.recorded import CudaRecorder, RecordedStep, Recorder, Snapshot

if TYPE_CHECKING:
    from imagenet_training.training.trainer import Trainer

# On an H200, a ResNet-50 is compiled in 80 seconds, which 4,000 of its batches gain. A recording takes some seconds.
MIN_BATCHES_TO_COMPILE, MIN_BATCHES_TO_RECORD = 4000, 300
# The timed steps of a trial: the median of so many rounds of so many steps.
NUM_ROUNDS, NUM_STEPS_OF_A_ROUND = 3, 5
# A mode that is faster by less than this share is not worth what it adds.
MIN_GAIN = 0.01


@dataclass(frozen=True)
class StepMode:
    """A mode of running a step.

    Attributes
    ----------
    compiled : bool
        The model is compiled by ``torch.compile``.
    graph : bool
        The whole step is recorded as CUDA graphs, and replayed.
    """

    compiled: bool = False
    graph: bool = False

    def __str__(self) -> str:
        return {value: name for name, value in MODES.items()}[self]


EAGER, COMPILED, GRAPH, COMPILED_GRAPH = StepMode(), StepMode(True), StepMode(graph=True), StepMode(True, True)
# From the simplest to the most intricate.
MODES = {"eager": EAGER, "graph": GRAPH, "compiled": COMPILED, "compiled-graph": COMPILED_GRAPH}


def candidate_modes(
    setting: bool | str, world: World, num_batches: int, *, deterministic: bool = False
) -> tuple[tuple[StepMode, ...], list[str]]:
    """Return the modes that a run may use, and notices of what it cannot use.

    Parameters
    ----------
    setting : bool or str
        ``training.compile``.
    world : World
        Only a single process on a GPU records. Ranks exchange gradients within a step, which is not recorded.
    num_batches : int
        Batches that the run trains on.
    deterministic : bool
        Let ``auto`` neither compile nor choose by timing.

    Returns
    -------
    modes : tuple of StepMode
        If there are several, the fastest is to be found.
    notices : list of str
    """
    records = world.device.type == "cuda" and world.world_size == 1
    if setting == "auto":
        compiles = can_compile(world.device) and num_batches >= MIN_BATCHES_TO_COMPILE
        if not records:
            return ((COMPILED,) if compiles and not deterministic else (EAGER,)), []
        graphs = num_batches >= MIN_BATCHES_TO_RECORD
        if deterministic:
            return ((GRAPH,) if graphs else (EAGER,)), []
        return tuple(mode for mode in MODES.values() if mode.compiled <= compiles and mode.graph <= graphs), []
    mode = MODES[setting] if isinstance(setting, str) else COMPILED if setting else EAGER
    if mode.graph and not records:
        reason = "the run has several processes" if world.world_size > 1 else "there is no GPU"
        mode = StepMode(compiled=mode.compiled)
        return (mode,), [f"training.compile={setting}: {reason}, so no CUDA graphs are recorded; the mode is {mode}"]
    return (mode,), []


def kept_mode(modes: tuple[StepMode, ...], name: str) -> tuple[StepMode, ...]:
    """Return only the mode of the run that is resumed, if it is among those that this process may use."""
    return (MODES[name],) if MODES.get(name) in modes else modes


def fastest_mode(candidates: Sequence[StepMode], measure: Callable[[StepMode], float]) -> tuple[StepMode, str]:
    """Return the fastest mode, and the figures of all of them as text.

    Parameters
    ----------
    candidates : sequence of StepMode
        From the simplest to the most intricate. The first one must work.
    measure : callable
        Images/s of a mode.

    Raises
    ------
    Exception
        Whatever the first mode raises. A later mode that fails is left out.
    """
    speeds: dict[StepMode, float] = {}
    shown = []
    for mode in candidates:
        try:
            speeds[mode] = measure(mode)
            shown.append(f"{mode} {speeds[mode]:,.0f}")
        except Exception as error:  # dynamo, inductor, Triton and CUDA raise many kinds
            if not speeds:
                raise
            shown.append(f"{mode} failed ({reason_of(error)})")
    return _worth_it(speeds), ", ".join(shown)


def _worth_it(speeds: Mapping[StepMode, float]) -> StepMode:
    fastest = max(speeds.values())
    return next(mode for mode, speed in speeds.items() if speed >= fastest * (1 - MIN_GAIN))


def prepare_step(
    trainer: "Trainer", batch_size: int, size_px: int, log: RunLog, *, recorder: Recorder | None = None
) -> str:
    """Compile and record the step for one size of images before the first step of that size.

    The first call chooses the mode, if several are possible, by timing them on random images. What fails is left out,
    with a note. Weights, statistics, momenta and the scale of the losses end as they were.

    Parameters
    ----------
    trainer : Trainer
    batch_size, size_px : int
    log : RunLog
    recorder : Recorder, optional
        In place of CUDA graphs.

    Returns
    -------
    str
        The name of the mode.

    Raises
    ------
    torch.OutOfMemoryError
        If memory runs out in the simplest mode.
    """
    if size_px == trainer.prepared_px:
        return str(trainer.modes[0])
    if trainer.prepared_px:
        take_down(trainer)
        torch.compiler.reset()  # training never returns to an earlier size
    trainer.prepared_px = size_px
    trainer.train_mode()
    shape = (batch_size, 3, size_px, size_px)
    if len(trainer.modes) > 1:
        mode, figures = fastest_mode(trainer.modes, lambda mode: measure_mode(trainer, mode, shape, recorder))
        trainer.modes = (mode,)
        log.print(f"mode of the step: {mode}; measured at {size_px} px, images/s: {figures}")
    _set_up_or_leave_out(trainer, shape, log, recorder)
    return str(trainer.modes[0])


def measure_mode(
    trainer: "Trainer", mode: StepMode, shape: tuple[int, int, int, int], recorder: Recorder | None = None
) -> float:
    """Return the images/s of a mode, and leave the trainer as it was.

    Parameters
    ----------
    trainer : Trainer
        In training mode, with no mode set up.
    mode : StepMode
    shape : tuple of int
        Shape of a batch's images, (N, 3, H, W).
    recorder : Recorder, optional
        In place of CUDA graphs.

    Raises
    ------
    Exception
        What compiling or recording raises.
    """
    snapshot = Snapshot(trainer)
    try:
        if error := _set_up(trainer, mode, shape, recorder):
            raise error
        return shape[0] / step_s(trainer, shape)
    finally:
        take_down(trainer)
        snapshot.restore()


def _set_up_or_leave_out(
    trainer: "Trainer", shape: tuple[int, int, int, int], log: RunLog, recorder: Recorder | None
) -> None:
    """Set up the mode of the trainer. Leave out what fails, on all ranks, and print a note."""
    (mode,) = trainer.modes
    started_s = time.perf_counter()
    error = _set_up(trainer, mode, shape, recorder)
    failed = distributed.sum_over_ranks(torch.tensor(int(error is not None), device=trainer.world.device)).item()
    if not failed:
        if mode != EAGER:
            done = " and ".join(["compiled"] * mode.compiled + ["recorded"] * mode.graph)
            log.print(f"{done} for {shape[2]} px in {time.perf_counter() - started_s:.0f} s")
        return
    take_down(trainer)
    reason = reason_of(error) if error else "on another rank"
    if mode.graph:  # the model may still compile
        trainer.modes = (StepMode(compiled=mode.compiled),)
        log.print(f"note: the step could not be recorded, the mode is now {trainer.modes[0]} ({reason})")
        _set_up_or_leave_out(trainer, shape, log, recorder)
        return
    trainer.modes = (EAGER,)
    torch.compiler.set_stance("force_eager")
    log.print(f"note: torch.compile failed, training goes on without it ({reason})")


def _set_up(
    trainer: "Trainer", mode: StepMode, shape: tuple[int, int, int, int], recorder: Recorder | None
) -> Exception | None:
    """Compile and record as a mode wants it. Return the error, if there was one.

    Raises
    ------
    torch.OutOfMemoryError
        If memory ran out, unless that was in recording.
    """
    if mode.compiled:
        if not isinstance(trainer.model, DistributedDataParallel):  # which was built around the compiled model
            trainer.model = compiled(trainer.model)
        if error := trainer.warm_up(shape):
            return error
    if mode.graph:
        try:
            trainer.recorded = RecordedStep(
                trainer, recorder or CudaRecorder(trainer.world.device), *_batch(trainer, shape)
            )
        except Exception as error:  # memory may be too short for the graphs alone
            return error
    return None


def take_down(trainer: "Trainer") -> None:
    """Undo `_set_up`."""
    trainer.recorded = None
    trainer.optimizer.zero_grad(set_to_none=True)
    if not isinstance(trainer.model, DistributedDataParallel):
        trainer.model = unwrapped(trainer.model)


def _batch(trainer: "Trainer", shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images, and targets, as the loader gives them."""
    device = trainer.world.device
    images = torch.randn(shape, device=device).to(trainer.image_dtype)
    return trainer.to_memory_format(images), torch.full(
        (shape[0], trainer.num_classes), 1 / trainer.num_classes, device=device
    )


def step_s(trainer: "Trainer", shape: tuple[int, int, int, int]) -> float:
    """Return the seconds that a step takes."""
    images, targets = _batch(trainer, shape)

    def round_s(num_steps: int) -> float:
        _synchronize(trainer.world.device)
        started_s = time.perf_counter()
        for step in range(num_steps):
            trainer.backward(images, targets, number=0, place=(step,))
            trainer.optimizer_step(0.0, step=step)
        _synchronize(trainer.world.device)
        return (time.perf_counter() - started_s) / num_steps

    round_s(NUM_STEPS_OF_A_ROUND)
    return statistics.median(round_s(NUM_STEPS_OF_A_ROUND) for _ in range(NUM_ROUNDS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
