"""docs/FAULTS.md knows every message that the code can end with, and none that it cannot."""

import re
from pathlib import Path

import pytest
from messages import ROOT, Message, Sources, shell_messages

DOCUMENT = ROOT / "docs" / "FAULTS.md"
# Messages that need no remedy of their own, and why.
EXCLUDED = {
    "field descriptors": "stands for WHAT in 'there is no room for its WHAT'",
    "metadata of its samples": "stands for WHAT in 'there is no room for its WHAT'",
    "allocation table": "stands for WHAT in 'there is no room for its WHAT'",
    "the traversal order": "stands for NAME in 'NAME: sample ... is not in'",
    "the workspace is too small for this region: size it with workspace_bytes()": "kernels are called by our decoders",
}


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    python = [
        path for folder in (".", "ffcv_ops", "training", "launch") for path in sorted((ROOT / folder).glob("*.py"))
    ]
    shell = [message for path in sorted((ROOT / "launch").glob("*.s*")) for message in shell_messages(path)]
    return [*Sources(python).messages(), *shell]


@pytest.fixture(scope="module")
def entries() -> list[str]:
    """The messages that the document lists: each first line of a list, up to the messages of others."""
    own = DOCUMENT.read_text(encoding="utf-8").split("## Messages of others")[0]
    return [line.replace("`", "") for line in re.findall(r"^- `(.+)`$", own, re.MULTILINE)]


def test_every_message_is_in_the_document(messages: list[Message], entries: list[str]) -> None:
    missing = [
        f"- `{message.text}`\n  CAUSE AND REMEDY  (raised at {message.where})"
        for message in messages
        if message.text not in EXCLUDED and not any(message.is_shown_by(entry) for entry in entries)
    ]
    assert not missing, (
        "docs/FAULTS.md lacks messages of the code. Put each below a fitting heading, with its cause and remedy, or, "
        "if no user can get it, into EXCLUDED in tests/test_messages.py with the reason:\n\n" + "\n".join(missing)
    )


def test_the_document_lists_no_message_that_is_gone(messages: list[Message], entries: list[str]) -> None:
    gone = [entry for entry in entries if not any(message.is_shown_by(entry) for message in messages)]
    assert not gone, "docs/FAULTS.md lists what no code says any more; remove or reword:\n" + "\n".join(gone)


def test_every_exclusion_is_needed(messages: list[Message]) -> None:
    texts = {message.text for message in messages}
    assert set(EXCLUDED) <= texts, f"no longer in the code: {set(EXCLUDED) - texts}"


def test_messages_are_found_however_they_are_put(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "def check(path, name, size: int):\n"
        "    if size:\n"
        "        raise ValueError(f'{path}: has {size} things too many')\n"
        "    message = f'{name} cannot be opened'\n"
        "    message += hint()\n"
        "    raise OSError(message + ', try again')\n"
        "def fail(what: str):\n"
        "    return RunError(f'the run is over: {what}; begin anew')\n"
        "def stop():\n"
        "    raise fail('the disk is full')\n"
        "def say():\n"
        "    raise AssertionError('only the author gets this')\n"
        "def again(text):\n"
        "    text = f'{text}'\n"
        "    raise ValueError(text)\n"
    )
    texts = {message.text for message in Sources([source], root=tmp_path).messages()}
    assert texts == {
        "PATH: has SIZE things too many",
        "NAME cannot be openedMORE, try again",
        "the run is over: WHAT; begin anew",
        "the disk is full",
    }
