"""Expand what the user names into the files that are there: ``train-{0000..1023}.tar``, ``train-*.tar``, a folder."""

import glob
import os
import re

from ffcv_ops.errors import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_pattern(address: str) -> bool:
    """Return whether an address stands for several files. A file of just that name is only itself."""
    is_several = bool(_RANGE.search(address) or _LIST.search(address) or glob.has_magic(address))
    return is_several and not os.path.lexists(address)


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
    if os.path.isdir(address):
        names = sorted(name for name in os.listdir(address) if name.endswith(suffixes) and not name.startswith("."))
        found = [os.path.join(address, name) for name in names]
        if not found:
            raise UserError(f"{address}: has no file that ends in {' or '.join(suffixes)}")
        return found
    if not is_pattern(address):
        if not os.path.exists(address):
            raise UserError(f"{address}: no such file")
        return [address]
    paths: list[str] = []
    for name in expand_braces(address):
        if glob.has_magic(name):
            paths += sorted(glob.glob(name))
        else:
            paths.append(name)
    if not paths:
        raise UserError(f"{address}: no file has such a name")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        more = f", and {len(missing) - 1} more of {len(paths)}" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no such file{more}; {address} names it")
    return list(dict.fromkeys(paths))
