"""Checkers of settings: each turns the text of a file or of the command line into a value, or refuses it."""

import math
import re
from dataclasses import dataclass
from typing import Any

from fastargs import Config, Param, validation


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


def strict(checker: validation.Checker) -> validation.Checker:
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
        return type(checker)(*map(strict, checker.checkers))
    return plain.get(type(checker), checker)


def parameters_of(config: Config) -> dict[str, Param]:
    """Return the declared parameters by ``section.key``."""
    return {".".join(path): param for path, param in config.entries.items()}


def default_of(key: str, param: Param) -> Any:
    return None if param.default is None else strict(param.checker).check(param.default)


def show(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(show(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{name}:{show(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)
