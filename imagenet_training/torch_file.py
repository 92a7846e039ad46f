"""Read files of ``torch.save``, without running any code that they may hold."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ffcv_ops.units import show_names

# The ends of the names of weights files, as hubs have them in a folder.
FILE_KINDS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# A file that begins with so many bytes of text is text.
TEXT_BYTES = 16


class UnreadableFile(ValueError):
    """A file is no whole file of ``torch.save``. The message is the reason, without the file's name."""


def load_file(path: str | Path, **options: Any) -> Any:
    """Load the content of a file to the CPU. Only tensors, numbers, text and containers of them are loaded.

    Raises
    ------
    UnreadableFile
        If the file is of another kind, damaged, or holds objects of other classes.
    """
    try:
        _check_kind(path)
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except UnreadableFile:
        raise
    except Exception as error:  # the unpicklers and archives raise many kinds
        raise UnreadableFile(_reason(path, error)) from error


def check_whole(path: str | Path) -> None:
    """Check the checksums of an archive. ``torch.load`` does not check the checksums that ``torch.save`` stored.

    Raises
    ------
    UnreadableFile
        If the file is empty, cut, or damaged anywhere.
    """
    try:
        if not Path(path).stat().st_size:
            raise UnreadableFile("the file is empty")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise UnreadableFile(str(error)) from error
    if damaged is not None:
        raise UnreadableFile(f"the checksum of {damaged} in it is wrong")


def unknown_classes(path: str | Path) -> list[Any]:
    """Return the classes and functions that a file names and that are not loaded, such as a script's options."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is damaged, or in PyTorch's oldest format
        return []


def _check_kind(path: str | Path) -> None:
    """Check that a file begins as one of ``torch.save`` does, and that its archive has the parts of one."""
    with open(path, "rb") as file:
        start = file.read(TEXT_BYTES)
    if not start:
        raise UnreadableFile("the file is empty")
    if start[:2] != b"PK" and start[:1] != b"\x80":
        if start.isascii() and start.decode("ascii").replace("\n", " ").isprintable():
            raise UnreadableFile("it is text, such as a web page or a pointer of Git LFS; download the file itself")
        raise UnreadableFile("it is neither safetensors nor of torch.save")
    if start[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in parts:
            raise UnreadableFile("it is a TorchScript archive; save the model's state_dict() instead")
        if "data.pkl" not in parts:
            raise UnreadableFile("it is an archive of another program than torch.save")


def _reason(path: str | Path, error: Exception) -> str:
    """Return the reason of a failed load. PyTorch's own text advises to load the file with the code in it."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).partition("\n")[0] or type(error).__name__
    named = [str(name) for name in unknown_classes(path)]
    what = f" ({show_names(named)})" if named else ""
    return f"it holds objects that could run code{what}, so it is not loaded; save only a state_dict() in it"


def no_file_message(path: Path) -> str:
    """Return why a path is no file. For a folder, name a file in it or in its ``checkpoints``, if there is one."""
    if not path.is_dir():
        return "no such file"
    files = [file for kind in FILE_KINDS for place in (path, path / "checkpoints") for file in place.glob(f"*{kind}")]
    if not files:
        return "this is a folder"
    likely = min(files, key=lambda file: (file.name != "last.ckpt", file))
    return f"this is a folder; pass a file in it, such as {likely.relative_to(path)}"
