"""Architectures of torchvision and timm, with BlurPool and compilation."""

import difflib
import importlib.util
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

from ffcv_ops.errors import UserError
from ffcv_ops.settings.fields import show
from imagenet_training.models.weight_file import TensorGroup, WeightFile, read_weight_file
from imagenet_training.models.weights import Fit, Head, load_weights
from imagenet_training.planning.recipe import Recipe

# Sections of the recipe's settings of a network that are not in ``model``.
_SECTIONS = {"use_blurpool": "training"}
# Standard deviation of the weights of a new head on trained layers, as of torchvision's VGG and many others.
HEAD_STD = 0.01
# torchvision's published weights of these two expect another normalisation, which the models can make themselves.
# Their weights do not show it, so all models of these names make it.
TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": True},
    "inception_v3": {"transform_input": True, "init_weights": True},
}


def find_library(arch: str, library: str = "auto") -> str:
    """Return the library that builds an architecture: ``"torchvision"`` or ``"timm"``.

    ``"auto"`` prefers torchvision, whose names ffcv-imagenet's recipes use.

    Raises
    ------
    UserError
        If no library has the architecture. The message names the nearest known ones.
    """
    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    if library in ("auto", "torchvision") and arch in torchvision_names:
        return "torchvision"
    import timm  # here, because it takes two seconds

    if library in ("auto", "timm") and timm.is_model(arch):
        return "timm"
    known = {"torchvision": torchvision_names, "timm": timm.list_models()}
    names = [*known["torchvision"], *known["timm"]] if library == "auto" else known[library]
    nearest = ", ".join(difflib.get_close_matches(arch, sorted(set(names)), n=3, cutoff=0.5))
    where = "torchvision and timm" if library == "auto" else library
    raise UserError(f"model.arch={arch} is unknown to {where}" + (f"; near it: {nearest}" if nearest else ""))


def build_model(
    arch: str,
    *,
    library: str = "auto",
    num_classes: int = 1000,
    pretrained: bool = False,
    weights: str | Path | None = None,
    ema: bool | Literal["auto"] = "auto",
    drop_path: float = 0.0,
    use_blurpool: bool = False,
    whole: bool = False,
    notices: list[str] | None = None,
) -> nn.Module:
    """Build a classifier from images (N, 3, H, W) to logits (N, num_classes).

    Parameters
    ----------
    arch, library : str
        As for `find_library`.
    num_classes : int
        Size of the head. If weights have another head size, all but the head are loaded. The head starts from small
        random weights.
    pretrained : bool
        Fetch the library's ImageNet weights: timm's default ones, torchvision's ``IMAGENET1K_V1``.
    weights : path, optional
        A local file instead; see `load_weights`.
    ema : bool or "auto"
        Take the averaged or the raw weights of that file. ``"auto"``: the averaged ones, if there are any.
    drop_path : float
        Rate of stochastic depth, for timm architectures only.
    use_blurpool : bool
        Blur the input of strided convolutions; see `apply_blurpool`.
    whole : bool
        Refuse weights that do not make a trained model: without a head, or of a network that computes something else.
    notices : list of str, optional
        Gets everything that was chosen, left out or not loaded.

    Raises
    ------
    UserError
        If the architecture is unknown, the library has no drop path, or the weights are unusable.
    """
    network: dict[str, Any] = {
        "arch": arch,
        "library": find_library(arch, library),
        "num_classes": num_classes,
        "drop_path": drop_path,
        "use_blurpool": use_blurpool,
    }
    model = _build_network(**network)
    if not (pretrained or weights):
        return model
    if pretrained:
        file, source, ema = pretrained_weights(arch, network["library"]), f"the pretrained {arch}", "auto"
    else:
        source = f"model.weights={weights}"
        file = read_weight_file(str(weights), source)
    fit, notes = load_weights(model, file, head_of(model, **network), ema=ema)
    notes += _other_network(file, fit, network, whole)
    if fit.new_head:
        had = f"a head of {fit.head_classes:,} classes" if fit.head_classes else "no head"
        had = "a head of other layers" if fit.other_head else had
        left = f"{source} has {had}, and the model has {num_classes:,} classes: {', '.join(fit.new_head)}"
        if whole:
            raise UserError(f"{left} would be random. Evaluate with data of the same classes, or train the head first")
        _make_small(model, fit.new_head)
        notes.append(f"{left} start from small random values")
    if notices is not None:
        notices += notes
    return model


@torch.no_grad()
def _make_small(model: nn.Module, head: Collection[str]) -> None:
    """Scale the initial weights of a new head on trained layers down to a standard deviation of `HEAD_STD`, in place.

    Large random logits would change the trained layers more than the head learns. For few classes, timm's EfficientNets
    have heads with a standard deviation of 0.2 and more.
    """
    for name, tensor in model.named_parameters():
        if name in head and tensor.ndim > 1 and (std := tensor.std().item()) > HEAD_STD:
            tensor.mul_(HEAD_STD / std)


def _other_network(file: WeightFile, fit: Fit, network: dict[str, Any], whole: bool) -> list[str]:
    """Return a notice if weights are of a network that computes something else; refuse them if they must be whole."""
    was = {**network, **(file.card.model if file.card is not None else {})}
    if fit.blurred:
        was["use_blurpool"] = True
    was["library"] = find_library(was["arch"], was["library"])
    ignored = ("num_classes", "drop_path")
    others = [key for key in network if key not in ignored and network[key] != was[key]]
    if not others:
        return []
    flags = " ".join(f"--{_SECTIONS.get(key, 'model')}.{key}={show(was[key])}" for key in others)
    text = f"{file.name} is of a network that computes something else with the same tensors: its own has {flags}"
    if whole:
        raise UserError(f"{text}. Pass that")
    return [text]


def _build_network(arch: str, library: str, num_classes: int, drop_path: float, use_blurpool: bool) -> nn.Module:
    """Build a classifier with initial weights."""
    if library == "torchvision" and drop_path:
        import timm

        remedy = (
            "add --model.library=timm" if timm.is_model(arch) else f"timm has no {arch}, so pass --model.drop_path=0"
        )
        raise UserError(f"model.drop_path={drop_path} needs a timm architecture: {remedy}")
    model = _library_model(arch, library, num_classes, drop_path)
    if use_blurpool:
        apply_blurpool(model)
    return model


def _library_model(arch: str, library: str, num_classes: int, drop_path: float) -> nn.Module:
    """Build an architecture with its library. A failure is the user's to correct: it is no code of this project."""
    if library == "torchvision":
        build = partial(torchvision.models.get_model, arch, weights=None, **TORCHVISION_OPTIONS.get(arch, {}))
    else:
        import timm

        build = partial(timm.create_model, arch)
    build = partial(build, num_classes=num_classes)
    try:
        return build(drop_path_rate=drop_path) if drop_path else build()
    except Exception as error:  # each architecture fails with its own kind of error
        if drop_path and _succeeds(build):
            raise UserError(
                f"model.drop_path={drop_path}: {library}'s {arch} has no drop path; pass --model.drop_path=0"
            ) from error
        raise UserError(f"{library} cannot build {arch} with {num_classes} classes ({reason_of(error)})") from error


def _succeeds(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return False
    return True


def reason_of(error: Exception) -> str:
    """Return an error's kind and the first line of its message."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def head_of(model: nn.Module, *, num_classes: int, **network: Any) -> Head:
    """Return the head of a model that `build_model` has built with the same arguments."""
    return Head(model, lambda number: build_meta_model(**network, num_classes=number), num_classes)


def pretrained_weights(arch: str, library: str) -> WeightFile:
    """Fetch the library's ImageNet weights of an architecture.

    Raises
    ------
    UserError
        If there are none, or they can be neither downloaded nor found in the library's cache.
    """
    try:
        state, name = _timm_state(arch) if library == "timm" else _torchvision_state(arch)
        return WeightFile(name, [TensorGroup("", dict(state), getattr(state, "_metadata", None))], card=None)
    except OSError as error:
        raise UserError(
            f"{library}'s weights of {arch} could not be downloaded ({reason_of(error)}): download them on another "
            "machine, and pass --model.weights=FILE in place of --model.pretrained=1"
        ) from error


def _timm_state(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    import timm

    if not timm.is_model_pretrained(arch):
        raise UserError(
            f"timm has no pretrained weights of {arch}: set model.pretrained=0, or pass --model.weights=FILE"
        )
    model: Any = timm.create_model(arch, pretrained=True)
    return model.state_dict(), f"timm's {model.pretrained_cfg.get('tag') or 'pretrained'} weights of {arch}"


def _torchvision_state(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    published = torchvision.models.get_model_weights(arch).__members__
    if "IMAGENET1K_V1" not in published:
        raise UserError(
            f"torchvision has no IMAGENET1K_V1 weights of {arch}, but {', '.join(published)}: download those, and "
            "pass --model.weights=FILE in place of --model.pretrained=1"
        )
    chosen = published["IMAGENET1K_V1"]
    try:
        return chosen.get_state_dict(progress=False, check_hash=True), f"torchvision's {chosen}"
    except OSError:
        raise
    except Exception as error:  # the unpicklers and archives raise many kinds
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
        raise UserError(
            f"torchvision's weights of {arch} are damaged ({type(error).__name__}): remove {file}, if it is there, and "
            "start again"
        ) from error


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of `build_model` that a recipe sets, without weights."""
    model = recipe.model
    return {
        "arch": model.arch,
        "library": find_library(model.arch, model.library),
        "num_classes": model.num_classes,
        "drop_path": model.drop_path,
        "use_blurpool": recipe.training.use_blurpool,
    }


def drop_path_notices(recipe: Recipe, model: nn.Module) -> list[str]:
    """Return a notice if an architecture skips residual branches in training though ``model.drop_path`` is 0."""
    if recipe.model.drop_path:
        return []
    library = find_library(recipe.model.arch, recipe.model.library)
    rates = [float(module.p) for module in model.modules() if isinstance(module, StochasticDepth)]
    if library == "timm":
        from timm.layers import DropPath  # here, because importing timm takes two seconds

        rates = [float(module.drop_prob or 0) for module in model.modules() if isinstance(module, DropPath)]
    if not any(rates):
        return []
    return [
        f"{library}'s {recipe.model.arch} skips up to {max(rates):.3g} of its residual branches in training, by a "
        "default of its own that model.drop_path=0 does not change"
    ]


def recipe_meta_model(recipe: Recipe) -> nn.Module:
    """Build the recipe's model on the meta device: it has shapes, and no values."""
    return build_meta_model(**model_arguments(recipe))


def build_meta_model(**arguments: Any) -> nn.Module:
    """Build a model on the meta device, from the arguments of `build_model`.

    Some architectures compute with values while they are built. They are built on the CPU, and then moved.
    """
    try:
        with torch.device("meta"):
            return build_model(**arguments)
    except Exception:  # each architecture fails with its own kind of error
        return build_model(**arguments).to("meta")


def model_size(model: nn.Module, resolution: int) -> str:
    """Return a model's size in words: its parameters, and the cost of one image in a forward pass.

    The model is on the meta device, so that nothing is computed. Convolutions, matrix products and attention are
    counted. A multiply-add is two floating-point operations.
    """
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.2f} M parameters"
    training = model.training
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, 3, resolution, resolution, device="meta"))
    except Exception as error:  # timm's many architectures raise many kinds of errors without data
        return f"{parameters}; the cost of an image of {resolution} px is not known: {reason_of(error)}"
    finally:
        model.train(training)
    flops = counter.get_total_flops()
    return (
        f"{parameters}; {flops / 2e9:,.3g} G multiply-adds ({flops / 1e9:,.3g} GFLOPs) an image of {resolution} px, "
        "forward"
    )


def can_compile(device: torch.device) -> bool:
    """Return True for a GPU that Triton supports."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
    )


def compiled(model: nn.Module) -> nn.Module:
    """Return a module that shares a model's tensors and runs it compiled, once for each size of images.

    The model itself is not changed: its state dict has the plain names, and a call of it compiles nothing. On a GPU,
    `imagenet_training.models.batch_norm` replaces batch norms in what is compiled.
    """
    backend: Any = "inductor"
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    if on_gpu and importlib.util.find_spec("triton"):
        from imagenet_training.models.batch_norm import backend  # Triton is not on every machine
    return torch.compile(model, dynamic=False, backend=backend)  # type: ignore[return-value]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile, or the model itself."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


class BlurPoolConv2d(nn.Conv2d):
    """A convolution whose input is first smoothed with the 3 x 3 binomial filter, against aliasing under strides.

    The filter, and the choice of the convolutions, follow ffcv-imagenet. The filter is no part of the state dict, so
    the weights keep the names of the architecture without BlurPool.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )
        self.weight, self.bias = conv.weight, conv.bias
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        blur_filter = torch.outer(row, row).expand(conv.in_channels, 1, 3, 3).clone()
        self.register_buffer("blur_filter", blur_filter, persistent=False)

    blur_filter: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        blurred = F.conv2d(input, self.blur_filter, padding=1, groups=self.in_channels)
        return super().forward(blurred)


def apply_blurpool(model: nn.Module) -> None:
    """Replace, in place, every strided convolution with at least 16 input channels by `BlurPoolConv2d`."""
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(model, name, BlurPoolConv2d(child))
        else:
            apply_blurpool(child)
