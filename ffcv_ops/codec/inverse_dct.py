"""The inverse DCT of libjpeg (``JDCT_ISLOW``), sixteen blocks side by side, with the arithmetic of ``jidctint.c``.

The coefficients of sixteen blocks lie in *lanes*: row *k* of a group has the *k*-th coefficient, in the order of a
JPEG, of each block as int16. Each dimension of the transform then adds and multiplies whole rows, and no vector has to
be transposed before the pixels are stored. All products of libjpeg are multiplied out, so that a pair of products and
their sum is one instruction of AVX2. Integer arithmetic makes this exact.

libjpeg computes sums of two numbers in 16 bits where it has vector code, in more bits where not. The two agree if no
dequantised coefficient is beyond `MAX_COEFFICIENT` and no pixel is beyond `MAX_PIXEL` before it is clipped: a row of
pixels bounds the numbers between the two dimensions. Other blocks are reported, and TurboJPEG decodes the image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from ffcv_ops._kernels import HAS_AVX2
from ffcv_ops.codec.memory import pointer_to
from ffcv_ops.codec.zigzag import ZIGZAG

LANES = 16
ROW_BYTES = 2 * LANES
MAX_COEFFICIENT = (1 << 14) - 1
MAX_PIXEL = 480
"""The largest distance from 128 of a pixel before it is clipped."""

_CONSTANT_BITS, _PASS_BITS = 13, 2
_FIRST_SHIFT, _SECOND_SHIFT = _CONSTANT_BITS - _PASS_BITS, _CONSTANT_BITS + _PASS_BITS + 3
_ONE = 1 << _CONSTANT_BITS
# The weights of inputs 0 and 4, then 2 and 6, for outputs 0 and 7, and for outputs 1 and 6. The difference of the two
# terms is for outputs 3 and 4, and for outputs 2 and 5.
_EVEN = (((_ONE, _ONE), (10703, 4433)), ((_ONE, -_ONE), (4433, -10704)))
# The weights of inputs 1 and 3, then 5 and 7, for outputs 0 and 7, 1 and 6, 2 and 5, 3 and 4.
_ODD = (
    ((11363, 9633), (6437, 2260)),
    ((9633, -2259), (-11362, -6436)),
    ((6437, -11362), (2261, 9633)),
    ((2260, -6436), (9633, -11363)),
)

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_SHORTS = ir.VectorType(_I16, LANES)
_BYTES = ir.VectorType(_I8, 32)


def _splat(item: ir.Type, count: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(item, count), [value] * count)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))


def _interleaving(count: int, upper: bool) -> list[int]:
    """Return the order in which AVX2 interleaves the lower or upper halves of the two halves of two vectors."""
    half, start = count // 2, count // 4 if upper else 0
    return [
        lane + start + number + source * count for lane in (0, half) for number in range(half // 2) for source in (0, 1)
    ]


class _Avx2:
    """Arithmetic on sixteen lanes in AVX2: multiply-add pairs on two interleaved halves."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def _call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    def pair(self, x: ir.Value, y: ir.Value) -> Any:
        return [_shuffle(self.builder, x, y, _interleaving(LANES, upper)) for upper in (False, True)]

    def weigh(self, pair: Any, weights: tuple[int, int]) -> Any:
        constant = ir.Constant(_SHORTS, list(weights) * (LANES // 2))
        return [self._call("llvm.x86.avx2.pmadd.wd", ir.VectorType(_I32, 8), half, constant) for half in pair]

    def narrow(self, wide: Any) -> ir.Value:
        return self._call("llvm.x86.avx2.packssdw", _SHORTS, *wide)

    def to_bytes(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._call("llvm.x86.avx2.packsswb", _BYTES, x, y)


class _Plain:
    """The same arithmetic in terms that LLVM compiles for every machine."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def pair(self, x: ir.Value, y: ir.Value) -> Any:
        return [self.builder.sext(one, ir.VectorType(_I32, LANES)) for one in (x, y)]

    def weigh(self, pair: Any, weights: tuple[int, int]) -> Any:
        products = [self.builder.mul(x, _splat(_I32, LANES, weight)) for x, weight in zip(pair, weights, strict=True)]
        return [self.builder.add(*products)]

    def _clamp(self, value: ir.Value, bits: int) -> ir.Value:
        for comparison, bound in (("<", (1 << bits - 1) - 1), (">", -(1 << bits - 1))):
            constant = _splat(value.type.element, LANES, bound)
            within = self.builder.icmp_signed(comparison, value, constant)
            value = self.builder.select(within, value, constant)
        return value

    def narrow(self, wide: Any) -> ir.Value:
        return self.builder.trunc(self._clamp(wide[0], 16), _SHORTS)

    def to_bytes(self, x: ir.Value, y: ir.Value) -> ir.Value:
        x, y = (self.builder.trunc(self._clamp(one, 8), ir.VectorType(_I8, LANES)) for one in (x, y))
        halves = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
        return _shuffle(self.builder, x, y, halves)


def _arithmetic(builder: ir.IRBuilder) -> _Avx2 | _Plain:
    return _Avx2(builder) if HAS_AVX2 else _Plain(builder)


def _transform(machine: _Avx2 | _Plain, x: Sequence[ir.Value], shift: int) -> list[ir.Value]:
    """Emit one dimension of the transform: eight rows of lanes in, eight rows out."""
    builder = machine.builder
    even, odd = (
        (machine.pair(x[0], x[4]), machine.pair(x[2], x[6])),
        (machine.pair(x[1], x[3]), machine.pair(x[5], x[7])),
    )

    def both(function: Callable[..., ir.Value], a: Any, b: Any) -> list[ir.Value]:
        return [function(*parts) for parts in zip(a, b, strict=True)]

    def shifted(wide: Any) -> ir.Value:
        count = wide[0].type.count
        return machine.narrow([builder.ashr(part, _splat(_I32, count, shift)) for part in wide])

    out: list[ir.Value] = [None] * 8
    halves: dict[tuple[int, int], Any] = {}
    for number, (first, second) in enumerate(_EVEN):
        start = machine.weigh(even[0], first)
        start = [builder.add(part, _splat(_I32, part.type.count, 1 << shift - 1)) for part in start]
        other = machine.weigh(even[1], second)
        halves[number, 0], halves[number, 1] = both(builder.add, start, other), both(builder.sub, start, other)
    for number, of_evens in enumerate((halves[0, 0], halves[1, 0], halves[1, 1], halves[0, 1])):
        first, second = _ODD[number]
        of_odds = both(builder.add, machine.weigh(odd[0], first), machine.weigh(odd[1], second))
        out[number] = shifted(both(builder.add, of_evens, of_odds))
        out[7 - number] = shifted(both(builder.sub, of_evens, of_odds))
    return out


@intrinsic(prefer_literal=True)
def transform_column(typing_context, source, column, divisors, work) -> Any:
    """Transform a column of coefficients, and clear it.

    Parameters
    ----------
    source : int
        Address of the coefficients of a group.
    column : literal int
        0 to 7.
    divisors : int
        Address of the quantisation table, uint8 (64,) in the order of a JPEG.
    work : int
        Address of the output, int16 (8, 8, LANES): row, column, lane.
    """
    if not isinstance(column, nb.types.IntegerLiteral):
        return None
    at_column = column.literal_value
    places = [int(np.flatnonzero((ZIGZAG == (row, at_column)).all(axis=1))[0]) for row in range(8)]

    def codegen(context, builder, signature, arguments):
        source, _, divisors, work = arguments
        machine = _arithmetic(builder)
        lanes = []
        for place in places:
            address = builder.add(source, ir.Constant(_I64, place * ROW_BYTES))
            pointer = pointer_to(builder, address, _SHORTS)
            coefficients = builder.load(pointer, align=1)
            builder.store(_splat(_I16, LANES, 0), pointer, align=1)
            divisor = builder.load(pointer_to(builder, builder.add(divisors, ir.Constant(_I64, place)), _I8), align=1)
            empty = ir.Constant(_SHORTS, ir.Undefined)
            one = builder.insert_element(empty, builder.zext(divisor, _I16), ir.Constant(_I32, 0))
            lanes.append(builder.mul(coefficients, _shuffle(builder, one, empty, [0] * LANES)))
        for row, value in enumerate(_transform(machine, lanes, _FIRST_SHIFT)):
            address = builder.add(work, ir.Constant(_I64, (8 * row + at_column) * ROW_BYTES))
            builder.store(value, pointer_to(builder, address, _SHORTS), align=1)
        return context.get_dummy_value()

    return nb.types.void(nb.types.int64, column, nb.types.int64, nb.types.int64), codegen


def _emit_row(builder: ir.IRBuilder, work: ir.Value) -> tuple[list[ir.Value], ir.Value]:
    """Emit the second dimension for a row: the bytes of the blocks one after the other, and whether one is beyond."""
    machine = _arithmetic(builder)
    x = []
    for column in range(8):
        address = builder.add(work, ir.Constant(_I64, column * ROW_BYTES))
        x.append(builder.load(pointer_to(builder, address, _SHORTS), align=1))
    pixels = _transform(machine, x, _SECOND_SHIFT)
    highest = lowest = pixels[0]
    for value in pixels[1:]:
        highest = builder.select(builder.icmp_signed(">", highest, value), highest, value)
        lowest = builder.select(builder.icmp_signed("<", lowest, value), lowest, value)
    beyond = builder.or_(
        builder.icmp_signed(">", highest, _splat(_I16, LANES, MAX_PIXEL)),
        builder.icmp_signed("<", lowest, _splat(_I16, LANES, -MAX_PIXEL)),
    )
    rows = [machine.to_bytes(pixels[2 * i], pixels[2 * i + 1]) for i in range(4)]
    for _ in range(3):
        rows = [
            _shuffle(builder, rows[i], rows[i + 2], _interleaving(32, upper))
            for i in range(2)
            for upper in (False, True)
        ]
    signs = _splat(_I8, 32, 128)
    rows = [builder.xor(row, signs) for row in rows]
    return rows, builder.zext(builder.bitcast(beyond, _I16), _I64)


def _load_place(builder: ir.IRBuilder, places: ir.Value, number: int) -> ir.Value:
    address = builder.add(places, ir.Constant(_I64, 8 * number))
    return builder.load(pointer_to(builder, address, _I64), align=1)


@intrinsic
def transform_luma_row(typing_context, work, places, offset, below) -> Any:
    """Transform a row of a group of four MCUs: eight blocks from upper halves, then eight from lower halves.

    Parameters
    ----------
    work : int
        Address of the row's numbers, int16 (8, LANES), from `transform_column`.
    places : int
        Address of the addresses of the four MCUs in the plane, int64 (4,). If two are equal, the earlier one is
        stored.
    offset, below : int
        What to add to the addresses for the upper blocks, and what to add further for the lower blocks.

    Returns
    -------
    int
        Not 0 if a pixel is beyond `MAX_PIXEL`.
    """
    half = ir.VectorType(_I8, 16)

    def codegen(context, builder, signature, arguments):
        work, places, offset, below = arguments
        rows, beyond = _emit_row(builder, work)
        for mcu in reversed(range(4)):
            upper = builder.add(_load_place(builder, places, mcu), offset)
            for place, first in ((upper, 0), (builder.add(upper, below), 16)):
                part = _shuffle(builder, rows[mcu], rows[mcu], range(first, first + 16))
                builder.store(part, pointer_to(builder, place, half), align=1)
        return beyond

    return nb.types.int64(*(nb.types.int64 for _ in range(4))), codegen


@intrinsic
def transform_chroma_row(typing_context, work, places, offset, below) -> Any:
    """Transform a row of a group of eight MCUs: eight blocks of Cb, then eight of Cr. See `transform_luma_row`."""
    half = ir.VectorType(_I8, 8)

    def codegen(context, builder, signature, arguments):
        work, places, offset, below = arguments
        rows, beyond = _emit_row(builder, work)
        for mcu in reversed(range(8)):
            cb = builder.add(_load_place(builder, places, mcu), offset)
            for place, first in ((cb, 0), (builder.add(cb, below), 16)):
                start = first + 8 * (mcu & 1)
                part = _shuffle(builder, rows[mcu >> 1], rows[mcu >> 1], range(start, start + 8))
                builder.store(part, pointer_to(builder, place, half), align=1)
        return beyond

    return nb.types.int64(*(nb.types.int64 for _ in range(4))), codegen
