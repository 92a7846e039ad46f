"""Compile kernels with Numba, and keep them on disk until a source of theirs changes, also in another module."""

import hashlib
import logging
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import numba as nb
from numba.core import config
from numba.core import event as events
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

_PACKAGE = __name__.partition(".")[0]
# A compilation that has taken so long is logged.
_LONG_S = 3


def _can_cache() -> bool:
    try:
        FunctionCache(_can_cache)
    except RuntimeError:
        return False
    return True


CAN_CACHE = _can_cache()
"""True if Numba can write compiled code of this package to disk. If not, ``cache=True`` raises an error in Numba."""


def _has_avx2() -> bool:
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return False
    return "+avx2" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


HAS_AVX2 = _has_avx2()
"""True if Numba compiles for a CPU with AVX2.

Numba's cache has the CPU and its features in the key of every kernel. So code for AVX2 never reaches a machine without.
"""


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function on its first call, and keep the result on disk until one of its sources changes.

    Numba itself checks only the file of the function. But functions of other modules are compiled into the kernel.
    Therefore the cache here also checks every module of this package that the function's module uses, directly or not.
    With options of ``numba.njit`` instead of a function, return a decorator.
    """
    if function is None:
        return partial(kernel, **options)
    dispatcher: Any = nb.njit(cache=CAN_CACHE, nogil=True, **options)(function)
    if CAN_CACHE and dispatcher is not function:  # they are the same if NUMBA_DISABLE_JIT is set
        dispatcher._cache = _Cache(function)
    return dispatcher


def external(symbol: str, result: str, arguments: str) -> Any:
    """Return a C function for kernels. The types are given by their bytes: 8 for pointers and long, 4 for int."""
    types: dict[str, Any] = {"4": nb.types.int32, "8": nb.types.int64}
    return nb.types.ExternalFunction(symbol, types[result](*(types[argument] for argument in arguments)))


class _Cache(FunctionCache):
    """The cache of Numba, with a digest of sources in the key of every compiled signature."""

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
    """Add a module of this package to `found`, with all modules that it uses, directly or not."""
    if name.partition(".")[0] == _PACKAGE and name in sys.modules and name not in found:
        found.add(name)
        for value in list(vars(sys.modules[name]).values()):
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str):
                _used_by(used, found)
    return found


class _CompilationNotice(events.Listener):
    """Log once, to the logger ``ffcv_ops``, that kernels are compiled. Without this, a first start seems to hang."""

    def __init__(self) -> None:
        self._starts: list[float] = []  # of a kernel, and of those that are compiled for it
        self.logged = False

    def on_start(self, event: events.Event) -> None:
        self._starts.append(time.perf_counter())

    def on_end(self, event: events.Event) -> None:
        taken_s = time.perf_counter() - self._starts[0]
        self._starts.pop()
        module = event.data["dispatcher"].py_func.__module__
        if taken_s > _LONG_S and not self.logged and module.partition(".")[0] == _PACKAGE:
            self.logged = True
            kept = "once" if CAN_CACHE else "at each start, because their folder cannot be written (make doctor)"
            logging.getLogger(_PACKAGE).warning(
                "compiling the data path for this processor: this takes about a minute, %s", kept
            )


_compilation_notice = _CompilationNotice()
events.register("numba:compile", _compilation_notice)
