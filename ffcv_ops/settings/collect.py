"""Settings collected from defaults, then files, then the command line."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastargs import Config, Param

from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.settings.command_line import COMMAND_LINE, Flags, read_command_line
from ffcv_ops.settings.fields import Choice, default_of, parameters_of, show, strict
from ffcv_ops.settings.help import help_text
from ffcv_ops.settings.suggestions import did_you_mean
from ffcv_ops.settings.yaml_files import ShippedFiles, read_file

DEFAULT = "default"
NO_FILES = ShippedFiles()


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
    config: Config,
    argv: list[str],
    *,
    flags: Flags,
    description: str,
    shipped: ShippedFiles = NO_FILES,
) -> Settings:
    """Collect settings from files and a command line, strictly.

    Later wins: the defaults, each ``--config-file FILE`` in order, then ``--section.key VALUE`` and short flags in
    order (``--name=VALUE`` and ``--name VALUE`` are the same). ``None`` or ``null`` sets a key back to its default.

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
    shipped : ShippedFiles
        If a configuration file is not in the current folder, it is taken from these files.

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
        return _collect(parameters_of(config), argv, flags, shipped)
    except UserError as error:
        exit_with_user_error(error)


def _collect(parameters: Mapping[str, Param], argv: list[str], flags: Flags, shipped: ShippedFiles) -> Settings:
    named, from_command_line = read_command_line(parameters, argv, flags)
    files = [shipped.find(path) for path in named]
    history = {key: [(default_of(key, param), DEFAULT)] for key, param in parameters.items()}
    given = [(key, raw, str(file), where) for file in files for key, raw, where in read_file(parameters, file, shipped)]
    given += [(key, raw, COMMAND_LINE, where) for key, raw, where in from_command_line]
    for key, raw, source, where in given:
        history[key].append((_parse(key, parameters[key], raw, where), source))
    for key, param in parameters.items():
        if param.required and history[key][-1][0] is None:
            raise UserError(f"{key} is not set: pass --{key}=VALUE or set it in a --config-file ({param.desc})")
    return Settings(history, files)


def _parse(key: str, param: Param, raw: Any, where: str) -> Any:
    """Check one value; ``None`` and ``null`` stand for the default."""
    if raw is None or (isinstance(raw, str) and raw.strip().lower() in ("none", "null", "~")):
        return default_of(key, param)
    checker = strict(param.checker)
    try:
        return checker.check(raw)
    except (ValueError, TypeError, OverflowError):
        message = f"{where}: {key} must be {checker.help()}, not {raw!r}"
    if isinstance(checker, Choice):
        message += did_you_mean(str(raw), [str(value) for value in checker.values])
    raise UserError(message)
