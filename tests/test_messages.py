"""Every message that docs/FAULTS.md quotes stands in the sources."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *ROOT.glob("*.py"),
    *(path for room in ("ffcv_ops", "imagenet_training", "launch") for path in (ROOT / room).rglob("*.*")),
]
BETWEEN_LITERALS = re.compile(r"""["']\s*\n\s*f?["']""")  # of a text that continues on the next line
PLACEHOLDER = re.compile(r"\b[A-Z]+\b")
MIN_LETTERS = 8


def quoted_messages() -> list[str]:
    """Return the messages of the page: every list item whose first line is nothing but code."""
    own = (ROOT / "docs" / "FAULTS.md").read_text(encoding="utf-8").split("## Messages of others")[0]
    return re.findall(r"^- `(.+)`$", own, re.MULTILINE)


@cache
def source_text() -> str:
    """Return all sources as one text. A literal that spans several lines stands on one line."""
    texts = (path.read_text(encoding="utf-8") for path in SOURCES if path.suffix in (".py", ".sh", ".sbatch"))
    return BETWEEN_LITERALS.sub("", "\n".join(texts)).replace("`", "")


def is_in_sources(message: str) -> bool:
    """Return whether a source has the message, with any text on one line in place of each word in capitals."""
    parts = PLACEHOLDER.split(message.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    assert len(re.findall("[a-z]", "".join(parts))) >= MIN_LETTERS, f"too short to look for: {message}"
    return re.search(r".{0,120}?".join(map(re.escape, parts)), source_text()) is not None


def test_the_page_quotes_messages() -> None:
    assert 20 <= len(quoted_messages()) <= 60


@pytest.mark.parametrize("message", quoted_messages())
def test_the_message_is_in_the_sources(message: str) -> None:
    assert is_in_sources(message), f"docs/FAULTS.md quotes a message that no source has: {message}"


def test_a_message_that_no_source_has_is_noticed() -> None:
    assert is_in_sources("FOLDER: has no class folders; it should have one subfolder")
    assert not is_in_sources("FOLDER: has no class drawers; it should have one subfolder")
