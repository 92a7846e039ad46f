"""Randomness as a function: (seed, epoch, sample id, stream) -> numbers.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
A draw encrypts a counter with the seed as the key. The counter says what is drawn. No state is advanced, stored or
shared. Therefore any worker may draw for any sample, in any order, before or after a resume.

The words of the counter are the sample id, the epoch, ``stream | copy << 16``, and the number of the block of draws.
"""

import math
import zlib

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
def _to_word(value):
    return np.uint64(value & 0xFFFFFFFF)


@kernel
def philox(c0, c1, c2, c3, k0, k1):
    """Compute Philox4x32-10 of one counter.

    Parameters
    ----------
    c0, c1, c2, c3 : int
        Words of the counter, modulo 2**32.
    k0, k1 : int
        Words of the key, modulo 2**32.

    Returns
    -------
    tuple of four uint32
    """
    c0, c1, c2, c3 = _to_word(c0), _to_word(c1), _to_word(c2), _to_word(c3)
    k0, k1 = _to_word(k0), _to_word(k1)
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
    """Return the number at `index` of a stream, uniform on [0, 1) in steps of 2**-32.

    Parameters
    ----------
    seed : int
        The key, 64 bits.
    epoch, sample_id : int
        Modulo 2**32.
    copy : int
        Number of the sample's copy, below 65536; 0 without repeated augmentation.
    stream : int
        A constant of this module or a `named_stream`, below 65536.
    index : int
        From 0.

    Returns
    -------
    float64
    """
    words = philox(sample_id, epoch, stream | copy << 16, index >> 2, seed, seed >> 32)
    return words[index & 3] * 2.0**-32


def named_stream(name: str) -> int:
    """Return the stream of an operation that has no constant in this module: 32768 to 65535, a hash of its name."""
    return 0x8000 | zlib.crc32(name.encode()) & 0x7FFF


@kernel
def _draw_uniforms_into(seed, epoch, sample_ids, copies, stream, numbers):
    for i in range(len(sample_ids)):
        for index in range(numbers.shape[1]):
            numbers[i, index] = uniform(seed, epoch, sample_ids[i], copies[i], stream, index)


def draw_uniforms(
    seed: int, epoch: int, sample_ids: np.ndarray, copies: np.ndarray, stream: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the first numbers of a stream for several samples.

    Parameters
    ----------
    seed, epoch, stream : int
        See `uniform`.
    sample_ids, copies : ndarray of int64, shape (N,)
        See `uniform`.
    shape : tuple of int
        Shape of the numbers of one sample.

    Returns
    -------
    ndarray of float64, shape (N, *shape)
        Uniform on [0, 1).
    """
    numbers = np.empty((len(sample_ids), math.prod(shape)))
    _draw_uniforms_into(seed, epoch, sample_ids, copies, stream, numbers)
    return numbers.reshape(-1, *shape)


@kernel
def _hash_batch(sample_ids):
    state = np.int64(0)
    for position in range(len(sample_ids)):
        state = np.int64(philox(sample_ids[position], position, 0, 0, state, 0)[0])
    return state


def batch_id(sample_ids: np.ndarray) -> int:
    """Return a 32-bit hash of a batch's sample ids, in their order. Draws for a whole batch use it as their sample id.

    Parameters
    ----------
    sample_ids : ndarray of int, shape (N,)
        Ids of the samples.

    Returns
    -------
    int
        0 to 2**32 - 1.
    """
    return int(_hash_batch(np.ascontiguousarray(sample_ids, dtype=np.int64)))


def generator(seed: int, epoch: int, stream: int, sample_id: int = 0) -> np.random.Generator:
    """Return a generator of NumPy, for draws over a whole data set, such as permutations.

    Parameters
    ----------
    seed, epoch, stream, sample_id : int
        See `uniform`.

    Returns
    -------
    numpy.random.Generator
        A Philox4x64 of NumPy. Its key is the seed, and its counter begins at (0, sample id, epoch, stream).
    """
    counter = [0, sample_id, epoch, stream]
    return np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, 0], counter=counter))
