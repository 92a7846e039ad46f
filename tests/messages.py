"""The messages that the code can end with, read off its syntax tree: what docs/FAULTS.md must know.

A message is a text, or an f-string, that is given to an exception; to a function that passes that argument on to one;
to ``warnings.warn`` or a ``print`` on stderr; or that a run collects as what is wrong with a file.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Exceptions that no user sees: they end a loop, answer `hasattr`, or say that the code itself is wrong.
SILENT = {"AssertionError", "AttributeError", "NotImplementedError", "StopIteration", "SystemExit", "TypingError"}
EXCEPTION = re.compile(r"\w*(Error|Mistake|BadImage|WorkerKilled)")
# What a check collects instead of raising, and the functions that put what is wrong into words.
COLLECTIONS = {"problems", "bad"}
WORDINGS = re.compile(r"_reason|_check_jpeg|\w+_message")
# What is said to the log counts where it begins so: the rest is the progress of a run.
SAID = re.compile(r"f?['\"](error|W&B)\b")
MIN_LETTERS = 8


@dataclass(frozen=True)
class Message:
    """A message: the constant parts of its text, and the expressions between them."""

    parts: tuple[str, ...]
    expressions: tuple[str, ...]
    where: str

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing itself, but passes on what another says."""
        return sum(map(str.isalpha, "".join(self.parts))) < MIN_LETTERS or " " not in "".join(self.parts).strip()

    @property
    def text(self) -> str:
        """What a document shows: names in capitals for what varies, no backquotes."""
        names = [(re.findall(r"[a-z]+", name) or ["value"])[-1].upper() for name in self.expressions]
        return (
            "".join(part + name for part, name in zip(self.parts, [*names, ""], strict=True))
            .split("\n")[0]
            .strip()
            .replace("`", "")
        )

    def is_shown_by(self, text: str) -> bool:
        parts = "\0".join(self.parts).split("\n")[0].strip().replace("`", "").split("\0")
        return re.fullmatch(".*?".join(re.escape(part) for part in parts), text) is not None


class Sources:
    """Python files as one: their functions, and the messages in them."""

    def __init__(self, paths: list[Path], root: Path = ROOT):
        self.root = root
        self.nodes: dict[Path, list[ast.AST]] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.owners: dict[ast.AST, ast.FunctionDef] = {}
        for path in paths:
            self.nodes[path] = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            for function in self.nodes[path]:
                if isinstance(function, ast.FunctionDef):
                    self.functions[function.name] = function
                    self.owners.update((node, function) for node in ast.walk(function))  # the innermost comes last
        self._followed: set[ast.stmt] = set()
        self.carriers: dict[str, set[str]] = {}
        while self._find_carriers():
            pass

    def messages(self) -> list[Message]:
        found = {}
        for path, nodes in self.nodes.items():
            for node in nodes:
                for text in self._texts(node):
                    for parts, expressions in self._resolve(text, self.owners.get(node)):
                        message = Message(
                            parts, expressions, f"{path.relative_to(self.root)}:{getattr(node, 'lineno', 0)}"
                        )
                        if not message.is_empty:
                            found.setdefault(message.parts, message)
        return list(found.values())

    def _texts(self, node: ast.AST) -> Iterator[ast.expr]:
        """The expressions at a node that are, or hold, a message."""
        if isinstance(node, ast.Call):
            name = _name(node.func)
            on_stderr = any(word.arg == "file" and ast.unparse(word.value) == "sys.stderr" for word in node.keywords)
            said = name == "say" and SAID.match(ast.unparse(node.args[0]))
            if _raises(node) or name == "warn" or said or (name == "print" and on_stderr):
                yield from node.args[:1]
            elif name in self.carriers:
                yield from (text for parameter, text in self._bound(node) if parameter in self.carriers[name])
            elif name == "append" and _name(getattr(node.func, "value", node)) in COLLECTIONS:
                yield from node.args
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            if _name(node.targets[0].value) in COLLECTIONS:
                yield node.value
        elif isinstance(node, ast.Assign) and _name(node.targets[0]) in COLLECTIONS:
            if isinstance(node.value, ast.Call) and _name(node.value.func) == "fromkeys":
                yield from node.value.args[1:]
        elif isinstance(node, ast.Return) and node.value is not None:
            if WORDINGS.fullmatch(getattr(self.owners.get(node), "name", "")):
                yield node.value

    def _bound(self, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
        """Arguments of a call to one of the functions, by parameter."""
        function = self.functions[_name(call.func)]
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        yield from zip(names, call.args, strict=False)
        yield from ((word.arg, word.value) for word in call.keywords if word.arg)

    def _find_carriers(self) -> bool:
        """Look for functions that hand a parameter on to an exception; whether there are more than were known."""
        grown = False
        for call in (node for nodes in self.nodes.values() for node in nodes if isinstance(node, ast.Call)):
            function = self.owners.get(call)
            if function is None or not (_raises(call) or _name(call.func) in self.carriers):
                continue
            given = call.args
            if not _raises(call):
                given = [text for name, text in self._bound(call) if name in self.carriers[_name(call.func)]]
            inside = {node.id for text in given for node in ast.walk(text) if isinstance(node, ast.Name)}
            texts = {argument.arg for argument in function.args.args if _name(argument.annotation) == "str"}
            known = self.carriers.get(function.name, set())
            if not inside & texts <= known:
                self.carriers[function.name] = known | inside & texts
                grown = True
        return grown

    def _resolve(
        self, node: ast.expr, function: ast.FunctionDef | None
    ) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Texts that an expression can be, each as constant parts and what stands between them."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield (node.value,), ()
        elif isinstance(node, ast.JoinedStr):
            yield from self._resolve_f_string(node, function)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            right = list(self._resolve(node.right, function)) or [(("", ""), (ast.unparse(node.right),))]
            for parts, names in self._resolve(node.left, function):
                for more, more_names in right:
                    yield (*parts[:-1], parts[-1] + more[0], *more[1:]), names + more_names
        elif isinstance(node, ast.IfExp):
            yield from self._resolve(node.body, function)
            yield from self._resolve(node.orelse, function)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self._resolve(value, function)
        elif isinstance(node, (ast.List, ast.Tuple)):
            for value in node.elts:
                yield from self._resolve(value, function)
        elif isinstance(node, ast.Name) and function is not None:
            for statement in ast.walk(function):
                if isinstance(statement, ast.Assign) and _name(statement.targets[0]) == node.id:
                    if not isinstance(statement.value, ast.Name):
                        yield from self._open_ended(self._follow(statement, function), function, node.id)
        elif isinstance(node, ast.Call) and _name(node.func) in self.functions and not _raises(node):
            called = self.functions[_name(node.func)]
            for statement in ast.walk(called):
                if isinstance(statement, ast.Return) and isinstance(statement.value, (ast.Constant, ast.JoinedStr)):
                    yield from self._follow(statement, called)

    def _follow(self, statement: ast.Assign | ast.Return, function: ast.FunctionDef):
        """What a statement assigns or returns; nothing where that leads back to it."""
        if statement not in self._followed and statement.value is not None:
            self._followed.add(statement)
            yield from self._resolve(statement.value, function)
            self._followed.discard(statement)

    @staticmethod
    def _open_ended(texts, function: ast.FunctionDef, name: str):
        """Texts of a variable that something may be added to."""
        added = any(isinstance(node, ast.AugAssign) and _name(node.target) == name for node in ast.walk(function))
        for parts, names in texts:
            yield ((*parts, ""), (*names, "more")) if added else (parts, names)

    def _resolve_f_string(self, node: ast.JoinedStr, function: ast.FunctionDef | None):
        parts, names = [""], []
        for value in node.values:
            if isinstance(value, ast.Constant):
                parts[-1] += value.value
            else:
                assert isinstance(value, ast.FormattedValue)
                parts.append("")
                names.append(ast.unparse(value.value))
        text = Message(tuple(parts), tuple(names), "")
        if text.is_empty:  # f"error: {message()}" says what the function says
            for value in node.values:
                if isinstance(value, ast.FormattedValue):
                    yield from self._resolve(value.value, function)
        yield text.parts, text.expressions


def _name(node: ast.AST | None) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _raises(call: ast.Call) -> bool:
    return bool(EXCEPTION.fullmatch(_name(call.func))) and _name(call.func) not in SILENT


def shell_messages(path: Path) -> Iterator[Message]:
    """What a shell script says on stderr, or hands to its functions that stop it."""
    source = path.read_text(encoding="utf-8")
    for match in re.finditer(r'\b(?:stop|give_up) "([^"]+)"|\becho "([^"]+)"[^\n]*>&2', source):
        line = source[: match.start()].count("\n") + 1
        said = match[1] or match[2]
        parts = re.split(r"\$\w+|\$\{[^}]+\}|\$\([^)]+\)", said)
        names = re.findall(r"\$[\w({][^)}\s]*", said)
        yield Message(tuple(parts), tuple(names[: len(parts) - 1]), f"{path.relative_to(ROOT)}:{line}")
