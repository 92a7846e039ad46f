"""Randomness as a function: (seed, epoch, sample id, stream) -> numbers.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A draw is the
block cipher of a counter that says what is drawn, under a key that is the seed; nothing is advanced, stored or shared,
so any worker may draw for any sample, in any order, before or after a resume.

The counter's words are: sample id, epoch, ``stream | copy << 16``, number of the block of draws.
"""

import numpy as np

from ffcv_ops._kernels import kernel

CROP = 0
FLIP = 1
MIX = 2
RAND_AUGMENT = 3
ERASING = 4
ORDER = 5
REPLACEMENT = 6

_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_SHIFT = np.uint64(32)


@kernel
def _word(value):
    return np.uint64(value & 0xFFFFFFFF)


@kernel
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of one counter.

    Parameters
    ----------
    c0, c1, c2, c3 : int
        The counter's words, taken modulo 2**32.
    k0, k1 : int
        The key's words, taken modulo 2**32.

    Returns
    -------
    tuple of four uint32
    """
    c0, c1, c2, c3 = _word(c0), _word(c1), _word(c2), _word(c3)
    k0, k1 = _word(k0), _word(k1)
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0 = (product_1 >> _SHIFT) ^ c1 ^ k0
        c2 = (product_0 >> _SHIFT) ^ c3 ^ k1
        c1 = product_1 & _WORD
        c3 = product_0 & _WORD
        k0 = (k0 + _WEYL_0) & _WORD
        k1 = (k1 + _WEYL_1) & _WORD
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


@kernel
def uniform(seed, epoch, sample_id, copy, stream, index):
    """The `index`-th number of a stream, uniform on [0, 1) in steps of 2**-32.

    Parameters
    ----------
    seed : int
        64 bits; the key.
    epoch, sample_id : int
        Taken modulo 2**32.
    copy : int
        Which copy of the sample, below 65536; 0 without repeated augmentation.
    stream : int
        One of this module's constants, below 65536.
    index : int
        From 0.

    Returns
    -------
    float64
    """
    words = philox(sample_id, epoch, stream | copy << 16, index >> 2, seed, seed >> 32)
    return words[index & 3] * 2.0**-32


@kernel
def _batch_id(sample_ids):
    state = np.int64(0)
    for position in range(len(sample_ids)):
        state = np.int64(philox(sample_ids[position], position, 0, 0, state, 0)[0])
    return state


def batch_id(sample_ids: np.ndarray) -> int:
    """A 32-bit hash of a batch's sample ids, in their order: the sample id of draws that concern the whole batch.

    Parameters
    ----------
    sample_ids : ndarray of int, shape (N,)

    Returns
    -------
    int
        0 to 2**32 - 1.
    """
    return int(_batch_id(np.ascontiguousarray(sample_ids, dtype=np.int64)))


def generator(seed: int, epoch: int, stream: int, sample_id: int = 0) -> np.random.Generator:
    """A NumPy generator for draws over a whole data set, such as permutations.

    Parameters
    ----------
    seed, epoch, stream, sample_id : int
        As for `uniform`.

    Returns
    -------
    numpy.random.Generator
        On NumPy's Philox4x64, keyed with the seed and started at the counter (0, sample id, epoch, stream).
    """
    counter = [0, sample_id, epoch, stream]
    return np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, 0], counter=counter))
