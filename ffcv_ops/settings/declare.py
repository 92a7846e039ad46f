"""The declaration of settings: frozen dataclasses, and the sections and parameters of fastargs made from them."""

import ast
import inspect
import sys
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_type_hints, overload

from fastargs import Config, Param, Section

from ffcv_ops.settings.fields import Checker, Value


@overload
def setting(checker: Checker[Value], *, default: Value) -> Value: ...


@overload
def setting(checker: Checker[Value], *, required: Literal[True]) -> Value: ...


@overload
def setting(checker: Checker[Value]) -> Value | None: ...


def setting(checker: Checker[Any], *, default: Any = None, required: bool = False) -> Any:
    """Declare a field of a section, explained by a docstring below the field.

    Parameters
    ----------
    checker : Checker
        Kind and bounds of the value.
    default : optional
        The value if the user gives none. Without a default, the value is None.
    required : bool
        If true, the user must give a value. Such fields come before those with a default.
    """
    param = Param(checker, default=default, required=required)
    return field(default=MISSING if required else default, metadata={"param": param})


def sections_of(declared: type) -> dict[str, type]:
    """Return the sections of a settings class by name: its fields that are dataclasses."""
    return {
        name: hint for name, hint in get_type_hints(declared).items() if isinstance(hint, type) and is_dataclass(hint)
    }


@cache
def declare(declared: type) -> Config:
    """Return the fastargs declaration of a settings class. Raise TypeError if a field has no docstring below it."""
    config = Config()
    for name, section in sections_of(declared).items():
        explanations = _read_explanations(section)
        params = {}
        for each in fields(section):
            if each.name not in explanations:
                raise TypeError(f"{section.__qualname__}.{each.name} needs a docstring below it")
            params[each.name] = each.metadata["param"]
            params[each.name].desc = explanations[each.name]
        Section(name, " ".join(str(section.__doc__).split()), config_descriptor=config).params(**params)
    return config


def parameters_of(declared: type) -> dict[str, Param]:
    """Return the fastargs parameters of a settings class by ``section.key``."""
    return {".".join(path): param for path, param in declare(declared).entries.items()}


def _read_explanations(section: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class by name, from the source, since Python drops them."""
    body = _class_bodies(section.__module__)[section.__qualname__.rpartition(".")[2]]
    return {
        ast.unparse(statement.target): " ".join(str(below.value.value).split())
        for statement, below in zip(body, body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Return the statements in the classes of a module by name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
