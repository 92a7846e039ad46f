"""Checkers of settings. Each turns what YAML or the command line gave into a value, or raises ValueError."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from fastargs import validation

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)


class Checker(ABC, Generic[Value_co]):
    """Base class of the checkers. fastargs takes them for its own, and mypy knows what they return."""

    takes_mapping: ClassVar[bool] = False
    """If true, a YAML mapping is given to `check` as a list of pairs. Otherwise a mapping is an error."""

    @abstractmethod
    def check(self, value: Any) -> Value_co:
        """Return the value of a setting.

        Raises
        ------
        ValueError, TypeError, OverflowError
            If the value is of another kind or out of bounds. The caller reports the setting and its place.
        """

    @abstractmethod
    def help(self) -> str:
        """Return the kind of value in words, as in "lr.lr must be a number >= 0"."""


validation.Checker.register(Checker)  # fastargs has no types, so a subclass of its class would have none either


@dataclass(frozen=True)
class Integer(Checker[int]):
    """An integer within bounds. Text such as ``"12"`` is accepted, ``True`` and 1.5 are not."""

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
class AutoInteger(Checker[int | Literal["auto"]]):
    """The word ``auto``, or an `Integer`."""

    min: int | None = None

    def check(self, value: Any) -> int | Literal["auto"]:
        return "auto" if str(value).strip().lower() == "auto" else Integer(self.min).check(value)

    def help(self) -> str:
        return f"auto, or {Integer(self.min).help()}"


@dataclass(frozen=True)
class Number(Checker[float]):
    """A finite number within bounds. Text such as ``"1e-4"`` is accepted, since YAML reads it as text."""

    min: float | None = None
    max: float | None = None
    below: float | None = None
    above: float | None = None

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        is_small = (self.min is not None and number < self.min) or (self.above is not None and number <= self.above)
        is_large = (self.max is not None and number > self.max) or (self.below is not None and number >= self.below)
        if not math.isfinite(number) or is_small or is_large:
            raise ValueError
        return number

    def help(self) -> str:
        bounds = ((">=", self.min), (">", self.above), ("<=", self.max), ("<", self.below))
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        return f"a number {limits}".strip()


@dataclass(frozen=True)
class Switch(Checker[bool]):
    """On or off: 1/0, true/false, yes/no, on/off in any case. ``"False"`` is off. Other text is an error."""

    def check(self, value: Any) -> bool:
        word = str(value).strip().lower()
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise ValueError

    def help(self) -> str:
        return "1 or 0"


@dataclass(frozen=True)
class Auto(Checker[bool | Literal["auto"]]):
    """The word ``auto``, or a `Switch`."""

    def check(self, value: Any) -> bool | Literal["auto"]:
        return "auto" if str(value).strip().lower() == "auto" else Switch().check(value)

    def help(self) -> str:
        return "auto, 1 or 0"


@dataclass(frozen=True)
class Text(Checker[str]):
    """Text that is not empty. An integer is accepted (YAML reads a bare 12355 as one), other YAML types are not."""

    def check(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "text"


class Choice(Checker[Value]):
    """One of a few values, compared by their text: ``32`` in YAML chooses ``"32"``."""

    def __init__(self, *values: Value):
        self.values = values

    def check(self, value: Any) -> Value:
        for choice in self.values:
            if str(choice) == str(value):
                return choice
        raise ValueError

    def help(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.values)


def _parts(value: Any) -> Sequence[Any]:
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ValueError
    return parts


@dataclass(frozen=True)
class Range(Checker[tuple[float, float]]):
    """Two numbers, 0 < low <= high <= max: a YAML list, or ``0.08,1`` on the command line."""

    max: float | None = None

    def check(self, value: Any) -> tuple[float, float]:
        low, high = (Number(max=self.max).check(part) for part in _parts(value))
        if not 0 < low <= high:
            raise ValueError
        return low, high

    def help(self) -> str:
        return "two numbers LOW,HIGH with 0 < LOW <= HIGH" + ("" if self.max is None else f" <= {self.max:g}")


@dataclass(frozen=True)
class Channels(Checker[tuple[float, float, float] | Literal["auto"]]):
    """The word ``auto``, or a number from 0 to 1 for each of three channels: a list, or ``0.5,0.5,0.5``."""

    positive: bool = False

    def check(self, value: Any) -> tuple[float, float, float] | Literal["auto"]:
        if str(value).strip().lower() == "auto":
            return "auto"
        red, green, blue = (Number(min=0, max=1).check(part) for part in _parts(value))
        if self.positive and not min(red, green, blue):
            raise ValueError
        return red, green, blue

    def help(self) -> str:
        return f"auto, or three numbers R,G,B {'> 0' if self.positive else '>= 0'} and <= 1"


class Course(Checker[dict[int, float]]):
    """Percentages at epochs, in the order of the epochs: a YAML mapping, or ``10:30,25:50`` on the command line."""

    takes_mapping = True

    def check(self, value: Any) -> dict[int, float]:
        pairs = [part.split(":") for part in value.split(",")] if isinstance(value, str) else value
        points = [(Integer(min=1).check(epoch), Number(min=0, max=100).check(percent)) for epoch, percent in pairs]
        if not points or len(dict(points)) < len(points):
            raise ValueError
        return dict(sorted(points))

    def help(self) -> str:
        return "EPOCH: PERCENT, any number of them, each epoch >= 1 and once"


def show(value: Any) -> str:
    """Return a value as a user would type it on the command line."""
    if isinstance(value, tuple):
        return ",".join(show(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{name}:{show(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)
