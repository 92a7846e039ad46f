"""Unusual JPEGs for tests, written by a small, slow encoder: any sampling factors, depth, components, and lossless.

The encoder knows nothing of the project's own. Huffman tables are those of ITU-T T.81, annex K.3, or flat.
"""

from dataclasses import dataclass, replace

import numpy as np

ZIGZAG = sorted(np.ndindex(8, 8), key=lambda at: (sum(at), at[1 - sum(at) % 2]))
_DCT = np.array(
    [[(0.125 if k == 0 else 0.25) ** 0.5 * np.cos((2 * x + 1) * k * np.pi / 16) for x in range(8)] for k in range(8)]
)


@dataclass(frozen=True)
class Kind:
    """How to encode: sampling factors (h, v) of each component, bits a sample, restart interval in MCUs, and more.

    `adobe` is the transform in an Adobe marker: 0 for RGB or CMYK, 1 for YCbCr, 2 for YCCK; None for no marker.
    """

    factors: tuple[tuple[int, int], ...] = ((1, 1),)
    precision: int = 8
    restart: int = 0
    wide_tables: bool = False
    adobe: int | None = None


def segment(marker, content):
    return bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2, "big") + bytes(content)


class Bits:
    def __init__(self):
        self.bits = []

    def add(self, value, count):
        self.bits.extend(value >> (count - 1 - i) & 1 for i in range(count))

    def take(self):
        """Return the bytes so far, with stuffing."""
        self.bits.extend([1] * (-len(self.bits) % 8))
        content = np.packbits(np.array(self.bits, np.uint8)).tobytes()
        self.bits = []
        return content.replace(b"\xff", b"\xff\0")


def magnitude(value):
    """Return the number of bits of a value, and these bits as JPEG has them."""
    size = int(abs(value)).bit_length()
    return size, int(value) if value >= 0 else int(value) + (1 << size) - 1


# Every symbol has a code of the same length, and the code of all ones stays free.
DC_SYMBOLS, LOSSLESS_SYMBOLS = list(range(16)), list(range(17))
AC_SYMBOLS = [run << 4 | size for run in range(16) for size in range(16)][:255]


def flat_table(symbols):
    """Return a table for DHT, and the code of each symbol as (value, number of bits)."""
    length = len(symbols).bit_length()
    counts = [0] * 16
    counts[length - 1] = len(symbols)
    return bytes(counts) + bytes(symbols), {symbol: (code, length) for code, symbol in enumerate(symbols)}


def encode(planes, kind):
    """Encode planes, each (H, W) at full size, which are reduced to their sampling factors by averaging."""
    height, width = planes[0].shape
    # A scan of one component has a block in each MCU, whatever its factors are.
    named, kind = kind, replace(kind, factors=((1, 1),)) if len(planes) == 1 else kind
    most_h, most_v = (max(factors[i] for factors in kind.factors) for i in range(2))
    mcus = -(-height // (8 * most_v)), -(-width // (8 * most_h))
    (dc_table, dc_codes), (ac_table, ac_codes) = flat_table(DC_SYMBOLS), flat_table(AC_SYMBOLS)
    quantisation = 16 if kind.precision == 12 else 3
    blocks = []
    for plane, (h, v) in zip(planes, kind.factors, strict=True):
        size = mcus[0] * 8 * most_v, mcus[1] * 8 * most_h
        padded = np.pad(plane.astype(float), ((0, size[0] - height), (0, size[1] - width)), "edge")
        # Factors such as 2 of 3 do not divide, so a sample takes the nearest pixel.
        rows, columns = (np.arange(n * 8 * f) * m // f for n, f, m in zip(mcus, (v, h), (most_v, most_h), strict=True))
        small = padded[rows][:, columns]
        if most_v % v == 0 and most_h % h == 0:
            small = padded.reshape(len(rows), most_v // v, len(columns), most_h // h).mean(axis=(1, 3))
        small = small.reshape(len(rows) // 8, 8, -1, 8).swapaxes(1, 2) - (1 << kind.precision - 1)
        blocks.append(np.rint(_DCT @ small @ _DCT.T / quantisation).astype(int))
    scan, bits = [], Bits()
    previous = [0] * len(planes)
    for number, (row, column) in enumerate(np.ndindex(mcus)):
        if kind.restart and number and number % kind.restart == 0:
            scan += [bits.take(), bytes([0xFF, 0xD0 + (number // kind.restart - 1) % 8])]
            previous = [0] * len(planes)
        for component, (h, v) in enumerate(kind.factors):
            for y, x in np.ndindex(v, h):
                block = blocks[component][row * v + y, column * h + x]
                previous[component] = encode_block(bits, block, previous[component], dc_codes, ac_codes)
    scan.append(bits.take())
    bits16 = kind.wide_tables or quantisation > 255
    table = b"".join(quantisation.to_bytes(1 + bits16, "big") for _ in range(64))
    parts = [b"\xff\xd8"]
    if kind.adobe is not None:
        parts.append(segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([kind.adobe])))
    parts.append(segment(0xDB, bytes([bits16 << 4]) + table))
    parts += [frame(0xC1 if kind.precision == 12 or bits16 else 0xC0, (height, width), named)]
    parts += [segment(0xC4, b"\0" + dc_table), segment(0xC4, b"\x10" + ac_table)]
    if kind.restart:
        parts.append(segment(0xDD, kind.restart.to_bytes(2, "big")))
    components = b"".join(bytes([i + 1, 0]) for i in range(len(planes)))
    parts.append(segment(0xDA, bytes([len(planes)]) + components + b"\0\x3f\0"))
    return np.frombuffer(b"".join([*parts, *scan, b"\xff\xd9"]), np.uint8)


def frame(marker, size, kind):
    components = b"".join(bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(kind.factors))
    numbers = size[0].to_bytes(2, "big") + size[1].to_bytes(2, "big") + bytes([len(kind.factors)])
    return segment(marker, bytes([kind.precision]) + numbers + components)


def encode_block(bits, block, previous, dc_codes, ac_codes):
    values = [int(block[at]) for at in ZIGZAG]
    size, extra = magnitude(values[0] - previous)
    bits.add(*dc_codes[size])
    bits.add(extra, size)
    run = 0
    last = max((i for i in range(64) if values[i]), default=0)
    for value in values[1 : last + 1]:
        if not value:
            run += 1
            continue
        while run > 15:
            bits.add(*ac_codes[0xF0])
            run -= 16
        size, extra = magnitude(value)
        bits.add(*ac_codes[run << 4 | size])
        bits.add(extra, size)
        run = 0
    if last < 63:
        bits.add(*ac_codes[0])
    return values[0]


def encode_lossless(planes, precision=8):
    """Encode planes (H, W) without loss, each sample predicted by its left neighbour."""
    height, width = planes[0].shape
    kind = Kind(((1, 1),) * len(planes), precision)
    table, codes = flat_table(LOSSLESS_SYMBOLS)
    bits = Bits()
    samples = np.stack(planes, axis=2).astype(int)
    for y, x, component in np.ndindex(samples.shape):
        if x:
            predicted = samples[y, x - 1, component]
        else:
            predicted = samples[y - 1, 0, component] if y else 1 << precision - 1
        size, extra = magnitude(samples[y, x, component] - predicted)
        bits.add(*codes[size])
        bits.add(extra, size)
    components = b"".join(bytes([i + 1, 0]) for i in range(len(planes)))
    head = b"\xff\xd8" + frame(0xC3, (height, width), kind) + segment(0xC4, b"\0" + table)
    scan = segment(0xDA, bytes([len(planes)]) + components + b"\1\0\0")
    return np.frombuffer(head + scan + bits.take() + b"\xff\xd9", np.uint8)
