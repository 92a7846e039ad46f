"""Weighing, splitting and joining of pixels with AVX2, with the results of the plain loops in `resample`.

A weight has 22 fractional bits, which is more than a 16 bit factor holds. Therefore a weight is ``high << 16 | low``,
with a signed low part. One instruction multiplies bytes by the high parts of two weights and adds both products in 16
bits. Another does it with the low parts in 32 bits. The sums of the low parts are needed from bit 16 on only, where the
sums of the high parts begin. So the rest of the arithmetic has 16 bits, and loses nothing::

    (sum(high * byte) * 65536 + sum(low * byte) + (1 << 21)) >> 22
    == (sum(high * byte) + (sum(low * byte) >> 16) + 32) >> 6

Along y, the pixels of two rows are interleaved. Along x, sixteen outputs are computed at a time. A shuffle collects the
two neighbours of each output from a window of sixteen bytes. Nothing is transposed.

All functions take addresses. Their callers see to it that LLVM compiles for AVX2, that sizes reach the minimum here,
and that the bytes are theirs. No byte outside the given rows is read or written.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numba as nb
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from ffcv_ops._kernels import HAS_AVX2

MIN_LENGTH = 32
"""Bytes of the shortest row for `weigh_rows`, and pixels of the shortest row for the functions of colour."""

GROUP = 16
"""Outputs that `weigh_columns` computes together. It is also the width of the narrowest source in bytes."""

MAX_PAIRS = 4
"""The largest number of pairs of weights. There is code for each number, and it takes long to compile."""

SPREAD_PAIRS = 3
"""The number of pairs of weights for which the outputs of `weigh_columns` may need two windows."""

WINDOW_SPREAD = 14
"""The largest distance between the columns of the outputs that share a window."""

STRIPE_PX = 96
"""Rows that `weigh_columns` weighs before it turns to the next columns. More rows leave the cache."""

_PARTS = 16  # to have both numbers in one

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _WORDS, _INTS = ir.VectorType(_I8, 32), ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
_HALF = ir.VectorType(_I8, 16)
_ZEROS = ir.Constant(_BYTES, [0] * 32)
_ZERO = 32  # the first index of _ZEROS in a shuffle of a vector with it
# The shuffles stay within the halves of a register, as the instructions do.
_LOWER = [16 * half + i // 2 + 32 * (i % 2) for half in range(2) for i in range(16)]
_UPPER = [index + 8 for index in _LOWER]
_LOWER_WORDS = [8 * half + i // 2 + 16 * (i % 2) for half in range(2) for i in range(8)]
_UPPER_WORDS = [index + 4 for index in _LOWER_WORDS]
_WIDE_LOWER = [16 * half + i // 2 if i % 2 == 0 else _ZERO for half in range(2) for i in range(16)]
_WIDE_UPPER = [16 * half + 8 + i // 2 if i % 2 == 0 else _ZERO for half in range(2) for i in range(16)]
_EVEN_PAIRS = [index for i in range(8) for index in (4 * i, _ZERO, 4 * i + 1, _ZERO)]
_ODD_PAIRS = [index for i in range(8) for index in (4 * i + 2, _ZERO, 4 * i + 3, _ZERO)]


def _int64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


class _Emitter:
    """Emit the code of one function: instructions by name."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def call(self, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.x86.avx2.{name}"), values
        )

    def load(self, kind: ir.Type, address: ir.Value, offset: int = 0) -> ir.Value:
        return self.builder.load(self._pointer(kind, address, offset), align=1)

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        self.builder.store(value, self._pointer(value.type, address, offset), align=1)

    def _pointer(self, kind: ir.Type, address: ir.Value, offset: int) -> ir.Value:
        return self.builder.inttoptr(self.builder.add(address, _int64(offset)), kind.as_pointer())

    def shuffle(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))

    def interleave(self, a: ir.Value, b: ir.Value) -> list[ir.Value]:
        return [self.shuffle(a, b, order) for order in (_LOWER, _UPPER)]

    def widen(self, values: ir.Value) -> list[ir.Value]:
        orders = _WIDE_LOWER, _WIDE_UPPER
        return [self.builder.bitcast(self.shuffle(values, _ZEROS, order), _WORDS) for order in orders]

    def splat(self, value: ir.Value, kind: ir.VectorType) -> ir.Value:
        count = 256 // value.type.width
        vector = self.builder.insert_element(
            ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, ir.Constant(_I32, 0)
        )
        return self.builder.bitcast(self.shuffle(vector, vector, [0] * count), kind)

    def constant(self, *values: int) -> ir.Value:
        return ir.Constant(_WORDS, list(values) * (16 // len(values)))

    def pair(self, lower: ir.Value, upper: ir.Value) -> ir.Value:
        return self.shuffle(lower, upper, range(32))

    def halves(self, values: ir.Value) -> list[ir.Value]:
        return [self.shuffle(values, values, range(16 * half, 16 * half + 16)) for half in range(2)]

    def weigh(
        self, sums: list[ir.Value] | None, pairs: ir.Value, high: ir.Value, lows: list[ir.Value]
    ) -> list[ir.Value]:
        """Add weighed pairs of bytes to three sums: of the high parts, and of the low parts of even and odd pairs."""
        products = [self.call("pmadd.ub.sw", _WORDS, pairs, high)]
        for order, low in zip((_EVEN_PAIRS, _ODD_PAIRS), lows, strict=True):
            values = self.builder.bitcast(self.shuffle(pairs, _ZEROS, order), _WORDS)
            products.append(self.call("pmadd.wd", _INTS, values, low))
        return products if sums is None else [self.builder.add(*both) for both in zip(sums, products, strict=True)]

    def round(self, sums: list[ir.Value]) -> ir.Value:
        high, even, odd = sums
        even = self.builder.bitcast(self.builder.lshr(even, ir.Constant(_INTS, [16] * 8)), _WORDS)
        mixed = self.shuffle(even, self.builder.bitcast(odd, _WORDS), [i + 16 * (i % 2) for i in range(16)])
        total = self.builder.add(high, mixed)
        # Multiply by 512, add 2^14 and shift by 15 to the right: add 32, and shift by 6.
        return self.call("pmul.hr.sw", _WORDS, total, self.constant(512))

    def pack(self, lower: ir.Value, upper: ir.Value) -> ir.Value:
        return self.call("packuswb", _BYTES, lower, upper)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def loop(self, stop: ir.Value, step: int, emit: Callable[[ir.Value], None]) -> None:
        with cgutils.for_range_slice(self.builder, _int64(0), stop, _int64(step)) as (index, _):
            emit(index)

    def for_each_block(self, length: ir.Value, emit: Callable[[ir.Value], None]) -> None:
        """Emit a loop over blocks of `MIN_LENGTH`. The last block overlaps the one before."""
        last = self.builder.sub(length, _int64(MIN_LENGTH))
        self.loop(length, MIN_LENGTH, lambda start: emit(self.minimum(start, last)))

    def switch(self, value: ir.Value, cases: Sequence[int], emit: Callable[[int], None]) -> None:
        done = self.builder.append_basic_block("done")
        switch = self.builder.switch(value, done)
        for case in cases:
            block = self.builder.append_basic_block(f"case_{case}")
            switch.add_case(_int64(case), block)
            self.builder.position_at_end(block)
            emit(case)
            self.builder.branch(done)
        self.builder.position_at_end(done)

    def split_weights(self, first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the high parts of two int32 weights as two bytes, and the low parts as two words."""
        builder, kind = self.builder, first.type

        def number(value: int) -> ir.Value:
            return ir.Constant(kind, value if kind is _I32 else [value] * kind.count)

        def high_byte(weight: ir.Value) -> ir.Value:
            return builder.and_(builder.lshr(builder.add(weight, number(1 << 15)), number(16)), number(255))

        high = builder.or_(high_byte(first), builder.shl(high_byte(second), number(8)))
        return high, builder.or_(builder.and_(first, number(0xFFFF)), builder.shl(second, number(16)))


def _function(emit: Callable[..., None]) -> Any:
    """Make a function for kernels from a function that emits its code. The arguments are int64, and there is no result.

    The code is a function of its own for LLVM too, so that its compilation happens once. Without AVX2 the function is
    empty, because LLVM could not compile it.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = f"{__name__}.{emit.__name__}"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_I64] * len(arguments)), name)
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            own_builder = ir.IRBuilder(function.append_basic_block("entry"))
            if HAS_AVX2:
                emit(_Emitter(own_builder), *function.args)
            own_builder.ret_void()
        builder.call(function, arguments)
        return context.get_dummy_value()

    def declare(typing_context: Any, *types: Any) -> Any:
        return nb.void(*[nb.types.int64] * len(types)), codegen

    return intrinsic(wraps(emit)(declare))


@_function
def weigh_rows(e, source, stride, firsts, counts, weights, size, length, out):
    """Weigh rows of `length` bytes, `stride` apart, into `size` rows, as `AxisTaps` says.

    There are at most 2 x `MAX_PAIRS` weights.
    """
    builder = e.builder

    def emit_row(y):
        at = builder.mul(y, _int64(4))
        first, count = (builder.sext(e.load(_I32, builder.add(array, at)), _I64) for array in (firsts, counts))
        top, target = builder.add(source, builder.mul(first, stride)), builder.add(out, builder.mul(y, length))
        # If the number is odd, the last weight is zero, and the row may be beyond the source.
        is_odd = builder.trunc(count, ir.IntType(1))
        last_stride = builder.select(is_odd, _int64(0), stride)

        def emit_pairs(num_pairs):
            row, weight, pointers, factors = top, builder.add(weights, at), [], []
            for pair in range(num_pairs):
                pointers.append((row, builder.add(row, stride if pair + 1 < num_pairs else last_stride)))
                row = builder.add(pointers[-1][1], stride)
                both = []
                for _ in range(2):
                    both.append(e.load(_I32, weight))
                    weight = builder.add(weight, builder.mul(size, _int64(4)))
                high, low = e.split_weights(*both)
                low = e.splat(low, _WORDS)
                factors.append((e.splat(builder.trunc(high, _I16), _BYTES), [low, low]))

            def emit_block(start):
                sums: list[Any] = [None, None]
                for rows, (high, lows) in zip(pointers, factors, strict=True):
                    pairs = e.interleave(*(e.load(_BYTES, builder.add(row, start)) for row in rows))
                    sums = [e.weigh(before, some, high, lows) for before, some in zip(sums, pairs, strict=True)]
                e.store(e.pack(*map(e.round, sums)), builder.add(target, start))

            e.for_each_block(length, emit_block)

        e.switch(builder.lshr(builder.add(count, _int64(1)), _int64(1)), range(1, MAX_PAIRS + 1), emit_pairs)

    e.loop(size, 1, emit_row)


@_function
def weigh_columns(e, source, stride, height, width, firsts, weights, size, num_pairs, num_parts, out):
    """Weigh the columns of `height` rows, `stride` apart, into `size` columns, as `AxisTaps` says.

    `num_pairs` is the largest number of pairs of weights of an output. If `num_parts` is 1, a window of 16 px has a
    pair of columns for each of 8 outputs side by side. If it is 2, a window has a pair for each of 4.
    """
    builder = e.builder
    last_window = builder.sub(width, _int64(GROUP))

    def emit_steps(case):
        pairs, parts = case % _PARTS, case // _PARTS

        def emit_group(stripe, num_rows, group):
            start = e.minimum(group, builder.sub(size, _int64(GROUP)))
            own = builder.add(firsts, builder.mul(start, _int64(4)))
            steps = [
                _emit_step(e, own, weights, start, size, last_window, (n // parts, n % parts, parts))
                for n in range(pairs * parts)
            ]

            def emit_row(row):
                line = builder.add(source, builder.mul(row, stride))
                sums = None
                for offsets, selected, high, lows in steps:
                    window = e.pair(*(e.load(_HALF, builder.add(line, offset)) for offset in offsets))
                    sums = e.weigh(sums, e.call("pshuf.b", _BYTES, window, selected), high, lows)
                return e.round(sums)

            def emit_two_rows(number):
                upper = builder.add(stripe, number)
                lower = builder.add(stripe, e.minimum(builder.add(number, _int64(1)), builder.sub(num_rows, _int64(1))))
                packed = builder.bitcast(e.pack(emit_row(upper), emit_row(lower)), ir.VectorType(_I64, 4))
                ordered = builder.bitcast(e.shuffle(packed, packed, [0, 2, 1, 3]), _BYTES)
                for row, half in zip((upper, lower), e.halves(ordered), strict=True):
                    e.store(half, builder.add(builder.add(out, builder.mul(row, size)), start))

            e.loop(num_rows, 2, emit_two_rows)

        def emit_stripe(stripe):
            num_rows = e.minimum(_int64(STRIPE_PX), builder.sub(height, stripe))
            e.loop(size, GROUP, lambda group: emit_group(stripe, num_rows, group))

        e.loop(height, STRIPE_PX, emit_stripe)

    cases = [*range(_PARTS + 1, _PARTS + MAX_PAIRS + 1), 2 * _PARTS + SPREAD_PAIRS]
    e.switch(builder.add(builder.mul(num_parts, _int64(_PARTS)), num_pairs), cases, emit_steps)


def _emit_step(e, firsts, weights, start, size, last_window, step):
    """Return the two windows of a step, the bytes to select, and the high and low parts of the weights."""
    pair, part, num_parts = step
    builder, kind = e.builder, ir.VectorType(_I32, GROUP)

    def number(value):
        return ir.Constant(kind, [value] * GROUP)

    windows, broadcast = [], []
    for half in range(2):
        begin = 8 * half + 8 // num_parts * part
        ends = [e.load(_I32, firsts, 4 * index) for index in (begin, begin + 8 // num_parts - 1)]
        window = builder.add(builder.sext(e.minimum(*ends), _I64), _int64(2 * pair))
        windows.append(e.maximum(e.minimum(window, last_window), _int64(0)))
        broadcast.append(e.splat(builder.trunc(windows[-1], _I32), _INTS))
    places = builder.add(e.load(kind, firsts), number(2 * pair))
    places = builder.sub(places, e.shuffle(*broadcast, range(GROUP)))
    places = e.minimum(e.maximum(places, number(0)), number(15))
    nexts = e.minimum(builder.add(places, number(1)), number(15))
    selected = builder.or_(places, builder.shl(nexts, number(8)))
    both = []
    for k in (2 * pair, 2 * pair + 1):
        at = builder.mul(builder.add(builder.mul(size, _int64(k)), start), _int64(4))
        active = [-(i % 8 // (8 // num_parts) == part) for i in range(GROUP)]
        both.append(builder.and_(e.load(kind, builder.add(weights, at)), ir.Constant(kind, active)))
    high, low = e.split_weights(*both)
    words = ir.VectorType(_I16, GROUP)
    selected, high = (builder.bitcast(builder.trunc(values, words), _BYTES) for values in (selected, high))
    return windows, selected, high, [builder.bitcast(e.shuffle(low, low, range(odd, 16, 2)), _WORDS) for odd in (0, 1)]


def _order_channel(channel: int) -> list[list[int]]:
    """Return the bytes that a channel has in each of three vectors with the 3 x 16 bytes of 16 pixels."""
    return [[i for i in range(16) if (16 * vector + i) % 3 == channel] for vector in range(3)]


def _merge(e: _Emitter, vectors: Sequence[ir.Value], chosen: Sequence[Sequence[int]]) -> ir.Value:
    """Take the bytes `chosen[i]` of each half from vector i."""
    merged = vectors[0]
    for vector, own in zip(vectors[1:], chosen[1:], strict=True):
        merged = e.shuffle(merged, vector, [i + 32 * (i % 16 in own) for i in range(32)])
    return merged


def _store_pixels(e: _Emitter, channels: Sequence[ir.Value], out: ir.Value) -> None:
    """Store 32 pixels. One shuffle a channel is enough: its bytes have other places in each of the three vectors."""
    orders = [_order_channel(channel) for channel in range(3)]
    shuffled = []
    for values, order in zip(channels, orders, strict=True):
        places = [place for own in order for place in own]
        sources = [places.index(i % 16) + 16 * (i // 16) for i in range(32)]
        shuffled.append(e.shuffle(values, values, sources))
    for vector in range(3):
        merged = _merge(e, shuffled, [order[vector] for order in orders])
        for half, values in enumerate(e.halves(merged)):
            e.store(values, out, 48 * half + 16 * vector)


@_function
def join_channels(e, red, green, blue, out, length):
    """Interleave three planes of `length` px into pixels."""
    builder = e.builder

    def emit_block(at):
        channels = [e.load(_BYTES, builder.add(plane, at)) for plane in (red, green, blue)]
        _store_pixels(e, channels, builder.add(out, builder.mul(at, _int64(3))))

    e.for_each_block(length, emit_block)


@_function
def split_channels(e, pixels, red, green, blue, length):
    """Separate `length` pixels into three planes."""
    builder = e.builder

    def emit_block(at):
        source = builder.add(pixels, builder.mul(at, _int64(3)))
        vectors = [
            e.pair(*(e.load(_HALF, source, 48 * half + 16 * vector) for half in range(2))) for vector in range(3)
        ]
        for channel, plane in enumerate((red, green, blue)):
            order = _order_channel(channel)
            merged = _merge(e, vectors, order)
            places = [place for own in order for place in own]
            values = e.shuffle(merged, merged, [place + 16 * half for half in range(2) for place in places])
            e.store(values, builder.add(plane, at))

    e.for_each_block(length, emit_block)


@_function
def convert_colour(e, y, cb, cr, out, length):
    """Convert `length` values of three planes to RGB, as `_convert_colour_into` of `resample` does.

    In 16 bits, ``(26345 * red + (1 << 15)) >> 16`` is ``(13172 * red + (1 << 14)) >> 15`` for every red, and the same
    holds for the half of -14942 and blue. Green needs the sum of two products in 32 bits.
    """
    builder = e.builder
    rounding = ir.Constant(_INTS, [1 << 15] * 8)
    sixteen = ir.Constant(_INTS, [16] * 8)

    def emit_green(blue, red):
        sums = []
        for order in (_LOWER_WORDS, _UPPER_WORDS):
            products = e.call("pmadd.wd", _INTS, e.shuffle(blue, red, order), e.constant(-22554, 65536 - 46802))
            sums.append(builder.ashr(builder.add(products, rounding), sixteen))
        return builder.sub(e.call("packssdw", _WORDS, *sums), red)

    def emit_block(at):
        halves = []
        lumas, blues, reds = (e.widen(e.load(_BYTES, builder.add(plane, at))) for plane in (y, cb, cr))
        for luma, blue, red in zip(lumas, blues, reds, strict=True):
            blue, red = builder.sub(blue, e.constant(128)), builder.sub(red, e.constant(128))
            more_red = builder.add(red, e.call("pmul.hr.sw", _WORDS, red, e.constant(13172)))
            more_blue = builder.add(blue, builder.add(blue, e.call("pmul.hr.sw", _WORDS, blue, e.constant(-7471))))
            halves.append([builder.add(luma, more) for more in (more_red, emit_green(blue, red), more_blue)])
        channels = [e.pack(*both) for both in zip(*halves, strict=True)]
        _store_pixels(e, channels, builder.add(out, builder.mul(at, _int64(3))))

    e.for_each_block(length, emit_block)
