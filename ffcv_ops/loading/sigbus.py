"""Reading a mapped file that becomes shorter: noticed, where the system would end the process.

A read of a map behind the end of its file raises SIGBUS. The handler here puts zeros where the page was, takes a note
for the map, and lets the reader go on, who must ask for the note before believing what was read; systemd reads its
journals so. What is not of a map that was announced goes to the handler that was there before.

The handler may run in any thread at any instruction, so it is compiled to nothing but loads, stores and ``mmap``.
"""

import mmap
import signal
import sys
import threading
from typing import Any

import llvmlite.binding as llvm
import numba as nb
import numpy as np
from llvmlite import ir

from ffcv_ops._kernels import CAN_CACHE

_MAX_MAPS = 256
_START, _END, _CUT = range(3)
# Of Linux with 64 bits: siginfo_t.si_addr, struct sigaction with its handler at 0, and the constants of both headers.
_SI_ADDR = 16
_SIGACTION_BYTES, _SA_FLAGS = 152, 136
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_PROT_READ, _MAP_PRIVATE_FIXED_ANONYMOUS = 1, 0x32

#: Start, end and note of every announced map; the handler reads and writes it by its address.
_maps = np.zeros((_MAX_MAPS, 3), np.int64)
_previous = np.zeros(_SIGACTION_BYTES, np.uint8)
_lock = threading.Lock()
_engine: Any = None

_sigaction = nb.types.ExternalFunction("sigaction", nb.int32(nb.int32, nb.int64, nb.int64))


@nb.njit(cache=CAN_CACHE)
def _call_sigaction(number, new, old):
    return _sigaction(number, new, old)


def announce(start: int, size_bytes: int) -> int:
    """Have the handler know a map.

    Parameters
    ----------
    start, size_bytes : int
        Its address and length.

    Returns
    -------
    int
        A number for `was_cut` and `forget`; -1 where there is no handler: not on Linux, or too many maps.
    """
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return -1
    with _lock:
        free = np.flatnonzero(_maps[:, _END] == 0)
        if not free.size:
            return -1
        _install()
        number = int(free[0])
        _maps[number] = start, 0, 0
        _maps[number, _END] = start + size_bytes  # last: from here on the handler believes the row
        return number


def forget(number: int) -> None:
    """Have the handler know a map no more."""
    if number >= 0:
        _maps[number, _END] = 0


def was_cut(number: int) -> bool:
    """Whether zeros were read in place of what a map had."""
    return number >= 0 and bool(_maps[number, _CUT])


def _install() -> None:
    """Make the handler the process's, also where another has taken its place since."""
    global _engine
    if _engine is None:
        _engine = _compile()
    handler = np.uint64(_engine.get_function_address("on_sigbus"))
    action, current = np.zeros(_SIGACTION_BYTES, np.uint8), np.zeros(_SIGACTION_BYTES, np.uint8)
    _call_sigaction(signal.SIGBUS.value, 0, current.ctypes.data)
    if current[:8].view(np.uint64)[0] == handler:
        return
    _previous[:] = current
    action[:8].view(np.uint64)[0] = handler
    action[_SA_FLAGS : _SA_FLAGS + 4].view(np.uint32)[0] = _SA_SIGINFO | _SA_ONSTACK
    _call_sigaction(signal.SIGBUS.value, action.ctypes.data, 0)


def _compile() -> Any:
    """The engine that holds ``void on_sigbus(int, siginfo_t *, void *)``.

    Through LLVM, not Numba: the handler holds addresses of this process, which Numba's cache on disk cannot have.
    """
    i32, i64 = ir.IntType(32), ir.IntType(64)
    module = ir.Module("ffcv_ops_sigbus")
    module.triple = llvm.get_process_triple()
    mmap_into = ir.Function(module, ir.FunctionType(i64, [i64, i64, i32, i32, i32, i64]), "mmap")
    sigaction = ir.Function(module, ir.FunctionType(i32, [i32, i64, i64]), "sigaction")
    handler = ir.Function(module, ir.FunctionType(ir.VoidType(), [i32, i64, i64]), "on_sigbus")
    entry, search, compare, found, following, unknown, done = (
        handler.append_basic_block(name)
        for name in ("entry", "search", "compare", "found", "following", "unknown", "done")
    )
    build = ir.IRBuilder(entry)

    def place(address: Any) -> Any:
        return build.inttoptr(address, i64.as_pointer())

    address = build.load(place(build.add(handler.args[1], i64(_SI_ADDR))))
    build.branch(search)

    build.position_at_end(search)
    row = build.phi(i64)
    row.add_incoming(i64(_maps.ctypes.data), entry)
    build.cbranch(build.icmp_unsigned("<", row, i64(_maps.ctypes.data + _maps.nbytes)), compare, unknown)

    build.position_at_end(compare)
    start, end = (build.load(place(build.add(row, i64(8 * column)))) for column in (_START, _END))
    inside = build.and_(build.icmp_unsigned("<=", start, address), build.icmp_unsigned("<", address, end))
    build.cbranch(inside, found, following)

    build.position_at_end(following)
    row.add_incoming(build.add(row, i64(_maps.strides[0])), following)
    build.branch(search)

    build.position_at_end(found)
    build.store(i64(1), place(build.add(row, i64(8 * _CUT))))
    page = build.and_(address, i64(-mmap.PAGESIZE))
    flags = i32(_PROT_READ), i32(_MAP_PRIVATE_FIXED_ANONYMOUS)
    mapped = build.call(mmap_into, [page, i64(mmap.PAGESIZE), *flags, i32(-1), i64(0)])
    build.cbranch(build.icmp_signed("==", mapped, page), done, unknown)

    # The read that failed is tried again on return, and meets the handler that was there before.
    build.position_at_end(unknown)
    build.call(sigaction, [handler.args[0], i64(_previous.ctypes.data), i64(0)])
    build.branch(done)

    build.position_at_end(done)
    build.ret_void()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine
