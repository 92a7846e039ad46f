"""Compiling kernels: Numba's cache on disk, told of what a kernel calls in other modules."""

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numba as nb
from numba.core.caching import FunctionCache

_PACKAGE = __name__.partition(".")[0]


def _can_cache() -> bool:
    try:
        FunctionCache(_can_cache)
    except RuntimeError:
        return False
    return True


# Whether there is a folder where Numba may keep what it compiles of this package; it refuses ``cache=True`` without.
CAN_CACHE = _can_cache()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, and keep the result on disk until a source that it is made of changes.

    Numba alone looks at the function's own file. What a kernel calls is compiled into it, and often lies elsewhere, so
    here a change of any module of this package that the function's module uses, directly or not, counts too.
    """
    dispatcher: Any = nb.njit(cache=CAN_CACHE, nogil=True)(function)
    if CAN_CACHE and dispatcher is not function:  # which it is where NUMBA_DISABLE_JIT is set
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Cache(FunctionCache):
    """Numba's, with a digest of sources in the key of every compiled signature."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return *super()._index_key(sig, codegen), _digest(self._py_func.__module__)


@cache
def _digest(name: str) -> str:
    digest = hashlib.sha256()
    for module in sorted(_used_by(name, set())):
        with open(str(sys.modules[module].__file__), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def _used_by(name: str, found: set[str]) -> set[str]:
    """Add a module of this package, and all that it and they use, to the names found."""
    if name.partition(".")[0] == _PACKAGE and name in sys.modules and name not in found:
        found.add(name)
        for value in list(vars(sys.modules[name]).values()):
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str):
                _used_by(used, found)
    return found
