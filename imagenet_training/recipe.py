"""The strict front door to fastargs, the training recipe's keys, and the arithmetic that follows from them.

fastargs declares the keys: sections of parameters, each with a checker, a default and an explanation. Collecting them
is done here, because a mistake must stop a run before it begins: `read_settings` takes files in their order, then the
command line, and nothing else. Environment variables are never read.

    python -m imagenet_training.recipe --config-file FILE ...

checks a command line of ``train_imagenet.py`` within a second, with exit status 2 for a mistake.
"""

import difflib
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import yaml
from fastargs import Config, Param, Section, validation

COMMAND_LINE = "command line"
DEFAULT = "default"
# --resume auto
AUTO = "auto"
LR_BATCH_SIZE = 256
# Under repeated augmentation an epoch is a multiple of this many images, as that of timm's RepeatAugSampler.
REPEATED_ROUND = 256
SECONDS_TO_SPEAK = 5
# Recipes lie beside the packages, in a checkout as where they are installed.
PACKAGED = Path(__file__).resolve().parents[1]


class Mistake(ValueError):
    """Something the user can put right: what, where, and the nearest valid name or value."""


# ---------------------------------------------------------------------------------------------------------------------
# Checkers: from what YAML or the command line gave to a value, or ValueError


@dataclass(frozen=True)
class Integer(validation.Checker):
    """An integer within bounds; text such as ``"12"`` counts, ``True`` and 1.5 do not."""

    min: int | None = None
    max: int | None = None

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", str(value).strip()):
            raise ValueError
        too_small = self.min is not None and int(value) < self.min
        if too_small or (self.max is not None and int(value) > self.max):
            raise ValueError
        return int(value)

    def help(self) -> str:
        bounds = ((">=", self.min), ("<=", self.max))
        limits = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        return f"an integer {limits}".strip()


@dataclass(frozen=True)
class Number(validation.Checker):
    """A finite number within bounds; text such as ``"1e-4"``, which YAML does not take for a number, counts."""

    min: float | None = None
    max: float | None = None
    below: float | None = None

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        too_small = self.min is not None and number < self.min
        too_large = self.max is not None and number > self.max
        if too_small or too_large or (self.below is not None and number >= self.below):
            raise ValueError
        return number

    def help(self) -> str:
        bounds = ((">=", self.min), ("<=", self.max), ("<", self.below))
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        return f"a number {limits}".strip()


@dataclass(frozen=True)
class Switch(validation.Checker):
    """On or off: 1/0, true/false, yes/no, on/off in any case. ``"False"`` is off, other text is an error."""

    def check(self, value: Any) -> bool:
        word = str(value).strip().lower()
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise ValueError

    def help(self) -> str:
        return "1 or 0"


class Auto(Switch):
    """``auto``, or a `Switch`."""

    def check(self, value: Any) -> Any:
        return "auto" if str(value).strip().lower() == "auto" else super().check(value)

    def help(self) -> str:
        return "auto, 1 or 0"


@dataclass(frozen=True)
class Text(validation.Checker):
    """Text that is not empty. An integer counts (YAML takes a bare 12355 for one); other YAML types do not."""

    def check(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "text"


class Choice(validation.Checker):
    """One of a few values, told by their text: ``32`` in YAML chooses ``"32"``."""

    def __init__(self, *values: Any):
        self.values = values

    def check(self, value: Any) -> Any:
        for choice in self.values:
            if str(choice) == str(value):
                return choice
        raise ValueError

    def help(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.values)


@dataclass(frozen=True)
class Range(validation.Checker):
    """Two numbers, 0 < low <= high <= max: a YAML list, or ``0.08,1`` on the command line. Gives a tuple."""

    max: float | None = None

    def check(self, value: Any) -> tuple[float, float]:
        parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError
        low, high = (Number(max=self.max).check(part) for part in parts)
        if not 0 < low <= high:
            raise ValueError
        return low, high

    def help(self) -> str:
        return "two numbers LOW,HIGH with 0 < LOW <= HIGH" + ("" if self.max is None else f" <= {self.max:g}")


class AutoAugment(validation.Checker):
    """``trivial``, or timm's string for RandAugment, whose parts are read by those who augment."""

    def check(self, value: Any) -> str:
        if value != "trivial" and not re.fullmatch(r"rand(-[\w.]+)*", str(value)):
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "trivial, or timm's string such as rand-m7-mstd0.5-inc1"


class Course(validation.Checker):
    """Percentages at epochs: a YAML mapping, or ``10:30,25:50`` on the command line. Gives a dict in epoch order."""

    def check(self, value: Any) -> dict[int, float]:
        pairs = [part.split(":") for part in value.split(",")] if isinstance(value, str) else value
        points = [(Integer(min=1).check(epoch), Number(min=0, max=100).check(percent)) for epoch, percent in pairs]
        if not points or len(dict(points)) < len(points):
            raise ValueError
        return dict(sorted(points))

    def help(self) -> str:
        return "EPOCH: PERCENT, any number of them, each epoch >= 1 and once"


def _strict(checker: validation.Checker) -> validation.Checker:
    """The strict counterpart of one of fastargs' own checkers, any other as it is."""
    plain = {
        validation.Int: Integer(),
        validation.Float: Number(),
        validation.Bool: Switch(),
        validation.Str: Text(),
    }
    if isinstance(checker, validation.OneOf):
        return Choice(*sorted(checker.possible_values, key=str))
    if isinstance(checker, (validation.And, validation.Or)):
        return type(checker)(*map(_strict, checker.checkers))
    return plain.get(type(checker), checker)


# ---------------------------------------------------------------------------------------------------------------------
# Collecting: defaults, then files, then the command line


class Settings:
    """Checked settings: ``settings.lr.base_lr``, and where each value came from.

    Attributes
    ----------
    files : list of Path
        The configuration files in the order given.
    notices : list of str
        What the user should know though nothing is wrong.
    """

    def __init__(self, history: Mapping[str, list[tuple[Any, str]]], files: Iterable[Path]):
        self.files = list(files)
        self.notices: list[str] = []
        self._history = dict(history)
        for key, given in history.items():
            section, name = key.split(".", 1)
            if section in ("files", "notices") or hasattr(type(self), section):
                raise TypeError(f"a section cannot be named {section}: Settings has an attribute of that name")
            setattr(self.__dict__.setdefault(section, SimpleNamespace()), name, given[-1][0])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"these settings have no section {name}")

    def flat(self) -> dict[str, Any]:
        """All settings as ``{"section.key": value}``."""
        keys = (key.split(".", 1) for key in self._history)
        return {f"{section}.{name}": getattr(getattr(self, section), name) for section, name in keys}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All settings as ``{"section": {"key": value}}`` of plain YAML and JSON types."""
        nested: dict[str, dict[str, Any]] = {}
        for key, value in self.flat().items():
            section, name = key.split(".", 1)
            nested.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
        return nested

    def source(self, key: str) -> str:
        """Where a setting's value came from: ``"default"``, a file's name as given, or ``"command line"``."""
        return self._history[key][-1][1]

    def history(self) -> dict[str, list[list[Any]]]:
        """For each setting that was given, its default and all it was given in order: ``[value, source]`` each."""
        return {
            key: [[list(value) if isinstance(value, tuple) else value, source] for value, source in given]
            for key, given in self._history.items()
            if len(given) > 1
        }

    def overrides(self) -> list[str]:
        """One line for each setting given several values: the values in order, each with its source."""
        return [
            f"{key}: " + " -> ".join(f"{show(value)} ({source})" for value, source in given[1:])
            for key, given in self._history.items()
            if any(value != given[1][0] for value, _ in given[2:])
        ]


def read_settings(
    config: Config, argv: list[str], *, flags: Mapping[str, str | tuple[str, str]], description: str
) -> Settings:
    """Collect settings from files and a command line, strictly.

    Later wins: the defaults, each ``--config-file FILE`` in order, then ``--section.key VALUE`` and short flags in
    order (``--name=VALUE`` and ``--name VALUE`` are the same). ``None`` or ``null`` sets a key back to its default. A
    file such as ``rn50_configs/rsb_a1.yaml`` that is not in the current folder is taken from the recipes that come with
    the code.

    Parameters
    ----------
    config : fastargs.Config
        Declares the keys. fastargs' own checkers are applied strictly: see `Integer`, `Number`, `Switch`, `Text`.
    argv : list of str
        The command line without the program's name.
    flags : mapping
        Short flags: name to key, or, for a flag that takes no value, name to (key, value).
    description : str
        Shown by ``--help``, above the table of keys.

    Returns
    -------
    Settings

    Raises
    ------
    SystemExit
        With status 2 after one message on stderr, for any mistake; with status 0 after ``--help``.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(config, flags, description))
        raise SystemExit(0)
    try:
        return _collect(_parameters(config), argv, flags)
    except Mistake as mistake:
        refuse(mistake)


def refuse(mistake: Exception | str) -> NoReturn:
    """Say on stderr what the user can put right, and leave with exit status 2.

    Of several processes that a launcher started on one node, the first speaks. The others give it time to: a launcher
    ends them all as soon as one has left. A mistake that shows on one of the others alone is said by that one.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(SECONDS_TO_SPEAK)
        mistake = f"rank {os.environ.get('RANK')}: {mistake}"
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _parameters(config: Config) -> dict[str, Param]:
    return {".".join(path): param for path, param in config.entries.items()}


def _collect(parameters: Mapping[str, Param], argv: list[str], flags: Mapping[str, str | tuple[str, str]]) -> Settings:
    files, from_command_line = _read_command_line(parameters, argv, flags)
    history = {key: [(_default(key, param), DEFAULT)] for key, param in parameters.items()}
    given = [(key, raw, str(file), where) for file in files for key, raw, where in _read_file(parameters, file)]
    given += [(key, raw, COMMAND_LINE, where) for key, raw, where in from_command_line]
    for key, raw, source, where in given:
        history[key].append((_parse(key, parameters[key], raw, where), source))
    for key, param in parameters.items():
        if param.required and history[key][-1][0] is None:
            raise Mistake(f"{key} is not set: pass --{key}=VALUE or set it in a --config-file ({param.desc})")
    return Settings(history, files)


def _default(key: str, param: Param) -> Any:
    return None if param.default is None else _strict(param.checker).check(param.default)


def _parse(key: str, param: Param, raw: Any, where: str) -> Any:
    """Check one value; ``None`` and ``null`` stand for the default."""
    if raw is None or (isinstance(raw, str) and raw.strip().lower() in ("none", "null", "~")):
        return _default(key, param)
    checker = _strict(param.checker)
    try:
        return checker.check(raw)
    except (ValueError, TypeError, OverflowError):
        message = f"{where}: {key} must be {checker.help()}, not {raw!r}"
    if isinstance(checker, Choice):
        message += did_you_mean(str(raw), [str(value) for value in checker.values])
    raise Mistake(message)


def _read_command_line(
    parameters: Mapping[str, Param], argv: list[str], flags: Mapping[str, str | tuple[str, str]]
) -> tuple[list[Path], list[tuple[str, Any, str]]]:
    """Split a command line into configuration files and (key, raw value, where)."""
    files, given = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-C", "--config-file", "--config_file"):
            name = "config-file"
        elif not word.startswith("--") or not name:
            hint = f"; a configuration file is given as --config-file {word}" if Path(word).is_file() else ""
            raise Mistake(f"{COMMAND_LINE}: {word!r} belongs to no setting{hint}")
        target = flags.get(name, name)
        where = f"{COMMAND_LINE}, --{name}"
        if isinstance(target, tuple):
            if equals:
                raise Mistake(f"{where} takes no value; to give one, use --{target[0]}={value}")
            given.append((*target, where))
            continue
        is_file = name in ("config-file", "config_file")
        if not is_file and target not in parameters:
            names = [*flags, "config-file", "help", *parameters]
            raise Mistake(f"{COMMAND_LINE}: unknown setting --{name}{did_you_mean(name, names, '--')}")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise Mistake(f"{where} needs a value: --{name}=VALUE")
        if is_file:
            files.append(_find_file(Path(value)))
        else:
            given.append((target, value, where))
    return files, given


def _find_file(path: Path) -> Path:
    """A configuration file as it is named; where there is none, the recipe of that name that comes with the code."""
    packaged = PACKAGED / path
    return packaged if packaged.is_file() and not path.exists() else path


def _hint_at_files(path: Path) -> str:
    """``"; did you mean ...?"`` for the file of the nearest name, there or among the recipes, else what there is."""
    recipes = [recipe.relative_to(PACKAGED) for recipe in sorted(PACKAGED.glob("*_configs/*.yaml"))]
    files = {file.stem: file for file in [*recipes, *sorted(path.parent.glob("*.y*ml"))]}
    near = difflib.get_close_matches(path.stem, files, n=1)
    if near:
        return f"; did you mean {files[near[0]]}?"
    there = [str(file) for file in files.values() if file.parent == path.parent]
    return f"; there are {', '.join(there)}" if there else ""


def _read_file(parameters: Mapping[str, Param], path: Path) -> list[tuple[str, Any, str]]:
    """Read a YAML (or JSON) file of sections into (key, raw value, ``file:line``)."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise Mistake(f"{path}: not a mapping of sections to settings, such as\ntraining:\n  epochs: 100")
        return list(_walk(parameters, path, loader, root, "", {}))
    except FileNotFoundError:
        raise Mistake(f"--config-file {path}: no such file{_hint_at_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"--config-file {path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Mistake(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise Mistake(f"{path}: not valid YAML: {error}") from None


def _walk(
    parameters: Mapping[str, Param],
    path: Path,
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    prefix: str,
    lines: dict[str, int],
) -> Iterable[tuple[str, Any, str]]:
    """Go down a YAML mapping to the declared keys; ``section.key: value`` on one line is understood too."""
    for name_node, value_node in node.value:
        key = prefix + str(name_node.value)
        line = name_node.start_mark.line + 1
        where = f"{path}:{line}"
        if key in lines:
            raise Mistake(f"{where}: {key} is set twice, first in line {lines[key]}: keep one")
        lines[key] = line
        if key in parameters:
            is_course = isinstance(parameters[key].checker, Course)
            if isinstance(value_node, yaml.MappingNode) and not is_course:
                raise Mistake(f"{where}: {key} must be {_strict(parameters[key].checker).help()}, not a mapping")
            yield key, _construct(loader, value_node), where
        elif any(known.startswith(f"{key}.") for known in parameters):
            if isinstance(value_node, yaml.MappingNode):
                yield from _walk(parameters, path, loader, value_node, f"{key}.", lines)
            elif value_node.tag != "tag:yaml.org,2002:null":
                raise Mistake(f"{where}: {key} is a section and must hold settings, not a value")
        else:
            names = [*parameters, *({known.split(".")[0] for known in parameters} if not prefix else ())]
            raise Mistake(f"{where}: unknown setting {key}{did_you_mean(key, names)}")


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """The value of a node; a mapping as its pairs, so that a name given twice is not lost."""
    if isinstance(node, yaml.MappingNode):
        return [(_construct(loader, name), _construct(loader, value)) for name, value in node.value]
    try:
        return loader.construct_object(node, deep=True)
    except ValueError:  # what looks like a date and is none: let the checker see the text
        return node.value


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean training.epochs?"`` for the names nearest to ``name``, else a pointer to ``--help``.

    Names are near as a whole or in their last part, so that a key in the wrong section finds its place.
    """

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last)

    scores = sorted(((likeness(other), other) for other in names), key=lambda score: (-score[0], score[1]))
    near = [f"{prefix}{other}" for score, other in scores[:3] if score >= max(0.6, scores[0][0] - 0.1)]
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists every setting"


def show(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(show(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{name}:{show(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def help_text(config: Config, flags: Mapping[str, str | tuple[str, str]], description: str) -> str:
    """What ``--help`` prints: the description, then every key with its flag, type, default and explanation."""
    parameters = _parameters(config)
    width = max(80, shutil.get_terminal_size().columns)
    lines = [
        description.strip(),
        "",
        "--config-file FILE (or -C) reads settings from a YAML file and may be repeated. Later wins: defaults, files",
        "in order, command line in order. --section.key=VALUE and --section.key VALUE are the same; the value None",
        "restores a default. Any mistake ends with exit status 2 before anything is done.",
    ]
    section = ""
    for key, param in parameters.items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"{section}: {param.section.desc}"]
        names = [f"--{key}"]
        for flag, target in flags.items():
            if target == key:
                names.append(f"--{flag}")
            elif isinstance(target, tuple) and target[0] == key:
                names.append(f"--{flag} (sets {target[1]})")
        default = "required" if param.required else f"default {show(_default(key, param))}"
        lines.append(f"  {', '.join(names)}: {_strict(param.checker).help()}; {default}")
        lines += textwrap.wrap(param.desc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The training recipe

RECIPE = Config()


def _section(name: str, description: str, /, **parameters: Param) -> None:
    Section(name, description, config_descriptor=RECIPE).params(**parameters)


_section(
    "model",
    "the network",
    arch=Param(Text(), "architecture, by its torchvision or timm name", default="resnet50"),
    pretrained=Param(Switch(), "start from the library's ImageNet weights (downloaded)", default=0),
    weights=Param(Text(), "start from a local weights file or checkpoint"),
    library=Param(
        Choice("auto", "torchvision", "timm"),
        "who builds the architecture; auto: torchvision if it has the name, else timm",
        default="auto",
    ),
    num_classes=Param(Integer(min=1), "size of the head; the data must have as many classes", default=1000),
    drop_path=Param(Number(min=0, below=1), "rate of stochastic depth (timm architectures)", default=0.0),
)
_section(
    "resolution",
    "side of the training crops, by epoch",
    min_res=Param(Integer(min=1), "until and at epoch start_ramp (px)", default=160),
    max_res=Param(Integer(min=1), "from epoch end_ramp on (px)", default=160),
    start_ramp=Param(Integer(), "last epoch at min_res; from here linear, in multiples of 32 px", default=0),
    end_ramp=Param(Integer(), "first epoch at max_res", default=0),
)
_section(
    "data",
    "what is read",
    train_dataset=Param(Text(), ".beton file of the training split", default="/fsx/ns1/train.beton"),
    val_dataset=Param(Text(), ".beton file of the validation split", default="/fsx/ns1/val.beton"),
    num_workers=Param(
        Integer(min=-1), "threads a rank; -1: all CPUs allowed, shared by the ranks of the node", default=-1
    ),
    in_memory=Param(Switch(), "the dataset fits in memory: leave caching to the operating system", default=1),
    order=Param(
        Choice("random", "quasi_random"),
        "order of the training samples; quasi_random reads a page at a time, for files larger than memory",
        default="random",
    ),
    gpu=Param(Integer(), "accepted, with a notice, because ffcv-imagenet's rn18 recipes set it; nothing reads it"),
)
_section(
    "augmentation",
    "what happens to training images",
    crop_scale=Param(Range(max=1), "area of a random crop, as a share of the image", default="0.08,1"),
    crop_ratio=Param(Range(), "width / height of a random crop", default="0.75,1.3333"),
    flip=Param(Number(min=0, max=1), "probability of a horizontal flip", default=0.5),
    interpolation=Param(Choice("bilinear", "bicubic"), "of the resampling to size", default="bilinear"),
    mixup_alpha=Param(Number(min=0), "Mixup's lambda is drawn from Beta(alpha, alpha); 0: no Mixup", default=0.0),
    cutmix_alpha=Param(Number(min=0), "CutMix's lambda is drawn from Beta(alpha, alpha); 0: no CutMix", default=0.0),
    mix_prob=Param(Number(min=0, max=1), "probability that a batch is mixed at all", default=1.0),
    switch_prob=Param(Number(min=0, max=1), "probability of CutMix where both are on", default=0.5),
    mix_per=Param(
        Choice("batch", "element"), "one draw of lambda and box for each batch or each image", default="batch"
    ),
    auto_augment=Param(AutoAugment(), "TrivialAugmentWide, or RandAugment, between crop and mixing; None: neither"),
    erasing=Param(Number(min=0, max=1), "probability that a random rectangle of an image is erased", default=0.0),
    repeats=Param(
        Integer(min=1), "copies of an image, augmented differently, in and across the ranks' batches", default=1
    ),
)
_section(
    "lr",
    "learning rate",
    lr=Param(Number(min=0), "peak learning rate, whatever the batch size; None: scaled linearly from base_lr"),
    base_lr=Param(Number(min=0), "peak learning rate for every 256 images of the global batch", default=0.5),
    lr_schedule_type=Param(Choice("cyclic", "step", "cosine"), "shape over the epochs", default="cyclic"),
    lr_peak_epoch=Param(Integer(min=0), "cyclic: linear to the peak at this epoch, then linear to 0", default=2),
    step_ratio=Param(Number(min=0), "step: factor after every step_length epochs", default=0.1),
    step_length=Param(Integer(min=1), "step: epochs between factors", default=30),
    warmup_epochs=Param(Number(min=0), "cosine and step: epochs of linear warm-up", default=0.0),
    warmup_lr=Param(Number(min=0, max=1), "warm-up starts at this share of the peak", default=0.0),
    min_lr=Param(Number(min=0), "cosine: learning rate at the end", default=0.0),
)
_section(
    "training",
    "optimisation",
    eval_only=Param(Switch(), "evaluate the weights at hand and stop", default=0),
    preview=Param(Text(), "draw training images as the model gets them into this PNG and stop"),
    report=Param(Text(), "with eval_only: write a report of the evaluation, an HTML page, into this file"),
    dry_run=Param(Switch(), "show the resolved recipe and its arithmetic and stop; needs no data", default=0),
    batch_size=Param(Integer(min=1), "images per GPU and batch", default=512),
    accumulation=Param(Integer(min=1), "batches per optimizer step", default=1),
    loss=Param(
        Choice("cross_entropy", "bce"), "cross entropy, or binary cross entropy of each class", default="cross_entropy"
    ),
    bce_threshold=Param(Number(min=0, below=1), "bce: targets above it count as 1, others as 0; None: as they are"),
    optimizer=Param(Choice("sgd", "lamb", "adamw"), "optimizer", default="sgd"),
    momentum=Param(Number(min=0, below=1), "SGD's momentum", default=0.9),
    nesterov=Param(Switch(), "SGD's momentum is Nesterov's", default=0),
    weight_decay=Param(Number(min=0), "weight decay", default=4e-5),
    bn_wd=Param(Number(min=0), "weight decay of one-dimensional parameters (norm, bias); None: as weight_decay"),
    epochs=Param(Integer(min=1), "passes over the training split", default=30),
    label_smoothing=Param(Number(min=0, below=1), "share of the target spread over all classes", default=0.1),
    distributed=Param(Switch(), "start dist.world_size processes, where torchrun has not", default=0),
    use_blurpool=Param(Switch(), "blur before strided convolutions", default=0),
    precision=Param(Choice("16-mixed", "bf16-mixed", "32"), "arithmetic", default="16-mixed"),
    tf32=Param(
        Switch(), "products of 32-bit numbers in TF32 (10 bits of mantissa) where the GPU's tensor cores can", default=1
    ),
    compile=Param(
        Auto(), "torch.compile the model; auto: on a GPU, for runs long enough to gain from it", default="auto"
    ),
    grad_clip=Param(Number(min=0), "largest norm of the gradient; 0: no clipping", default=0.0),
    agc=Param(
        Number(min=0),
        "adaptive clipping: largest norm of each unit's gradient, as a share of its weights'; 0: no clipping",
        default=0.0,
    ),
    ema_decay=Param(
        Number(min=0, below=1), "decay of the moving average of weights, which is then evaluated; 0: none", default=0.0
    ),
    ema_every=Param(Integer(min=1), "optimizer steps between updates of the moving average", default=1),
    ema_rescale=Param(
        Switch(), "1 - ema_decay is stated for one image and one epoch, and scaled as torchvision does", default=0
    ),
    channels_last=Param(Switch(), "memory format of images and weights", default=1),
    seed=Param(Integer(min=0, max=2**63 - 1), "of initial weights, order, crops, mixing", default=0),
    resume=Param(
        Text(), "checkpoint to go on from, such as checkpoints/last.ckpt; auto: the newest in logging.folder, if any"
    ),
    save_every_steps=Param(Integer(min=0), "save within an epoch every so many steps; 0: at its end only", default=0),
)
_section(
    "validation",
    "evaluation after each epoch",
    batch_size=Param(Integer(min=1), "images per GPU and batch", default=512),
    resolution=Param(Integer(min=1), "side of the centre crop as the network sees it (px)", default=224),
    lr_tta=Param(Switch(), "average the logits of each image and its mirror image", default=1),
    crop_ratio=Param(
        Number(min=0.01, max=1), "side of the centre crop, as a share of the image's shorter side", default=0.875
    ),
    resize=Param(Integer(min=1), "instead of crop_ratio: the shorter side before the centre crop (px), as torchvision"),
    interpolation=Param(Choice("bilinear", "bicubic"), "of the resampling to size", default="bilinear"),
)
_section(
    "logging",
    "what a run leaves behind",
    folder=Param(Text(), "holds logs/ and checkpoints/", default="."),
    log_level=Param(Integer(min=0), "0: evaluate and log at the end only; 1: every epoch", default=1),
    log_every=Param(Integer(min=1), "optimizer steps between progress lines", default=50),
)
_section(
    "expected",
    "what the recipe's source reports, for comparison: top-1 and top-5 in percent after so many epochs",
    train_acc1=Param(Course(), "top-1 on the training split"),
    val_acc1=Param(Course(), "top-1 on the validation split"),
    val_acc5=Param(Course(), "top-5 on the validation split"),
    global_batch_size=Param(Integer(min=1), "images per optimizer step there"),
)
_section(
    "wandb",
    "Weights & Biases",
    enable=Param(Switch(), "log there; offline where no key is found", default=1),
    project=Param(Text(), "project", default="imagenet"),
    name=Param(Text(), "name of the run; None: chosen by W&B"),
)
_section(
    "dist",
    "processes, where training.distributed is on and torchrun has not started them",
    world_size=Param(Integer(min=1), "number of processes, one a GPU", default=1),
    address=Param(Text(), "address of the first node", default="localhost"),
    port=Param(Integer(min=1, max=65535), "port there", default=12355),
)

FLAGS: dict[str, str | tuple[str, str]] = {
    "batch_size": "training.batch_size",
    "lr": "lr.lr",
    "epochs": "training.epochs",
    "num_workers": "data.num_workers",
    "precision": "training.precision",
    "resume": "training.resume",
    "wandb_project": "wandb.project",
    "wandb_name": "wandb.name",
    "no_wandb": ("wandb.enable", "0"),
    "dry_run": ("training.dry_run", "1"),
    "preview": "training.preview",
    "eval_only": ("training.eval_only", "1"),
    "report": "training.report",
}
DESCRIPTION = """Train an image classifier from a recipe.

python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml
torchrun --nproc_per_node=8 train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml"""


def read_recipe(argv: list[str]) -> Settings:
    """Read the training recipe: `read_settings` of `RECIPE`, then the checks that take two keys or the disk.

    Raises
    ------
    SystemExit
        With status 2 after one message on stderr, for any mistake; with status 0 after ``--help``.
    """
    recipe = read_settings(RECIPE, argv, flags=FLAGS, description=DESCRIPTION)
    try:
        check_recipe(recipe)
    except Mistake as mistake:
        refuse(mistake)
    recipe.notices.extend(_find_notices(recipe))
    return recipe


def check_recipe(recipe: Settings) -> None:
    """Check what no single key shows.

    Raises
    ------
    ValueError
        Naming the keys at odds and where their values came from.
    """

    def said(key: str) -> str:
        return f"{key}={show(recipe.flat()[key])} ({recipe.source(key)})"

    lr, training, model, resolution = recipe.lr, recipe.training, recipe.model, recipe.resolution
    if resolution.min_res > resolution.max_res:
        raise Mistake(f"{said('resolution.min_res')} is larger than {said('resolution.max_res')}")
    if lr.warmup_epochs and lr.lr_schedule_type == "cyclic":
        raise Mistake(
            f"{said('lr.warmup_epochs')} has no place in {said('lr.lr_schedule_type')}, which warms up until "
            "lr.lr_peak_epoch: set one of the two, or --lr.warmup_epochs=0"
        )
    if lr.warmup_epochs and lr.warmup_epochs >= training.epochs:
        raise Mistake(
            f"{said('lr.warmup_epochs')} must be less than {said('training.epochs')}: pass --lr.warmup_epochs=0"
        )
    if training.nesterov and training.optimizer != "sgd":
        raise Mistake(f"{said('training.nesterov')} has no place in {said('training.optimizer')}: it is SGD's")
    if training.nesterov and not training.momentum:
        raise Mistake(f"{said('training.nesterov')} needs a momentum, not {said('training.momentum')}")
    if training.bce_threshold is not None and training.loss != "bce":
        raise Mistake(f"{said('training.bce_threshold')} has no place in {said('training.loss')}: it is bce's")
    if training.ema_rescale and not training.ema_decay:
        raise Mistake(f"{said('training.ema_rescale')} needs a moving average: set training.ema_decay")
    if recipe.augmentation.repeats > 1 and recipe.data.order != "random":
        raise Mistake(f"{said('augmentation.repeats')} needs --data.order=random, not {said('data.order')}")
    if recipe.validation.resize is not None and recipe.validation.resize < recipe.validation.resolution:
        raise Mistake(f"{said('validation.resize')} is smaller than {said('validation.resolution')}, the crop from it")
    if training.report and not training.eval_only:
        raise Mistake(
            f"{said('training.report')} needs --eval_only; a run that trains leaves report.html in its folder"
        )
    if training.report and not Path(training.report).absolute().parent.is_dir():
        raise Mistake(f"{said('training.report')}: there is no folder {Path(training.report).parent}")
    if model.pretrained and model.weights:
        raise Mistake(f"{said('model.pretrained')} and {said('model.weights')} exclude each other: set one")
    for key in ("model.weights", "training.resume"):
        path = recipe.flat()[key]
        if path is not None and (key, path) != ("training.resume", AUTO) and not Path(path).is_file():
            raise Mistake(f"{said(key)}: no such file")


def _find_notices(recipe: Settings) -> Iterable[str]:
    lr, training, model = recipe.lr, recipe.training, recipe.model
    expected = _expected(recipe)
    if expected and not courses(recipe):
        yield (
            f"the expected accuracies are those of {max(map(max, expected.values()))} epochs; this run has "
            f"{training.epochs} and is not compared with them"
        )
    if recipe.data.gpu is not None:
        yield f"data.gpu={recipe.data.gpu} ({recipe.source('data.gpu')}) has no effect here"
    if lr.lr_schedule_type == "cyclic" and lr.lr_peak_epoch >= training.epochs:
        yield (
            f"the learning rate will not come down from its peak: lr.lr_peak_epoch={lr.lr_peak_epoch} is not before "
            f"training.epochs={training.epochs}"
        )
    if training.eval_only and not (model.pretrained or model.weights or training.resume):
        yield "evaluating untrained weights: model.weights, model.pretrained or --resume give others"


def _expected(recipe: Settings) -> dict[str, dict[int, float]]:
    expected = {
        "train/acc1": recipe.expected.train_acc1,
        "val/acc1": recipe.expected.val_acc1,
        "val/acc5": recipe.expected.val_acc5,
    }
    return {name: course for name, course in expected.items() if course}


def courses(recipe: Settings) -> dict[str, dict[int, float]]:
    """The accuracies to compare a run with, in percent by epochs finished, under the names of the run's metrics.

    None where they go beyond the run's epochs: a shorter schedule passes through other values.
    """
    expected = _expected(recipe)
    return {} if any(max(course) > recipe.training.epochs for course in expected.values()) else expected


# ---------------------------------------------------------------------------------------------------------------------
# What follows from a recipe


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, once its data and its processes are known.

    Attributes
    ----------
    world_size, batch_size, accumulation : int
        Ranks, images a rank and batch, batches an optimizer step.
    global_batch_size : int
        Images an optimizer step: the product of the three.
    lr : float
        Peak learning rate.
    lr_arithmetic : str
        How it came about, such as ``0.5 x 128 / 256 = 0.25``.
    epochs, steps_per_epoch, total_steps : int
        Optimizer steps. What is left of an epoch after its last full step is not trained on.
    num_train, num_val : int
        Images of the two splits.
    ema_decay : float
        Of the moving average at each of its updates; 0 for none.
    notices : tuple of str
        What the user should know though nothing is wrong.
    """

    world_size: int
    batch_size: int
    accumulation: int
    global_batch_size: int
    lr: float
    lr_arithmetic: str
    epochs: int
    steps_per_epoch: int
    total_steps: int
    num_train: int
    num_val: int
    ema_decay: float
    notices: tuple[str, ...]


def plan(recipe: Settings, *, world_size: int, num_train: int, num_val: int) -> Plan:
    """Work out a run's batches, steps and learning rate.

    The learning rate scales linearly (Goyal et al. 2017, arXiv 1706.02677): ``base_lr * global_batch_size / 256``,
    unless ``lr.lr`` is set.

    Parameters
    ----------
    recipe : Settings
    world_size : int
        Processes that train.
    num_train, num_val : int
        Images of the two splits.

    Raises
    ------
    ValueError
        Where an epoch has not one optimizer step (unless the run only evaluates), a split has no images, or the
        schedule would rise instead of fall.
    """
    training = recipe.training
    global_batch_size = training.batch_size * world_size * training.accumulation
    seen = num_train
    if recipe.augmentation.repeats > 1 and num_train >= REPEATED_ROUND:
        seen = num_train // REPEATED_ROUND * REPEATED_ROUND
    steps_per_epoch = seen // (training.batch_size * world_size) // training.accumulation
    if num_val < 1:
        raise ValueError(f"{recipe.data.val_dataset} has no images")
    if steps_per_epoch < 1 and not training.eval_only:
        fitting = num_train // (world_size * training.accumulation)
        hint = f"pass --batch_size {fitting} or less" if fitting else "use fewer processes or less accumulation"
        raise ValueError(
            f"{recipe.data.train_dataset} has {num_train:,} images, fewer than the {global_batch_size:,} of one "
            f"optimizer step ({_batch_arithmetic(training.batch_size, world_size, training.accumulation)}): {hint}"
        )
    lr, arithmetic = recipe.lr.lr, f"{show(recipe.lr.lr)} (lr.lr, {recipe.source('lr.lr')})"
    if lr is None:
        lr = recipe.lr.base_lr * global_batch_size / LR_BATCH_SIZE
        arithmetic = f"{show(recipe.lr.base_lr)} x {global_batch_size} / {LR_BATCH_SIZE} = {lr:.6g}"
    ema_decay = training.ema_decay
    if training.ema_rescale:
        ema_decay = rescaled_ema_decay(
            ema_decay, every=training.ema_every, global_batch_size=global_batch_size, epochs=training.epochs
        )
    if recipe.lr.min_lr > lr:
        raise ValueError(f"lr.min_lr={show(recipe.lr.min_lr)} is above the peak learning rate, {arithmetic}")
    return Plan(
        world_size=world_size,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        global_batch_size=global_batch_size,
        lr=lr,
        lr_arithmetic=arithmetic,
        epochs=training.epochs,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * training.epochs,
        num_train=num_train,
        num_val=num_val,
        ema_decay=ema_decay,
        notices=tuple(_batch_notices(recipe, world_size, global_batch_size)),
    )


def keep_global_batch(recipe: Settings, before: Mapping[str, Any], *, world_size: int) -> None:
    """Give a run that goes on with other processes the global batch it had, by other batches and accumulation.

    The recipe's batch size per process stays where it divides, and is never exceeded. A batch size or an accumulation
    that was changed since is the user's choice and stays.

    Parameters
    ----------
    recipe : Settings
        Changed in place, with a notice of the arithmetic.
    before : mapping
        The checkpoint's ``recipe``, ``asked_batch`` (its batch size and accumulation as asked for), ``world_size`` and
        ``global_batch_size``.
    world_size : int
        Processes that go on.

    Raises
    ------
    ValueError
        Where these processes cannot have that global batch, with the numbers of processes that can.
    """
    training, wanted, was = recipe.training, before["global_batch_size"], before["recipe"]["training"]
    asked = [training.batch_size, training.accumulation]
    if before.get("asked_batch", asked) != asked or training.batch_size * training.accumulation * world_size == wanted:
        return
    shared = _shared_out(wanted, world_size, training.batch_size)
    arithmetic = _batch_arithmetic(was["batch_size"], before["world_size"], was["accumulation"])
    if shared is None:
        able = [n for n in range(1, wanted + 1) if _shared_out(wanted, n, training.batch_size)]
        near = [n for n in able if n < world_size][-2:] + [n for n in able if n > world_size][:1]
        raise ValueError(
            f"the run was saved at a global batch of {arithmetic} = {wanted}, which {world_size} processes cannot "
            f"share in batches near {training.batch_size}: start {' or '.join(map(str, near))} processes; another "
            "--batch_size changes the global batch, and with it learning rate and steps"
        )
    training.batch_size, training.accumulation = shared
    recipe.notices.append(
        f"the run was saved at a global batch of {arithmetic} = {wanted}; this one keeps it with "
        f"{_batch_arithmetic(training.batch_size, world_size, training.accumulation)}"
    )


def _shared_out(global_batch_size: int, world_size: int, batch_size: int) -> tuple[int, int] | None:
    """The largest batch, not above ``batch_size``, and its accumulation that make up a global batch.

    None where there is none, or only one so small that BatchNorm would see other statistics: under half of what fits.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        return None
    largest = min(batch_size, share)
    fitting = next(size for size in range(largest, 0, -1) if share % size == 0)
    return (fitting, share // fitting) if 2 * fitting >= largest else None


def rescaled_ema_decay(decay: float, *, every: int, global_batch_size: int, epochs: int) -> float:
    """A decay stated for one image and one epoch, rescaled to a run's updates as torchvision's references do.

    ``alpha' = min(1, (1 - decay) * global_batch_size * every / epochs)``, and the decay is ``1 - alpha'``.
    """
    return 1.0 - min(1.0, (1.0 - decay) * global_batch_size * every / epochs)


def _batch_notices(recipe: Settings, world_size: int, global_batch_size: int) -> Iterable[str]:
    """Whether the global batch is the one that the recipe was published with, and what would make it so."""
    training, published = recipe.training, recipe.expected.global_batch_size
    if published in (None, global_batch_size) or training.eval_only:
        return
    per_accumulation = training.batch_size * world_size
    accumulation, left = divmod(published, per_accumulation)
    batch_size, rest = divmod(published, world_size * training.accumulation)
    remedy = ""
    if accumulation and not left:
        remedy = f"; --training.accumulation={accumulation} makes it the same"
    elif batch_size and not rest:
        remedy = f"; --batch_size {batch_size} makes it the same"
    yield f"the global batch is {global_batch_size}, and the recipe was published with {published}{remedy}"


def _batch_arithmetic(batch_size: int, world_size: int, accumulation: int) -> str:
    return f"{batch_size} (batch size) x {world_size} (processes) x {accumulation} (accumulation)"


def summary(recipe: Settings, plan: Plan, size: str = "") -> str:
    """What a run is going to do, and the resolved recipe with the source of every value that is not a default.

    The second half is YAML that reads back as the same recipe. ``size`` is the model's, in words.
    """
    files = ", then ".join(str(path) for path in recipe.files) or "no file: defaults"
    rows = [
        ("recipe", files),
        *(("  override", line) for line in recipe.overrides()),
        ("model", _model_line(recipe, plan)),
        *([("size", size)] if size else []),
        ("train", f"{recipe.data.train_dataset}, {plan.num_train:,} images, {recipe.data.order} order"),
        ("val", f"{recipe.data.val_dataset}, {plan.num_val:,} images"),
        ("crops", _crops_line(recipe)),
        ("augmentation", _augmentation_line(recipe)),
        ("mixing", _mixing_line(recipe)),
        ("loss", _loss_line(recipe)),
        (
            "global batch",
            f"{_batch_arithmetic(plan.batch_size, plan.world_size, plan.accumulation)} = {plan.global_batch_size}",
        ),
        ("lr", plan.lr_arithmetic),
        ("schedule", _schedule_line(recipe)),
        ("optimizer", _optimizer_line(recipe)),
        ("length", f"{plan.epochs} epochs x {plan.steps_per_epoch:,} steps = {plan.total_steps:,} steps"),
        ("precision", recipe.training.precision),
    ]
    table = [f"{name:<14}{line}" for name, line in rows]
    return "\n".join([*table, "", "# resolved recipe", *_resolved_lines(recipe)])


def _resolved_lines(recipe: Settings) -> Iterable[str]:
    for section, values in recipe.to_dict().items():
        yield f"{section}:"
        for name, value in values.items():
            if (section, name) in (("training", "dry_run"), ("training", "preview"), ("training", "report")):
                continue
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
            source = recipe.source(f"{section}.{name}")
            yield f"  {name}: {text}" if source == DEFAULT else f"  {f'{name}: {text}':<40}  # {source}"


def _model_line(recipe: Settings, plan: Plan) -> str:
    model, training = recipe.model, recipe.training
    start = "pretrained" if model.pretrained else f"weights of {model.weights}" if model.weights else "from scratch"
    parts = [
        model.arch,
        f"{model.num_classes} classes",
        f"resumed from {training.resume}" if training.resume else start,
    ]
    parts += ["BlurPool"] * training.use_blurpool
    parts += [f"drop path {show(model.drop_path)}"] * bool(model.drop_path)
    parts += [f"moving average {plan.ema_decay:.6g} every {training.ema_every} steps"] * bool(training.ema_decay)
    return ", ".join(parts)


def _crops_line(recipe: Settings) -> str:
    resolution, augmentation, validation_ = recipe.resolution, recipe.augmentation, recipe.validation
    size = f"{resolution.min_res} px"
    if resolution.min_res < resolution.max_res:
        size += f" to epoch {resolution.start_ramp}, {resolution.max_res} px from epoch {resolution.end_ramp}"
    ratio = f"ratio {show(validation_.crop_ratio)}"
    if validation_.resize is not None:
        ratio = f"from {validation_.resize} px"
    return (
        f"{size}, {augmentation.interpolation}, scale {show(augmentation.crop_scale)}, flip {show(augmentation.flip)}; "
        f"validation {validation_.resolution} px, {ratio}, {validation_.interpolation}"
        + ", both flips"
        * validation_.lr_tta
    )


def _augmentation_line(recipe: Settings) -> str:
    augmentation = recipe.augmentation
    named = {None: [], "trivial": ["TrivialAugmentWide"]}
    parts = list(named.get(augmentation.auto_augment, [f"RandAugment {augmentation.auto_augment}"]))
    parts += [f"erasing {show(augmentation.erasing)}"] * bool(augmentation.erasing)
    parts += [f"{augmentation.repeats} copies of each image"] * (augmentation.repeats > 1)
    return ", ".join(parts or ["none"])


def _loss_line(recipe: Settings) -> str:
    training = recipe.training
    if training.loss == "cross_entropy":
        return "cross entropy"
    threshold = f", targets above {show(training.bce_threshold)} count as 1" * (training.bce_threshold is not None)
    return f"binary cross entropy{threshold}"


def _mixing_line(recipe: Settings) -> str:
    augmentation = recipe.augmentation
    alphas = (("Mixup", augmentation.mixup_alpha), ("CutMix", augmentation.cutmix_alpha))
    parts = [f"{name} {show(alpha)}" for name, alpha in alphas if alpha] or ["none"]
    if parts != ["none"]:
        parts.append(f"probability {show(augmentation.mix_prob)} per {augmentation.mix_per}")
    return ", ".join([*parts, f"label smoothing {show(recipe.training.label_smoothing)}"])


def _schedule_line(recipe: Settings) -> str:
    lr = recipe.lr
    warmup = f" after {show(lr.warmup_epochs)} warm-up epochs" if lr.warmup_epochs else ""
    return {
        "cosine": f"cosine{warmup}, to {show(lr.min_lr)}",
        "step": f"step{warmup}, x {show(lr.step_ratio)} every {lr.step_length} epochs",
        "cyclic": f"cyclic, peak at epoch {lr.lr_peak_epoch}, to 0",
    }[lr.lr_schedule_type]


def _optimizer_line(recipe: Settings) -> str:
    training = recipe.training
    parts = [training.optimizer]
    parts += [f"momentum {show(training.momentum)}" + " (Nesterov)" * training.nesterov] * (parts == ["sgd"])
    parts.append(f"weight decay {show(training.weight_decay)}")
    parts += [f"{show(training.bn_wd)} on one-dimensional parameters"] * (training.bn_wd is not None)
    parts += [f"gradient clipped to {show(training.grad_clip)}"] * bool(training.grad_clip)
    parts += [f"each unit's to {show(training.agc)} of its weights"] * bool(training.agc)
    return ", ".join(parts)


if __name__ == "__main__":
    read_recipe(sys.argv[1:])
