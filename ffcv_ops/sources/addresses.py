"""Expand what the user names into the files that are there: ``train-{0000..1023}.tar``, ``train-*.tar``, a folder.

An address is a path of this machine or a URL. The other modules handle both by these functions. Files of servers are
asked for through `ffcv_ops.sources.remote`.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffcv_ops.errors import UserError
from ffcv_ops.sources.remote import ask, has_file, is_remote, is_web, limit, public_name

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_folder(address: str) -> bool:
    """Return whether an address names a folder. On the web, a slash at its end tells. Raise UserError on failure."""
    if not is_remote(address):
        return os.path.isdir(address)
    if is_web(address):
        return address.endswith("/")
    return ask(address, lambda fs, path: bool(fs.isdir(path, **limit(fs))))


def list_names(folder: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, sorted, each with whether it is a folder. On the web, names without a dot are."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.is_dir()) for entry in entries)

    def is_inner(entry: dict[str, Any]) -> bool:
        return entry["type"] == "directory" or (is_web(folder) and "." not in entry["name"].rpartition("/")[2])

    def list_remote(fs: "AbstractFileSystem", path: str) -> list[tuple[str, bool]]:
        start = path.rstrip("/") + "/"
        found = {
            entry["name"].removeprefix(start).rstrip("/"): is_inner(entry)
            for entry in fs.ls(path, detail=True, **limit(fs))
            if entry["name"].startswith(start)
        }
        return sorted((name, inner) for name, inner in found.items() if name and "/" not in name)

    return ask(folder, list_remote)


def join(folder: str, name: str) -> str:
    """Return the address of a name in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def beside(address: str, name: str) -> str:
    """Return the address of a name in the folder of a file. What stands behind a question mark may be a password."""
    if not is_remote(address):
        return os.path.join(os.path.dirname(address), name)
    path, mark, query = address.partition("?") if is_web(address) else (address, "", "")
    return f"{path.rpartition('/')[0]}/{name}{mark}{query}"


def exists(address: str) -> bool:
    """Return whether there is a file, which a server gives. Raise UserError if the server does not answer."""
    return has_file(address) if is_remote(address) else os.path.exists(address)


def read(address: str) -> bytes:
    """Return the content of a small file. Raise UserError or OSError if it cannot be read."""
    if not is_remote(address):
        return Path(address).read_bytes()
    return ask(address, lambda fs, path: fs.cat_file(path, **limit(fs)))


def _find_remote(pattern: str) -> list[str]:
    return ask(pattern, lambda fs, path: sorted(fs.unstrip_protocol(name) for name in fs.glob(path, **limit(fs))))


def full_name(address: str) -> str:
    """Return an address so that it holds in any folder, without secrets."""
    return public_name(address) if is_remote(address) else os.path.abspath(address)


def relative_name(address: str, folder: str) -> str:
    """Return the part of an address behind a folder."""
    if is_remote(address):
        return public_name(address).removeprefix(public_name(folder).rstrip("/") + "/")
    return os.path.relpath(address, folder)


def name_files(addresses: Sequence[str]) -> list[str]:
    """Return the addresses relative to the folder that holds all files."""
    names = [full_name(address) for address in addresses]
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    return [os.path.relpath(name, folder) for name in names]


def _has_magic(address: str) -> bool:
    """Return whether an address has wildcards. In one of the web, a question mark is none."""
    return glob.has_magic(public_name(address).replace("?", "") if address.startswith("http") else address)


def is_pattern(address: str) -> bool:
    """Return whether an address stands for several files. A file of just that name is only itself."""
    is_several = bool(_RANGE.search(address) or _LIST.search(address) or _has_magic(address))
    return is_several and (is_remote(address) or not os.path.lexists(address))


def expand_braces(address: str) -> list[str]:
    """Return the names that a shell makes of ``{0000..1023}`` and ``{a,b}``, in their order."""
    if match := _RANGE.search(address):
        first, last = match.groups()
        step = 1 if int(first) <= int(last) else -1
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        values = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    elif match := _LIST.search(address):
        values = match.group(1).split(",")
    else:
        return [address]
    before, behind = address[: match.start()], address[match.end() :]
    return [name for value in values for name in expand_braces(f"{before}{value}{behind}")]


def expand(address: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the paths of the files that an address names, each once.

    Parameters
    ----------
    address : str
        A file, a folder, or a pattern with braces or wildcards.
    suffixes : tuple of str
        The endings of the files to take from a folder.

    Raises
    ------
    UserError
        If a file is missing, or if there is none.
    """
    shown = public_name(address)
    if is_folder(address):
        names = [name for name, _ in list_names(address) if name.endswith(suffixes) and not name.startswith(".")]
        if not names:
            hint = "; folders of images are read from this machine only" if is_remote(address) else ""
            raise UserError(f"{shown}: has no file that ends in {' or '.join(suffixes)}{hint}")
        return [join(address, name) for name in names]
    if not is_pattern(address):
        if not is_remote(address) and not os.path.exists(address):
            raise UserError(f"{address}: no such file")
        return [address]
    paths: list[str] = []
    for name in expand_braces(address):
        if not _has_magic(name):
            paths.append(name)
        elif is_remote(name):
            paths += _find_remote(name)
        else:
            paths += sorted(glob.glob(name))
    if not paths:
        raise UserError(f"{shown}: no file has such a name")
    missing = [path for path in paths if not is_remote(path) and not os.path.exists(path)]
    if missing:
        more = f", and {len(missing) - 1} more of {len(paths)}" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no such file{more}; {shown} names it")
    return list(dict.fromkeys(paths))
