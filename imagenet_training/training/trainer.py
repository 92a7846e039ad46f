"""The trainer: the model under training, what changes it, and one step."""

import contextlib
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_ops.errors import UserError
from imagenet_training.distributed import World
from imagenet_training.models.architectures import (
    build_model,
    compiled,
    drop_path_notices,
    head_of,
    model_arguments,
    unwrapped,
)
from imagenet_training.models.layers import freeze_body, lr_scales, set_training_mode
from imagenet_training.models.memory_format import set_memory_format
from imagenet_training.models.precision import DTYPES, allow_tf32, autocast
from imagenet_training.models.stem import replace_stem
from imagenet_training.planning.plan import RunPlan
from imagenet_training.planning.recipe import Recipe
from imagenet_training.state import TrainState
from imagenet_training.training.loss import Loss, main_logits, recipe_loss
from imagenet_training.training.optim import build_ema, build_optimizer
from imagenet_training.training.recorded import RecordedStep
from imagenet_training.training.step_mode import EAGER, StepMode, candidate_modes

# PyTorch 2.14 renamed the option of DistributedDataParallel, and warns of the old name.
_LOCAL_BUFFERS: dict[str, Any] = {"forward_sync_buffers": False}
if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
    _LOCAL_BUFFERS = {"broadcast_buffers": False}


def make_deterministic(wanted: bool, modes: Iterable[StepMode]) -> None:
    """Have PyTorch take only kernels that give the same bits in every run, or those that cuDNN finds fastest by timing.

    `modes` are those that the run may use.

    Raises
    ------
    UserError
        If the model may be compiled, and this version of PyTorch chooses compiled kernels by timing in any case.
    """
    if wanted and any(mode.compiled for mode in modes):
        import torch._inductor.config as inductor  # here, because it takes seconds

        if not hasattr(inductor, "deterministic"):
            raise UserError(
                f"training.deterministic=1: PyTorch {torch.__version__} chooses compiled kernels by timing; "
                "pass --training.compile=graph or 0, or install PyTorch 2.10 or newer"
            )
    torch.backends.cudnn.benchmark = not wanted
    if wanted or torch.are_deterministic_algorithms_enabled():  # the call imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(wanted)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs memory of a fixed size for it
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  mypy does not know it


@dataclass
class Trainer:
    """The model under training, and everything that a step needs to change it.

    Parameters
    ----------
    model : torch.nn.Module
        On its device, wrapped for distribution if there are several ranks.
    ema : MovingAverage or None
        Updated every ``ema_every`` steps.
    scaler : torch.amp.GradScaler
        Disabled unless the precision is ``"16-mixed"``.
    loss : callable
        Scalar loss of the model's outputs and dense targets (N, K); see `loss_of_outputs`.
    accumulation : int
        Batches per optimizer step.
    grad_clip, agc : float
        Largest norm of the whole gradient. Largest ratio of each unit's gradient norm to the norm of its weights
        (adaptive gradient clipping, arXiv 2102.06171); the head is not clipped, as there. 0 does not clip.
    head : frozenset of str
        Names of the head's parameters: those whose shapes depend on the number of classes.
    channels_last : bool
        Memory format of the images and the weights. Images that already have it are not copied.
    seed : int
        Seed of what the model itself draws (dropout, drop path): a function of (seed, place of the batch, rank).
    num_classes : int
        Width of the targets.
    infinite : frozenset of str
        Names of the buffers with infinities before the first step; see `infinite_buffers`.
    modes : tuple of StepMode
        The mode of the step; several until `imagenet_training.training.step_mode.prepare_step` has chosen the fastest.
    recorded : RecordedStep or None
        The step that was recorded for the present size of images.
    prepared_px : int
        Side of the images that the step is prepared for; 0 for none yet.
    notices : tuple of str
        Choices of weights and modes, what was left out of them, and what the architecture does without a setting.
    """

    model: nn.Module
    ema: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    world: World
    loss: Loss
    precision: str
    accumulation: int = 1
    grad_clip: float = 0.0
    agc: float = 0.0
    head: frozenset[str] = frozenset()
    ema_every: int = 1
    channels_last: bool = True
    seed: int = 0
    num_classes: int = 0
    infinite: frozenset[str] = frozenset()
    modes: tuple[StepMode, ...] = (EAGER,)
    recorded: RecordedStep | None = None
    prepared_px: int = 0
    notices: tuple[str, ...] = ()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and exported: the moving average if there is one."""
        return self.ema.module if self.ema is not None else unwrapped(self.model)

    @property
    def image_dtype(self) -> torch.dtype:
        """The type of the loader's images."""
        return DTYPES[self.precision]

    def to_memory_format(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images in the memory format of the weights; the same tensor if it has that format."""
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def train_mode(self) -> None:
        """Put the model in training mode. The frozen parts of it stay in evaluation mode."""
        self.model.train()
        set_training_mode(unwrapped(self.model))

    def backward(
        self, images: torch.Tensor, targets: torch.Tensor, *, number: int, place: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one batch's share to the gradient. Ranks exchange gradients only with the last batch of a step.

        Parameters
        ----------
        images, targets : torch.Tensor
            Float (N, 3, H, W), and float (N, K).
        number : int
            The number of the batch in its optimizer step, from 0.
        place : tuple of int
            The place of the batch in the run, which seeds what the model draws; see `batch_place`.

        Returns
        -------
        loss, logits : torch.Tensor
            The loss (scalar) and the logits (N, K). They are valid until the next batch.
        """
        self._seed(place)
        if self.recorded is not None:
            loss, logits = self.recorded.backward(images, targets, number)
            return loss, logits
        with self._no_exchange(number < self.accumulation - 1):
            return self.add_gradient(images, targets)

    def add_gradient(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass a batch forward and back; see `backward`. This works on tensors only, so it can be recorded."""
        with autocast(self.world.device, self.precision):
            outputs = self.model(self.to_memory_format(images))
        loss, logits = self.loss(outputs, targets), main_logits(outputs)
        self.scaler.scale(loss / self.accumulation).backward()
        return loss.detach(), logits.detach()

    def optimizer_step(self, lr: float, *, step: int) -> None:
        """Change the weights by the gradient of the last batches, and after some steps the moving average.

        `lr` is the learning rate of the head. Other layers may have a share of it. `step` is the number of optimizer
        steps that the run has taken.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.recorded is not None:
            self.recorded.optimizer_step()
        else:
            self.update_weights()
            self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and (step + 1) % self.ema_every == 0:
            self._update_average()

    def update_weights(self) -> None:
        """Change the weights by the gradient, with the learning rates of the optimizer's groups.

        Unless the optimizer is LAMB, this works on tensors only, so it can be recorded.
        """
        if self.grad_clip or self.agc:
            self.scaler.unscale_(self.optimizer)
        if self.agc:
            from timm.utils.agc import adaptive_clip_grad  # here, because importing timm takes two seconds

            parameters = unwrapped(self.model).named_parameters()
            adaptive_clip_grad([value for name, value in parameters if name not in self.head], self.agc)
        if self.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _update_average(self) -> None:
        if self.recorded is None or self.recorded.average is None or not self.ema.n_averaged:
            self.ema.update_parameters(unwrapped(self.model))  # the first update copies, so it is not the recorded one
            return
        self.recorded.average()
        self.ema.n_averaged += 1

    def move_average(self) -> None:
        """Update the moving average, but for the first time; it can be recorded."""
        self.ema.move_towards(unwrapped(self.model), 1.0 - self.ema.decay)

    def is_finite(self) -> bool:
        """Return True if all weights and statistics of the model are finite. This waits for the device.

        Buffers that had infinities before the first step are left out.
        """
        model = unwrapped(self.model)
        buffers = (value for name, value in model.named_buffers() if name not in self.infinite)
        values = [value.detach() for value in (*model.parameters(), *buffers)]
        norms = torch._foreach_norm([value for value in values if value.is_floating_point()])
        return bool(torch.stack(norms).isfinite().all())

    def warm_up(self, shape: tuple[int, int, int, int]) -> Exception | None:
        """Pass a batch of zeros of a shape (N, 3, H, W) forward and back, and leave no trace. Return an error.

        A compiled model is compiled here.

        Raises
        ------
        torch.OutOfMemoryError
            If memory ran out.
        """
        self.train_mode()
        kept = [buffer.clone() for buffer in self.model.buffers()]
        images = self.to_memory_format(torch.zeros(shape, dtype=self.image_dtype, device=self.world.device))
        try:
            with self._no_exchange(True):  # a rank that fails here leaves no other rank waiting
                with autocast(self.world.device, self.precision):
                    logits = main_logits(self.model(images))
                logits.float().sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # dynamo, inductor, Triton and the C++ compiler raise many kinds
            return error
        finally:
            for buffer, value in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(value)
            self.optimizer.zero_grad(set_to_none=True)
        return None

    def _no_exchange(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which ranks keep their gradients to themselves, if that is wanted."""
        if wanted and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _seed(self, place: tuple[int, ...]) -> None:
        """Make what the model draws a function of (seed, place in the run, rank), the same after a resume."""
        torch.manual_seed(hash((self.seed, *place, self.world.rank)) % 2**63)


def batch_place(state: TrainState, plan: RunPlan, number: int) -> tuple[int, ...]:
    """Return the place of a batch in the run: its epoch, and the samples of the epoch before it.

    No two batches of a run have the same place, though its batch size may change when it is resumed. A run that an
    earlier version began keeps the place of that version, the number of the batch over the run. The state is that
    before the optimizer step, and `number` is that of the batch in the step, from 0.
    """
    if state.numbered_batches:
        return (state.step * plan.accumulation + number,)
    return state.epoch, state.samples + number * plan.batch_size * plan.world_size


def infinite_buffers(model: nn.Module) -> frozenset[str]:
    """Return the names of a new model's buffers with infinities: limits and masks, which training does not change.

    For example, timm's gemma4_vit_167m limits the inputs of its layers to infinity until weights are loaded.
    """
    buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    return frozenset(name for name, value in buffers.items() if value.isinf().any())


def build_trainer(recipe: Recipe, plan: RunPlan, world: World, *, from_checkpoint: bool = False) -> Trainer:
    """Build model, optimizer, moving average and loss of a recipe, on this rank's device.

    This also sets PyTorch's global seed, TF32 and the choice of kernels. If a checkpoint will be restored, pretrained
    or local weights are not loaded first.

    Raises
    ------
    UserError
        If the architecture does not exist, the weights do not fit, or the run cannot be deterministic.
    """
    training = recipe.training
    num_batches = plan.total_steps * plan.accumulation
    setting = False if training.eval_only else training.compile
    modes, mode_notices = candidate_modes(setting, world, num_batches, deterministic=training.deterministic)
    make_deterministic(training.deterministic, modes)
    torch.manual_seed(training.seed)
    allow_tf32(training.tf32)
    notices: list[str] = []
    model = build_model(
        **model_arguments(recipe),
        pretrained=recipe.model.pretrained and not from_checkpoint,
        weights=None if from_checkpoint else recipe.model.weights,
        ema=recipe.model.ema,
        whole=training.eval_only,
        notices=notices,
    ).to(world.device)
    head = frozenset(head_of(model, **model_arguments(recipe)).class_dims) if _needs_head(recipe) else frozenset()
    if head and recipe.model.freeze == "body":
        freeze_body(model, head)
    channels_last, format_notices = set_memory_format(model, training.channels_last, world.device)
    if not training.eval_only:
        notices += drop_path_notices(recipe, model) + format_notices
    if channels_last and world.device.type == "cuda":
        replace_stem(model)
    trainer = Trainer(
        model=model,
        ema=build_ema(model, plan.ema_decay),
        optimizer=build_optimizer(
            model,
            training.optimizer,
            lr=plan.lr,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
            bn_wd=training.bn_wd,
            scales=lr_scales(model, training.layer_decay, head) if head and training.layer_decay is not None else None,
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=plan.precision == "16-mixed"),
        world=world,
        loss=recipe_loss(recipe, plan.class_weights, world.device),
        precision=plan.precision,
        accumulation=plan.accumulation,
        grad_clip=training.grad_clip,
        agc=training.agc,
        head=head,
        ema_every=training.ema_every,
        channels_last=channels_last,
        infinite=infinite_buffers(model),
        seed=training.seed,
        num_classes=recipe.model.known_num_classes,
        modes=modes,
        notices=(*notices, *mode_notices),
    )
    trainer.model = _wrapped(model, trainer)
    return trainer


def _needs_head(recipe: Recipe) -> bool:
    """Return True if the head is treated in another way than the rest of the model."""
    training = recipe.training
    treated = bool(training.agc) or training.layer_decay is not None or recipe.model.freeze == "body"
    return treated and not training.eval_only


def _wrapped(model: nn.Module, trainer: Trainer) -> nn.Module:
    """Wrap the model as the steps of several ranks call it: compiled if wanted, and exchanging gradients."""
    if not dist.is_initialized():
        return model  # `prepare_step` compiles it
    world, compiles = trainer.world, trainer.modes[0].compiled
    if compiles:
        model = compiled(model)
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Incompatible with no_sync(), and with the way dynamo splits a graph at the buckets.
        static_graph=trainer.accumulation == 1 and not compiles,
        **_LOCAL_BUFFERS,  # training reads no buffer of another rank, and evaluation takes rank 0's
    )
