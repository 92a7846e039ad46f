import numpy as np
import pytest
from scipy import stats

from ffcv_ops import rng


def interpreted(function):
    """What Numba compiled, or the function itself where Numba is told not to compile."""
    return getattr(function, "py_func", function)


# kat_vectors of Random123: counter, key, result of philox4x32 with 10 rounds
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in rng.philox(*counter, *key)) == expected
    assert tuple(int(word) for word in interpreted(rng.philox)(*counter, *key)) == expected


def test_uniform_takes_the_words_of_its_counter():
    seed, epoch, sample_id, copy, stream = 0x123456789ABCDEF0, 7, 1_281_166, 2, rng.RAND_AUGMENT
    words = [rng.philox(sample_id, epoch, stream | copy << 16, block, 0x9ABCDEF0, 0x12345678) for block in range(3)]
    expected = [int(word) / 2**32 for block in words for word in block]
    drawn = [rng.uniform(seed, epoch, sample_id, copy, stream, index) for index in range(12)]
    assert drawn == expected
    assert drawn == [interpreted(rng.uniform)(seed, epoch, sample_id, copy, stream, index) for index in range(12)]


def test_uniform_is_uniform_and_its_arguments_are_independent():
    draws = np.array(
        [
            [rng.uniform(seed, epoch, sample_id, copy, stream, index) for sample_id in range(4000)]
            for seed, epoch, copy, stream, index in [
                (0, 0, 0, rng.CROP, 0),
                (1, 0, 0, rng.CROP, 0),
                (1 << 40, 0, 0, rng.CROP, 0),
                (0, 1, 0, rng.CROP, 0),
                (0, 0, 1, rng.CROP, 0),
                (0, 0, 0, rng.FLIP, 0),
                (0, 0, 0, rng.CROP, 1),
                (0, 0, 0, rng.CROP, 4),
            ]
        ]
    )
    assert all(stats.kstest(row, "uniform").pvalue > 1e-4 for row in draws)
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / np.sqrt(draws.shape[1])


def test_batch_id_depends_on_ids_and_their_order():
    ids = np.arange(256)
    assert rng.batch_id(ids) == rng.batch_id(ids.astype(np.uint64))
    assert 0 <= rng.batch_id(ids) < 2**32
    others = [ids[::-1], ids[:-1], ids + 1, np.roll(ids, 1), np.empty(0)]
    assert len({rng.batch_id(ids), *(rng.batch_id(other) for other in others)}) == 6


def test_generator_is_a_function_of_its_arguments():
    def draw(*arguments):
        return rng.generator(*arguments).permutation(50).tolist()

    assert draw(3, 1, rng.ORDER) == draw(3, 1, rng.ORDER, 0)
    variants = [(3, 1, rng.ORDER), (4, 1, rng.ORDER), (3, 2, rng.ORDER), (3, 1, rng.REPLACEMENT), (3, 1, rng.ORDER, 1)]
    assert len({tuple(draw(*variant)) for variant in variants}) == len(variants)


def test_uniforms_of_several_samples_are_those_of_each():
    ids, copies = np.array([5, 3, 2**31]), np.array([0, 7, 1])
    drawn = rng.draw_uniforms(11, 2, ids, copies, rng.ERASING, (2, 3))
    assert drawn.shape == (3, 2, 3)
    for i in range(3):
        expected = [rng.uniform(11, 2, ids[i], copies[i], rng.ERASING, index) for index in range(6)]
        assert drawn[i].ravel().tolist() == expected
    assert rng.draw_uniforms(11, 2, ids, copies, rng.ERASING, ()).tolist() == drawn[:, 0, 0].tolist()


def test_a_named_stream_is_none_of_the_constants():
    constants = {value for name, value in vars(rng).items() if name[0] != "_" and name.isupper()}
    assert len(constants) == 7 and max(constants) < 0x8000
    streams = [rng.named_stream(f"Operation{number}") for number in range(100)]
    assert all(0x8000 <= stream < 0x10000 for stream in streams) and len(set(streams)) >= 99
    assert rng.named_stream("GaussianBlur") == rng.named_stream("GaussianBlur")
