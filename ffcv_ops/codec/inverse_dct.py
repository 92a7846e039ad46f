"""The inverse DCT of libjpeg (``JDCT_ISLOW``), sixteen blocks side by side, to blocks of 8, 4, 2 or 1 px.

The arithmetic is that of ``jidctint.c``, and of ``jidctred.c`` for the reduced sizes. A reduced transform ignores some
coefficients.

The coefficients of sixteen blocks lie in *lanes*: row *k* of a group has the *k*-th coefficient, in the order of a
JPEG, of each block as int16. Each dimension of the transform then adds and multiplies whole rows, and no vector has to
be transposed before the pixels are stored. All products of libjpeg are multiplied out, so that a pair of products and
their sum is one instruction of AVX2. Integer arithmetic makes this exact.

libjpeg computes sums of two numbers in 16 bits where it has vector code, in more bits where not. The two agree if no
dequantised coefficient is beyond `MAX_COEFFICIENT`, no number between the two dimensions is beyond `MAX_BETWEEN`, and
no pixel is beyond `MAX_PIXEL` before it is clipped. At 8 px a row of pixels bounds the numbers between the dimensions,
so these numbers are checked only at reduced sizes. Other blocks are reported, and TurboJPEG decodes the image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numba as nb
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
MAX_BETWEEN = 25000
"""With larger numbers between the two dimensions, a sum of a reduced transform may leave 32 bits."""

_CONSTANT_BITS, _PASS_BITS = 13, 2
_FIRST_SHIFT, _SECOND_SHIFT = _CONSTANT_BITS - _PASS_BITS, _CONSTANT_BITS + _PASS_BITS + 3
_ONE = 1 << _CONSTANT_BITS
# The inputs of a transform to a size in px, in both dimensions.
_INPUTS = {8: (0, 1, 2, 3, 4, 5, 6, 7), 4: (0, 1, 2, 3, 5, 6, 7), 2: (0, 1, 3, 5, 7), 1: (0,)}
# Pairs of even inputs. Each line of `_EVEN` has the weights of the pairs for the first outputs, from both ends. The
# difference of the two terms is for the outputs in the middle.
_EVEN_PAIRS: dict[int, Any] = {8: ((0, 4), (2, 6)), 4: ((0, 0), (2, 6)), 2: ((0, 0),)}
_EVEN: dict[int, Any] = {
    8: (((_ONE, _ONE), (10703, 4433)), ((_ONE, -_ONE), (4433, -10704))),
    4: (((_ONE, _ONE), (15137, -6270)),),
    2: (((2 * _ONE, 2 * _ONE),),),
}
# The weights of inputs 1 and 3, then 5 and 7. The first line is for the first and the last output, and so on.
_ODD = {
    8: (
        ((11363, 9633), (6437, 2260)),
        ((9633, -2259), (-11362, -6436)),
        ((6437, -11362), (2261, 9633)),
        ((2260, -6436), (9633, -11363)),
    ),
    4: (((20995, 7373), (-4926, -4176)), ((8697, -17799), (11893, -1730))),
    2: (((29692, -10426), (6967, -5906)),),
}

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


def _transform(machine: _Avx2 | _Plain, x: dict[int, ir.Value], size: int, shift: int) -> list[ir.Value]:
    """Emit one dimension of a transform to `size` numbers: rows of lanes in, by their number, and rows out."""
    builder = machine.builder
    if size == 1:
        # libjpeg does not move the only number to the left and back.
        is_last = shift == _SECOND_SHIFT
        return [builder.ashr(builder.add(x[0], _splat(_I16, LANES, 4)), _splat(_I16, LANES, 3)) if is_last else x[0]]
    shift += (8 // size).bit_length() - 1
    even = [machine.pair(x[a], x[b]) for a, b in _EVEN_PAIRS[size]]
    odd = machine.pair(x[1], x[3]), machine.pair(x[5], x[7])

    def both(function: Callable[..., ir.Value], a: Any, b: Any) -> list[ir.Value]:
        return [function(*parts) for parts in zip(a, b, strict=True)]

    def shifted(wide: Any) -> ir.Value:
        count = wide[0].type.count
        return machine.narrow([builder.ashr(part, _splat(_I32, count, shift)) for part in wide])

    sums, differences = [], []
    for first, *rest in _EVEN[size]:
        start = machine.weigh(even[0], first)
        start = [builder.add(part, _splat(_I32, part.type.count, 1 << shift - 1)) for part in start]
        other = [machine.weigh(even[1], weights) for weights in rest]
        sums.append(both(builder.add, start, other[0]) if other else start)
        differences += [both(builder.sub, start, term) for term in other]
    out: list[ir.Value] = [None] * size
    for number, of_evens in enumerate(sums + differences[::-1]):
        first, second = _ODD[size][number]
        of_odds = both(builder.add, machine.weigh(odd[0], first), machine.weigh(odd[1], second))
        out[number] = shifted(both(builder.add, of_evens, of_odds))
        out[size - 1 - number] = shifted(both(builder.sub, of_evens, of_odds))
    return out


class _Range:
    """The range of the numbers of each lane."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder
        self.lowest: ir.Value = None
        self.highest: ir.Value = None

    def include(self, value: ir.Value) -> None:
        if self.lowest is None:
            self.lowest = self.highest = value
            return
        builder = self.builder
        self.highest = builder.select(builder.icmp_signed(">", self.highest, value), self.highest, value)
        self.lowest = builder.select(builder.icmp_signed("<", self.lowest, value), self.lowest, value)

    def exceeds(self, most: int) -> ir.Value:
        """Return an integer that is not 0 if a magnitude is above `most`."""
        builder = self.builder
        beyond = builder.or_(
            builder.icmp_signed(">", self.highest, _splat(_I16, LANES, most)),
            builder.icmp_signed("<", self.lowest, _splat(_I16, LANES, -most)),
        )
        return builder.zext(builder.bitcast(beyond, _I16), _I64)


@intrinsic(prefer_literal=True)
def transform_columns(typing_context, source, divisors, work, size) -> Any:
    """Transform the columns of coefficients, and clear the coefficients.

    Parameters
    ----------
    source : int
        Address of the coefficients of a group.
    divisors : int
        Address of the quantisation table, uint8 (64,) in the order of a JPEG.
    work : int
        Address of the output, int16 (size, 8, LANES): row, column, lane. The columns of coefficients that a reduced
        transform ignores are left as they are.
    size : literal int
        The side of a block in px: 8, 4, 2 or 1.

    Returns
    -------
    int
        Not 0 if a number is beyond `MAX_BETWEEN` and the size is reduced.
    """
    if not isinstance(size, nb.types.IntegerLiteral):
        return None
    side = size.literal_value
    places = {tuple(place): number for number, place in enumerate(ZIGZAG.tolist())}

    def codegen(context, builder, signature, arguments):
        source, divisors, work, _ = arguments
        machine, between = _arithmetic(builder), _Range(builder)
        empty, zeros = ir.Constant(_SHORTS, ir.Undefined), _splat(_I16, LANES, 0)
        for column in range(8):
            lanes = {}
            for row in range(8):
                place = places[row, column]
                pointer = pointer_to(builder, builder.add(source, ir.Constant(_I64, place * ROW_BYTES)), _SHORTS)
                if row in _INPUTS[side] and column in _INPUTS[side]:
                    coefficients = builder.load(pointer, align=1)
                    divisor = pointer_to(builder, builder.add(divisors, ir.Constant(_I64, place)), _I8)
                    divisor = builder.zext(builder.load(divisor, align=1), _I16)
                    one = builder.insert_element(empty, divisor, ir.Constant(_I32, 0))
                    lanes[row] = builder.mul(coefficients, _shuffle(builder, one, empty, [0] * LANES))
                builder.store(zeros, pointer, align=1)
            if column not in _INPUTS[side]:
                continue
            for row, value in enumerate(_transform(machine, lanes, side, _FIRST_SHIFT)):
                address = builder.add(work, ir.Constant(_I64, (8 * row + column) * ROW_BYTES))
                builder.store(value, pointer_to(builder, address, _SHORTS), align=1)
                between.include(value)
        return between.exceeds(MAX_BETWEEN) if side < 8 else ir.Constant(_I64, 0)

    return nb.types.int64(nb.types.int64, nb.types.int64, nb.types.int64, size), codegen


def _emit_row(builder: ir.IRBuilder, work: ir.Value, size: int) -> tuple[list[ir.Value], ir.Value]:
    """Emit the second dimension for a row: the bytes of the blocks one after the other, and whether one is beyond.

    The lower half of each vector is for the first eight blocks, the upper half for the other eight.
    """
    machine, distances = _arithmetic(builder), _Range(builder)
    x = {}
    for column in _INPUTS[size]:
        address = builder.add(work, ir.Constant(_I64, column * ROW_BYTES))
        x[column] = builder.load(pointer_to(builder, address, _SHORTS), align=1)
    pixels = _transform(machine, x, size, _SECOND_SHIFT)
    for value in pixels:
        distances.include(value)
    # At 1 px the second half of each half is not used.
    rows = [machine.to_bytes(pixels[i], pixels[min(i + 1, size - 1)]) for i in range(0, size, 2)]
    half = len(rows) // 2
    if size == 2:
        rows = [_shuffle(builder, rows[0], rows[0], [16 * (i // 16) + i % 16 // 2 + i % 2 * 8 for i in range(32)])]
    for _ in range(size.bit_length() - 1 if half else 0):
        rows = [
            _shuffle(builder, rows[i], rows[i + half], _interleaving(32, upper))
            for i in range(half)
            for upper in (False, True)
        ]
    signs = _splat(_I8, 32, 128)
    return [builder.xor(row, signs) for row in rows], distances.exceeds(MAX_PIXEL)


def _build_row_transform(blocks_per_mcu: int) -> Any:
    """Return the transform of a row of a group, whose MCUs are `blocks_per_mcu` blocks wide."""

    @intrinsic(prefer_literal=True)
    def transform_row(typing_context, work, places, offset, below, size) -> Any:
        if not isinstance(size, nb.types.IntegerLiteral):
            return None
        width = blocks_per_mcu * size.literal_value

        def codegen(context, builder, signature, arguments):
            work, places, offset, below, _ = arguments
            rows, beyond = _emit_row(builder, work, size.literal_value)
            for mcu in reversed(range(8 // blocks_per_mcu)):
                pointer = pointer_to(builder, builder.add(places, ir.Constant(_I64, 8 * mcu)), _I64)
                upper = builder.add(builder.load(pointer, align=1), offset)
                row, start = rows[mcu * width // 16], mcu * width % 16
                for at, first in ((upper, start), (builder.add(upper, below), 16 + start)):
                    part = _shuffle(builder, row, row, range(first, first + width))
                    builder.store(part, pointer_to(builder, at, ir.VectorType(_I8, width)), align=1)
            return beyond

        return nb.types.int64(*(nb.types.int64 for _ in range(4)), size), codegen

    return transform_row


transform_luma_row, transform_chroma_row = _build_row_transform(2), _build_row_transform(1)
"""Transform a row of a group: of luma, four MCUs; of chroma, eight blocks of Cb, then eight of Cr.

A group of luma has eight blocks from upper halves of MCUs, then eight from lower halves.

Parameters
----------
work : int
    Address of the row's numbers, int16 (8, LANES), from `transform_columns`.
places : int
    Address of the addresses of the MCUs in the plane, int64 (4,) or (8,). If two are equal, the earlier one is stored.
offset, below : int
    What to add to the addresses for the upper blocks or Cb, and what to add further for the lower blocks or Cr.
size : literal int
    The side of a block in px: 8, 4, 2 or 1.

Returns
-------
int
    Not 0 if a pixel is beyond `MAX_PIXEL`.
"""
