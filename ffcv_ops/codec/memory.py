"""Loads, stores and bit operations of kernels that work on addresses.

An array in a kernel brings its reference count and its bounds along. The innermost loops of the decoder cannot afford
either. An address is an int64. Nothing here checks one: the caller makes sure that the bytes are there.
"""

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from ffcv_ops._kernels import kernel


@kernel
def address(array):
    """Return the address of an array."""
    return np.int64(array.ctypes.data)


def _integer(number_type: Any) -> ir.IntType:
    return ir.IntType(number_type.bitwidth)


def pointer_to(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    """Return a pointer to a type, from an address."""
    return builder.inttoptr(address, pointee.as_pointer())


def _build_load(number_type: Any) -> Any:
    @intrinsic
    def load(typing_context, address) -> Any:
        def codegen(context, builder, signature, arguments):
            return builder.load(pointer_to(builder, arguments[0], _integer(number_type)), align=1)

        return number_type(nb.types.int64), codegen

    return load


def _build_store(number_type: Any) -> Any:
    @intrinsic
    def store(typing_context, address, value) -> Any:
        def codegen(context, builder, signature, arguments):
            pointer = pointer_to(builder, arguments[0], _integer(number_type))
            builder.store(builder.trunc(arguments[1], _integer(number_type)), pointer, align=1)
            return context.get_dummy_value()

        return nb.types.void(nb.types.int64, nb.types.int64), codegen

    return store


load_u1, load_i8 = _build_load(nb.types.uint8), _build_load(nb.types.int64)
"""Return the number at an address, in the byte order of the machine: uint8 or int64."""


@intrinsic
def store_i8(typing_context, address, value) -> Any:
    """Store an int64 at an address."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[1], pointer_to(builder, arguments[0], ir.IntType(64)), align=1)
        return context.get_dummy_value()

    return nb.types.void(nb.types.int64, nb.types.int64), codegen


store_u1, store_u2 = map(_build_store, (nb.types.uint8, nb.types.uint16))
"""Store the low bits of an int64 at an address, as uint8 or uint16."""


@intrinsic
def load_big_endian(typing_context, address) -> Any:
    """Return the eight bytes at an address as a uint64 whose highest bits are the first byte."""

    def codegen(context, builder, signature, arguments):
        return builder.bswap(builder.load(pointer_to(builder, arguments[0], ir.IntType(64)), align=1))

    return nb.types.uint64(nb.types.int64), codegen


@intrinsic
def copy_until_ff(typing_context, source, target) -> Any:
    """Copy 32 bytes, and return the number of bytes before the first one of all ones, 32 if there is none."""
    vector = ir.VectorType(ir.IntType(8), 32)

    def codegen(context, builder, signature, arguments):
        content = builder.load(pointer_to(builder, arguments[0], vector), align=1)
        builder.store(content, pointer_to(builder, arguments[1], vector), align=1)
        ones = builder.icmp_unsigned("==", content, ir.Constant(vector, [255] * 32))
        mask = builder.zext(builder.bitcast(ones, ir.IntType(32)), ir.IntType(64))
        mask = builder.or_(mask, ir.Constant(ir.IntType(64), 1 << 32))
        return builder.cttz(mask, ir.Constant(ir.IntType(1), 1))

    return nb.types.int64(nb.types.int64, nb.types.int64), codegen
