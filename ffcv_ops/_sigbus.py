"""A handler of the signal SIGBUS, for mapped files that another process cuts.

If a process reads a mapped file behind its end, the operating system raises SIGBUS, and by default ends the process.
The handler here puts a page of zeros at that place and makes a note for the map. Then the read continues. Before the
data is used, the reader asks `was_cut` and raises an error. systemd reads its journals in the same way. If the address
belongs to no watched map, the handler puts the earlier handler back. Then the read fails again and meets that one.

A signal may interrupt any thread at any instruction. So the handler consists only of loads, stores, and two calls that
are allowed in a handler, ``mmap`` and ``sigaction``. It is written in the language of LLVM, because it contains
addresses of this process, which Numba's cache on disk cannot hold.

Reading every sample by ``pread`` would need no handler, but is slower, because it copies each sample. On one core of an
AMD EPYC, with files in the page cache, the loader then ran at 0.96 of its speed for JPEGs of 500 px, and at 0.90 for
raw images of 256 px (CPU time, the best of 14 and of 20 interleaved passes).
"""

import ctypes
import mmap
import signal
import sys
import threading
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

_MAX_MAPS = 256
_START, _END, _CUT = range(3)
# Constants of 64-bit Linux: the place of si_addr in siginfo_t in bytes, and flags of <signal.h> and <sys/mman.h>.
_SI_ADDR = 16
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_PROT_READ, _MAP_PRIVATE_FIXED_ANONYMOUS = 1, 0x32


class _SigAction(ctypes.Structure):
    """``struct sigaction`` of 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


#: For every watched map its start, its end, and the note that it was cut. The handler uses the address of this array.
_maps = np.zeros((_MAX_MAPS, 3), np.int64)
#: The handler that was installed before ours.
_previous = _SigAction()
_lock = threading.Lock()
_engine: Any = None


def watch(start: int, size_bytes: int) -> int:
    """Let the handler watch a map.

    Parameters
    ----------
    start, size_bytes : int
        The map's address and length.

    Returns
    -------
    int
        A number for `was_cut` and `forget`. It is -1 if there is no handler: not on Linux, or with too many maps.
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
        _maps[number, _END] = start + size_bytes  # the end comes last, because it makes the row valid
        return number


def forget(number: int) -> None:
    """Let the handler no longer watch a map."""
    if number >= 0:
        _maps[number, _END] = 0


def was_cut(number: int) -> bool:
    """Return True if zeros were read from a map in place of its data."""
    return number >= 0 and bool(_maps[number, _CUT])


def _install() -> None:
    """Make the handler that of the process, also if another one has replaced it."""
    global _engine
    if _engine is None:
        _engine = _compile()
    sigaction = ctypes.CDLL(None).sigaction
    handler, current = _engine.get_function_address("on_sigbus"), _SigAction()
    sigaction(signal.SIGBUS, None, ctypes.byref(current))
    if current.handler == handler:
        return
    ctypes.memmove(ctypes.byref(_previous), ctypes.byref(current), ctypes.sizeof(current))
    action = _SigAction(handler=handler, flags=_SA_SIGINFO | _SA_ONSTACK)
    sigaction(signal.SIGBUS, ctypes.byref(action), None)


def _compile() -> Any:
    """Return the engine that holds the handler, ``void on_sigbus(int, siginfo_t *, void *)``."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
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

    # address = info->si_addr; for each row of _maps:
    address = build.load(place(build.add(handler.args[1], i64(_SI_ADDR))))
    build.branch(search)
    build.position_at_end(search)
    row = build.phi(i64)
    row.add_incoming(i64(_maps.ctypes.data), entry)
    build.cbranch(build.icmp_unsigned("<", row, i64(_maps.ctypes.data + _maps.nbytes)), compare, unknown)

    # if row.start <= address < row.end:
    build.position_at_end(compare)
    start, end = (build.load(place(build.add(row, i64(8 * column)))) for column in (_START, _END))
    inside = build.and_(build.icmp_unsigned("<=", start, address), build.icmp_unsigned("<", address, end))
    build.cbranch(inside, found, following)
    build.position_at_end(following)
    row.add_incoming(build.add(row, i64(_maps.strides[0])), following)
    build.branch(search)

    # row.cut = 1, and map zeros at the page of the address.
    build.position_at_end(found)
    build.store(i64(1), place(build.add(row, i64(8 * _CUT))))
    page = build.and_(address, i64(-mmap.PAGESIZE))
    flags = i32(_PROT_READ), i32(_MAP_PRIVATE_FIXED_ANONYMOUS)
    mapped = build.call(mmap_into, [page, i64(mmap.PAGESIZE), *flags, i32(-1), i64(0)])
    build.cbranch(build.icmp_signed("==", mapped, page), done, unknown)

    # No row has the address: put the earlier handler back. After the return, the read is tried again and meets it.
    build.position_at_end(unknown)
    build.call(sigaction, [handler.args[0], i64(ctypes.addressof(_previous)), i64(0)])
    build.branch(done)
    build.position_at_end(done)
    build.ret_void()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine
