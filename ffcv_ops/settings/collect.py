"""Settings collected from defaults, then files, then the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fastargs import Param

from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.settings.command_line import COMMAND_LINE, Flags, read_command_line
from ffcv_ops.settings.declare import parameters_of, sections_of
from ffcv_ops.settings.fields import Choice, show
from ffcv_ops.settings.help import help_text
from ffcv_ops.settings.suggestions import did_you_mean
from ffcv_ops.settings.yaml_files import ShippedFiles, read_file

DEFAULT = "default"
NO_FILES = ShippedFiles()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of a program's settings. A subclass adds one field for each section.

    Attributes
    ----------
    files : tuple of Path
        The configuration files in the order given.
    texts : tuple of str
        The content of each file, as it was read.
    notices : tuple of str
        Facts that the user should know though nothing is wrong.
    given : mapping
        For each ``section.key``, its default and all values that were given in order, each with its source.
    """

    files: tuple[Path, ...] = ()
    texts: tuple[str, ...] = field(default=(), repr=False)
    notices: tuple[str, ...] = ()
    given: Mapping[str, Sequence[tuple[Any, str]]] = field(default_factory=dict, repr=False)

    def flat(self) -> dict[str, Any]:
        """Return all settings as ``{"section.key": value}``."""
        sections = {name: vars(getattr(self, name)) for name in sections_of(type(self))}
        return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}

    def with_values(self: "S", values: Mapping[str, Any], source: str) -> "S":
        """Return a copy in which some settings have other values.

        Parameters
        ----------
        values : mapping
            Values by ``section.key``, as `to_dict` has them.
        source : str
            Where the values are from.

        Raises
        ------
        UserError
            If a setting cannot have its value.
        """
        parameters, given, sections = parameters_of(type(self)), dict(self.given), dict[str, Any]()
        for key, raw in values.items():
            section, name = key.split(".", 1)
            value = _parse(key, parameters[key], raw, source)
            given[key] = [*given[key], (value, source)]
            sections[section] = replace(sections.get(section, getattr(self, section)), **{name: value})
        return replace(self, given=given, **sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return all settings as ``{"section": {"key": value}}`` with the plain types of YAML and JSON."""
        nested: dict[str, dict[str, Any]] = {}
        for key, value in self.flat().items():
            section, name = key.split(".", 1)
            nested.setdefault(section, {})[name] = _plain(value)
        return nested

    def source(self, key: str) -> str:
        """Return the source of a value: ``"default"``, the name of a file as given, or ``"command line"``."""
        return self.given[key][-1][1]

    def shown(self, key: str) -> str:
        """Return a setting with its value and source, such as ``training.epochs=3 (command line)``."""
        return f"{key}={show(self.flat()[key])} ({self.source(key)})"

    def history(self) -> dict[str, list[list[Any]]]:
        """Return, for each setting that was given, ``[value, source]`` of its default and of all values in order."""
        return {
            key: [[_plain(value), source] for value, source in given]
            for key, given in self.given.items()
            if len(given) > 1
        }

    def overrides(self) -> list[str]:
        """Return a line for each setting that was given different values: the values in order, with their sources."""
        return [
            f"{key}: " + " -> ".join(f"{show(value)} ({source})" for value, source in given[1:])
            for key, given in self.given.items()
            if any(value != given[1][0] for value, _ in given[2:])
        ]


S = TypeVar("S", bound=Settings)


def read_settings(
    declared: type[S],
    argv: list[str],
    *,
    flags: Flags,
    description: str,
    shipped: ShippedFiles = NO_FILES,
) -> S:
    """Read settings from files and a command line, strictly.

    If a setting is given several times, the last value counts: the defaults, then each ``--config-file FILE``, then
    ``--section.key VALUE`` and short flags, each in order. ``--name=VALUE`` and ``--name VALUE`` are the same. ``None``
    or ``null`` restores the default of a setting.

    Parameters
    ----------
    declared : type
        A frozen dataclass that extends `Settings`; see `ffcv_ops.settings`.
    argv : list of str
        The command line without the program's name.
    flags : mapping
        Short flags: name to key or, for a flag that takes no value, name to (key, value).
    description : str
        Printed by ``--help`` above the keys.
    shipped : ShippedFiles
        If a configuration file is not in the current folder, it is searched among these files.

    Raises
    ------
    SystemExit
        With status 2 and one message on stderr if anything is wrong; with status 0 after ``--help``.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(declared, flags, description))
        raise SystemExit(0)
    try:
        return _collect(declared, argv, flags, shipped)
    except UserError as error:
        exit_with_user_error(error)


def _collect(declared: type[S], argv: list[str], flags: Flags, shipped: ShippedFiles) -> S:
    parameters = parameters_of(declared)
    named, from_command_line = read_command_line(parameters, argv, flags)
    files = [shipped.find(path) for path in named]
    texts, entries = list[str](), list[tuple[str, Any, str, str]]()
    for file in files:
        text, found = read_file(parameters, file, shipped)
        texts.append(text)
        entries += [(key, raw, str(file), where) for key, raw, where in found]
    entries += [(key, raw, COMMAND_LINE, where) for key, raw, where in from_command_line]
    given = {key: [(param.default, DEFAULT)] for key, param in parameters.items()}
    for key, raw, source, where in entries:
        given[key].append((_parse(key, parameters[key], raw, where), source))
    for key, param in parameters.items():
        if param.required and given[key][-1][0] is None:
            raise UserError(f"{key} is not set: pass --{key}=VALUE or set it in a --config-file ({param.desc})")
    sections = {
        name: section(**{each.name: given[f"{name}.{each.name}"][-1][0] for each in fields(section)})
        for name, section in sections_of(declared).items()
    }
    return declared(files=tuple(files), texts=tuple(texts), given=given, **sections)


def _parse(key: str, param: Param, raw: Any, where: str) -> Any:
    """Check one value. ``None`` and ``null`` stand for the default."""
    if raw is None or (isinstance(raw, str) and raw.strip().lower() in ("none", "null", "~")):
        return param.default
    try:
        return param.checker.check(raw)
    except (ValueError, TypeError, OverflowError):
        message = f"{where}: {key} must be {param.checker.help()}, not {raw!r}"
    if isinstance(param.checker, Choice):
        message += did_you_mean(str(raw), [str(value) for value in param.checker.values])
    raise UserError(message)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
