"""The documents, taken apart: their shell commands, Python blocks, files, code spans and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
# What begins a command in a block that does not say its language.
PROGRAMS = (
    *("python", "python3", "torchrun", "make", "bash", "sbatch", "pip", "source", "git", "wandb", "apt", "apt-get"),
    *("sudo", "conda", "docker", "srun", "export", "cd", "cp", "rsync", "tar", "curl", "wget"),
    *("write-beton", "train-imagenet"),
)
SHELL = ("sh", "bash", "shell", "console")
SUBSTITUTED = re.compile(r"\$\([^)]*\)")  # what another command prints
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A block of code of a document: its language ("" if it does not say), its lines, the number of the first."""

    document: Path
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of the shell: the variables before it, and its words."""

    where: str
    text: str
    variables: tuple[str, ...]
    words: tuple[str, ...]


def blocks(document: Path) -> Iterator[Block]:
    """Fenced blocks, and blocks indented by four spaces behind an empty line."""
    lines = document.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        line = lines[number]
        fence = re.match(r"(`{3,})(\w*)", line)
        start, end = number, number + 1
        if fence:
            while lines[end] != fence[1]:
                end += 1
            yield Block(document, start + 2, fence[2], tuple(lines[start + 1 : end]))
            end += 1
        elif line.startswith("    ") and not before.strip():
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(document, start + 1, "", tuple(text[4:] for text in lines[start:end]))
        before, number = lines[end - 1], end


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, a line each, continued lines joined, comments left out."""
    if block.language and block.language not in SHELL:
        return
    logical: list[tuple[int, str]] = []
    continued = False
    for number, line in enumerate(block.lines, block.line):
        text = line.rstrip()
        if continued:
            logical[-1] = logical[-1][0], logical[-1][1] + " " + text.lstrip().removesuffix("\\").rstrip()
        else:
            logical.append((number, text.removesuffix("\\").rstrip()))
        continued = text.endswith("\\")
    for number, text in logical:
        text = text.removeprefix("$ ").strip()
        if not text or text.startswith("#"):
            continue
        try:
            words = shlex.split(SUBSTITUTED.sub("", text), comments=True)
        except ValueError:  # prose with an apostrophe
            words = text.split()
        variables = []
        while words and ASSIGNMENT.fullmatch(words[0]):
            variables.append(words.pop(0))
        if words and (block.language in SHELL or words[0] in PROGRAMS):
            where = f"{block.document.relative_to(ROOT)}:{number}"
            yield Command(where, shlex.join([*variables, *words]), tuple(variables), tuple(words))


def named_file(block: Block) -> str | None:
    """The name of the file that a block shows, where its first line is a comment with nothing but the name."""
    match = re.fullmatch(r"# ([\w./-]+\.(?:ya?ml|py))", block.lines[0]) if block.lines else None
    return match[1] if match else None


def prose(document: Path) -> str:
    """The document without its blocks."""
    lines = document.read_text(encoding="utf-8").splitlines()
    for block in blocks(document):
        for number in range(block.line - 1, block.line - 1 + len(block.lines)):
            lines[number] = ""
    return "\n".join(lines)


def code_spans(document: Path) -> list[str]:
    """Code within sentences and tables; of tables that compare, without the first column: another project's."""
    text = prose(document)
    if document.name == "MIGRATING.md":
        text = re.sub(r"^\| .*? \|", "|", text, flags=re.MULTILINE)
    return [" ".join(span.split()) for _, span in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", text, re.DOTALL)]


def links(document: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(document))


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
