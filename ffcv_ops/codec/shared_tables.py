"""Choose a few sets of Huffman tables for all JPEGs of a file.

A decoder of crops prepares the tables of an image before it decodes. If many images have the same tables, it prepares
them once. One set for all images costs about 2 % of the size against tables for each image, and four sets cost half of
it. The sets are found by k-means: the distance of an image from a set is its size in bits.

The choice uses integers only, but for the order of the images at the start. So it is the same on every machine.
"""

from collections.abc import Sequence

import numpy as np

NUM_SETS = 4
_MAX_ROUNDS = 20
# Every symbol that an image may have gets a code. One that was counted has far more weight.
_WEIGHT = 64
_MOST_DC_BITS, _MOST_AC_BITS = 11, 10
_END_OF_BLOCK, _ZERO_RUN = 0x00, 0xF0
# The largest magnitude before quantisation, in eighths.
_LARGEST = 1 << 13


def _find_possible(quality: int) -> np.ndarray:
    """Return 1 for every symbol that an image of this quality may have, else 0: int64 (4, 256).

    A coefficient with large steps of quantisation is small. A run of zeros is followed by no coefficient before it.
    """
    from ffcv_ops.codec import encoder

    possible = np.zeros((4, 256), np.int64)
    possible[:2, : _MOST_DC_BITS + 1] = possible[2:, [_END_OF_BLOCK, _ZERO_RUN]] = 1
    for table, steps in enumerate(encoder.build_quantisation(quality)[0].astype(int)):
        for run in range(16):
            smallest_step = int(steps[run + 1 :].min())
            most_bits = ((_LARGEST + 4 * smallest_step) // (8 * smallest_step)).bit_length()
            possible[2 + table, run << 4 | 1 : (run << 4 | min(most_bits, _MOST_AC_BITS)) + 1] = 1
    return possible


def count_symbols(image: np.ndarray, quality: int) -> np.ndarray:
    """Count the symbols of an image, for `choose_tables`.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB.
    quality : int
        1 to 100.

    Returns
    -------
    ndarray of int64, shape (4, 256)
        The counts by table and symbol, at the restart interval of an image with much data.
    """
    from ffcv_ops.codec import encoder, jpeg

    dc, _, _, ac_counts = encoder.tokenise(np.ascontiguousarray(image), encoder.build_quantisation(int(quality))[1])
    interval = jpeg.restart_interval(-(-image.shape[1] // jpeg.MCU_PX), jpeg.SEGMENT_MCUS)
    return encoder.count_symbols(dc, interval, ac_counts)


def choose_tables(counts: Sequence[np.ndarray], quality: int) -> np.ndarray | None:
    """Choose up to `NUM_SETS` sets of tables.

    Parameters
    ----------
    counts : sequence of ndarray
        Results of `count_symbols`, one for each image of a sample.
    quality : int
        1 to 100.

    Returns
    -------
    ndarray of uint8, shape (num_sets, 4, 272), or None
        The sets for `jpeg.encode`. In each set, every symbol that an image of this quality may have has a code.
        None if there are no counts.
    """
    if not counts:
        return None
    stacked, possible = np.stack(counts), _find_possible(quality)
    # Begin with groups of images that have about as many symbols a block.
    density = stacked[:, 2].sum(axis=1) / stacked[:, 0].sum(axis=1)
    groups = np.empty(len(stacked), np.int64)
    for number, members in enumerate(np.array_split(np.argsort(density, kind="stable"), NUM_SETS)):
        groups[members] = number
    tables = np.stack([_build_tables(stacked[groups == number], possible) for number in range(NUM_SETS)])
    for _ in range(_MAX_ROUNDS):
        nearest = _measure_bits(stacked, tables).argmin(axis=1)
        if np.array_equal(nearest, groups):
            break
        groups = nearest
        for number in np.unique(groups):
            tables[number] = _build_tables(stacked[groups == number], possible)
    return tables[np.unique(groups)]


def _build_tables(counts: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Build the tables for images that are counted together, (num_images, 4, 256)."""
    from ffcv_ops.codec import encoder

    return encoder.build_tables(_WEIGHT * counts.sum(axis=0) + possible)


def _measure_bits(counts: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return the bits of all codes of each image with each set, int64 (num_images, num_sets)."""
    lengths = np.zeros((len(tables), 4, 256), np.int64)
    for number, table in np.ndindex(len(tables), 4):
        own = np.repeat(np.arange(1, 17), tables[number, table, :16])
        lengths[number, table, tables[number, table, 16 : 16 + own.size]] = own
    return counts.reshape(len(counts), -1) @ lengths.reshape(len(tables), -1).T
