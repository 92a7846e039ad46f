"""The command line, split into configuration files and settings."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffcv_ops.errors import UserError
from ffcv_ops.settings.suggestions import did_you_mean

COMMAND_LINE = "command line"
# Short flags: name to key or, for a flag that takes no value, name to (key, value).
Flags = Mapping[str, str | tuple[str, str]]


def read_command_line(
    keys: Collection[str], argv: list[str], flags: Flags
) -> tuple[list[Path], list[tuple[str, Any, str]]]:
    """Split a command line into files and (key, raw value, where). Raise UserError for what belongs to no setting."""
    files, given = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-C", "--config-file", "--config_file"):
            name = "config-file"
        elif not word.startswith("--") or not name:
            hint = "; settings are given as --NAME VALUE, and --help lists them"
            if Path(word).suffix in (".yaml", ".yml"):
                hint = f"; a configuration file is given as --config-file {word}"
            elif Path(word).is_file():
                hint = "; put a pattern of several files in quotes, so that the shell does not expand it"
            raise UserError(f"{COMMAND_LINE}: {word!r} belongs to no setting{hint}")
        target = flags.get(name, name)
        where = f"{COMMAND_LINE}, --{name}"
        if isinstance(target, tuple):
            if equals:
                raise UserError(f"{where} takes no value; to give one, use --{target[0]}={value}")
            given.append((*target, where))
            continue
        is_file = name in ("config-file", "config_file")
        if not is_file and target not in keys:
            names = [*flags, "config-file", "help", *keys]
            raise UserError(f"{COMMAND_LINE}: unknown setting --{name}{did_you_mean(name, names, '--')}")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"{where} needs a value: --{name}=VALUE")
        if is_file:
            files.append(Path(value))
        else:
            given.append((target, value, where))
    return files, given


def replace_settings(argv: Sequence[str], flags: Flags, settings: Mapping[str, str]) -> list[str]:
    """Return a command line with some settings replaced or added, each given once, by its short flag if it has one.

    Parameters
    ----------
    argv : sequence of str
        A command line that `read_command_line` accepts.
    flags : mapping
        Short flags.
    settings : mapping of str to str
        Key to value.
    """
    kept, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        target = flags.get(name, name)
        takes_word = not equals and not isinstance(target, tuple) and word not in ("--help", "-h")
        given = [word, next(words)] if takes_word else [word]
        if (target[0] if isinstance(target, tuple) else target) not in settings:
            kept += given
    short = {target: [f"--{name}"] for name, target in flags.items()}
    for key, value in settings.items():
        kept += short.get((key, value)) or [*short.get(key, [f"--{key}"]), value]
    return kept
