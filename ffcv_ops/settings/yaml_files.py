"""YAML files of settings, with the line of each setting."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fastargs import Param

from ffcv_ops.errors import UserError
from ffcv_ops.settings.suggestions import did_you_mean


@dataclass(frozen=True)
class ShippedFiles:
    """Configuration files that come with the program."""

    root: Path | None = None  # the folder from which the files are named; without it there are none
    pattern: str = "*.yaml"  # of the files below the root

    def find(self, path: Path) -> Path:
        """Return the shipped file of a name if the current folder has no such file, otherwise the path unchanged."""
        if self.root is None or path.exists() or not (self.root / path).is_file():
            return path
        return self.root / path

    def hint(self, path: Path) -> str:
        """Return ``"; did you mean ...?"`` with the most similar file name, otherwise the files of the same folder."""
        shipped = [] if self.root is None else [file.relative_to(self.root) for file in self.root.glob(self.pattern)]
        files = {file.stem: file for file in [*sorted(shipped), *sorted(path.parent.glob("*.y*ml"))]}
        near = difflib.get_close_matches(path.stem, files, n=1)
        if near:
            return f"; did you mean {files[near[0]]}?"
        there = [str(file) for file in files.values() if file.parent == path.parent]
        return f"; there are {', '.join(there)}" if there else ""


def read_file(
    parameters: Mapping[str, Param], path: Path, shipped: ShippedFiles
) -> tuple[str, list[tuple[str, Any, str]]]:
    """Read a YAML (or JSON) file of sections. Return its text, and (key, raw value, ``file:line``) of each setting.

    Raises
    ------
    UserError
        If the file cannot be read, is not YAML, or sets an unknown key or a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: not a mapping of sections to settings, such as\ntraining:\n  epochs: 100")
        return text, list(_Sections(parameters, path, loader).walk(root))
    except FileNotFoundError:
        raise UserError(f"--config-file {path}: no such file{shipped.hint(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config-file {path}: cannot be read: it is no text in UTF-8, so no recipe") from None
    except OSError as error:
        raise UserError(f"--config-file {path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


class _Sections:
    """The nodes of one file, and the line of each key met so far."""

    def __init__(self, parameters: Mapping[str, Param], path: Path, loader: yaml.SafeLoader):
        self.parameters, self.path, self.loader = parameters, path, loader
        self.lines: dict[str, int] = {}

    def walk(self, node: yaml.MappingNode, prefix: str = "") -> Iterable[tuple[str, Any, str]]:
        """Go down a mapping to the declared keys. ``section.key: value`` on one line is accepted too."""
        for name_node, value_node in node.value:
            key = prefix + str(name_node.value)
            line = name_node.start_mark.line + 1
            where = f"{self.path}:{line}"
            if key in self.lines:
                raise UserError(f"{where}: {key} is set twice, first in line {self.lines[key]}: keep one")
            self.lines[key] = line
            if key in self.parameters:
                checker = self.parameters[key].checker
                if isinstance(value_node, yaml.MappingNode) and not checker.takes_mapping:
                    raise UserError(f"{where}: {key} must be {checker.help()}, not a mapping")
                yield key, self._value(value_node), where
            elif any(known.startswith(f"{key}.") for known in self.parameters):
                if isinstance(value_node, yaml.MappingNode):
                    yield from self.walk(value_node, f"{key}.")
                elif value_node.tag != "tag:yaml.org,2002:null":
                    raise UserError(f"{where}: {key} is a section and must hold settings, not a value")
            else:
                sections = {known.split(".")[0] for known in self.parameters} if not prefix else ()
                raise UserError(f"{where}: unknown setting {key}{did_you_mean(key, [*self.parameters, *sections])}")

    def _value(self, node: yaml.Node) -> Any:
        """Return the value of a node. A mapping becomes a list of pairs, so that a name given twice is not lost."""
        if isinstance(node, yaml.MappingNode):
            return [(self._value(name), self._value(value)) for name, value in node.value]
        try:
            return self.loader.construct_object(node, deep=True)
        except ValueError:  # text that looks like a date but is none: the checker gets the text
            return node.value
