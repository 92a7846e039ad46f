"""Orders as functions: what holds for every seed, epoch, number of ranks and data set."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from ffcv_ops.beton.allocations import AllocationTable
from ffcv_ops.loading.epoch_length import batches_per_rank, samples_per_rank
from ffcv_ops.loading.order import (
    QuasiRandom,
    Random,
    Repeated,
    Sequential,
    quasi_random_order,
    random_order,
    repeated_order,
    sample_pages,
    sequential_order,
)

topologies = st.tuples(
    st.integers(0, 400),  # samples
    st.integers(1, 9),  # ranks
    st.integers(0, 2**63 - 1),  # seed
    st.integers(0, 700),  # epoch
    st.integers(1, 40),  # samples a page
)
bounded = settings(max_examples=120, deadline=None, derandomize=True)


def ranks_of(kind, topology, drop_last):
    """Return what every rank of a topology sees, over ids that are not 0, 1, 2, ..."""
    num_samples, world_size, seed, epoch, per_page = topology
    ids = np.random.default_rng(0).permutation(np.arange(7, 7 + 3 * num_samples, 3))
    pages = np.sort(ids) // per_page
    arguments = {"world_size": world_size, "drop_last": drop_last}
    chance = {"seed": seed, "epoch": epoch}
    orders = {
        "sequential": lambda rank: sequential_order(ids, rank=rank, **arguments),
        "random": lambda rank: random_order(ids, rank=rank, **chance, **arguments),
        "quasi_random": lambda rank: quasi_random_order(ids, pages, rank=rank, buffer_pages=3, **chance, **arguments),
    }
    return ids, [orders[kind](rank) for rank in range(world_size)]


KINDS = ["sequential", "random", "quasi_random"]


@pytest.mark.parametrize("kind", KINDS)
@bounded
@given(topology=topologies)
def test_training_ranks_are_disjoint_equal_and_leave_out_less_than_a_sample_each(kind, topology):
    ids, ranks = ranks_of(kind, topology, drop_last=True)
    assert len({len(rank) for rank in ranks}) == 1
    together = np.concatenate(ranks)
    assert len(np.unique(together)) == len(together) > len(ids) - len(ranks)
    assert np.isin(together, ids).all()


@pytest.mark.parametrize("kind", KINDS)
@bounded
@given(topology=topologies)
def test_validation_ranks_see_each_sample_once(kind, topology):
    ids, ranks = ranks_of(kind, topology, drop_last=False)
    np.testing.assert_array_equal(np.sort(np.concatenate(ranks)), np.sort(ids))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("kind", KINDS)
@bounded
@given(topology=topologies)
def test_orders_are_functions(kind, topology):
    for first, again in zip(ranks_of(kind, topology, True)[1], ranks_of(kind, topology, True)[1], strict=True):
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("kind", ["random", "quasi_random"])
def test_epochs_and_seeds_differ_and_do_not_shift_into_each_other(kind):
    drawn = {}
    for seed in range(6):
        for epoch in range(6):
            order = ranks_of(kind, (100, 1, seed, epoch, 9), True)[1][0]
            drawn[order.tobytes()] = seed, epoch
    assert len(drawn) == 36


def test_a_global_batch_is_the_same_set_for_any_number_of_ranks():
    ids = np.arange(240)
    alone = random_order(ids, seed=1, epoch=2)
    for world_size in (2, 3, 4):
        ranks = [random_order(ids, seed=1, epoch=2, rank=r, world_size=world_size) for r in range(world_size)]
        size = 24 // world_size
        for step in range(10):
            together = np.concatenate([rank[step * size : (step + 1) * size] for rank in ranks])
            assert set(together) == set(alone[step * 24 : (step + 1) * 24])


@bounded
@given(
    num_pages=st.integers(1, 60), per_page=st.integers(1, 20), buffer_pages=st.integers(1, 8),
    world_size=st.integers(1, 4), epoch=st.integers(0, 50),
)  # fmt: skip
def test_quasi_random_keeps_few_pages_in_use(num_pages, per_page, buffer_pages, world_size, epoch):
    ids = np.arange(num_pages * per_page)
    pages = ids // per_page
    owners = np.zeros(num_pages, int)
    for rank in range(world_size):
        order = quasi_random_order(
            ids,
            pages,
            seed=3,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            drop_last=False,
            buffer_pages=buffer_pages,
        )
        in_order = pages[order]
        used = np.unique(in_order)
        owners[used] += 1
        first = np.array([np.argmax(in_order == page) for page in used])
        last = np.array([len(order) - 1 - np.argmax(in_order[::-1] == page) for page in used])
        places = np.arange(len(order))
        in_use = ((first[:, None] <= places) & (places <= last[:, None])).sum(0)
        assert in_use.max(initial=0) <= buffer_pages + 1
    # Only pages on the borders between ranks are read by two (or more, where pages are larger than a rank's share).
    assert owners.min() >= 1 and (owners - 1).sum() <= world_size - 1


def test_quasi_random_mixes_and_deals_pages_anew():
    ids = np.arange(6400)
    pages = ids // 100
    first, second = (
        quasi_random_order(ids, pages, seed=0, epoch=e, rank=0, world_size=2, buffer_pages=16) for e in (0, 1)
    )
    batch_pages = [len(np.unique(pages[first[i : i + 64]])) for i in range(640, 2560, 64)]
    assert min(batch_pages) >= 8
    shared = len(np.intersect1d(pages[first], pages[second])) / 64
    assert 0.1 < shared < 0.45  # a quarter by chance


def test_quasi_random_needs_a_buffer():
    with pytest.raises(ValueError, match="buffer_pages is 0"):
        quasi_random_order(np.arange(4), np.zeros(4, int), seed=0, epoch=0, buffer_pages=0)


@bounded
@given(
    num_samples=st.integers(1, 1200), world_size=st.integers(1, 9), repeats=st.integers(1, 5), epoch=st.integers(0, 9)
)
def test_repeated_augmentation_selects_as_timm_does(num_samples, world_size, repeats, epoch):
    for rank in range(world_size):
        sampler = RepeatAugSampler(range(num_samples), world_size, rank, shuffle=False, num_repeats=repeats)
        ids, copies = repeated_order(
            np.arange(num_samples),
            repeats=repeats,
            seed=1,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            shuffle=False,
        )
        assert ids.tolist() == list(sampler)
        assert copies.min() >= 0 and copies.max() < repeats


def settings_of_a_loader(num_samples, rank, world_size, drop_last, repeats):
    """Return what an order reads of a loader."""
    ids = np.arange(num_samples)
    allocations = AllocationTable(100 * ids.astype(np.uint64), np.zeros(num_samples, np.uint32), ids.astype(np.uint32))
    return SimpleNamespace(
        indices=ids, seed=1, distributed=True, rank=rank, world_size=world_size,
        drop_last=drop_last, repeats=repeats,
        beton=SimpleNamespace(allocations=allocations, num_samples=num_samples, page_size=1000),
    )  # fmt: skip


@bounded
@given(
    num_samples=st.integers(0, 1200), world_size=st.integers(1, 9), repeats=st.integers(1, 5),
    drop_last=st.booleans(), batch_size=st.integers(1, 40),
)  # fmt: skip
def test_the_length_of_an_epoch_is_arithmetic(num_samples, world_size, repeats, drop_last, batch_size):
    for rank in range(world_size):
        loader = settings_of_a_loader(num_samples, rank, world_size, drop_last, repeats)
        expected = samples_per_rank(num_samples, world_size, rank=rank, drop_last=drop_last, repeats=repeats)
        orders = [Sequential(loader), Random(loader)] if repeats == 1 else [Repeated(loader, True)]
        for order in orders:
            ids = order.sample_order(3)
            assert len(ids) == order.num_samples() == expected
        quasi_random = QuasiRandom(loader)
        assert len(quasi_random.sample_order(3)) == quasi_random.num_samples()
        batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
        num_full = sum(len(batch) == batch_size for batch in batches)
        assert batches_per_rank(expected, batch_size, drop_last=False) == len(batches)
        assert batches_per_rank(expected, batch_size) == num_full


def test_few_images_repeated_on_many_ranks_make_two_batches():
    assert batches_per_rank(samples_per_rank(255, 8, repeats=3), 16) == 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_copies_are_numbered_and_on_different_ranks(world_size):
    ranks = [
        repeated_order(np.arange(5000), repeats=3, seed=1, epoch=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    pairs = np.concatenate([np.stack(rank, 1) for rank in ranks])
    assert len(np.unique(pairs, axis=0)) == len(pairs) == 4864 // world_size * world_size
    _, counts = np.unique(pairs[:, 0], return_counts=True)
    assert (counts == 3).mean() > 0.99
    if world_size >= 3:
        assert all(len(np.unique(ids)) == len(ids) for ids, _ in ranks)


def test_sample_pages_is_the_page_of_the_lowest_pointer():
    ptrs, ids = np.array([900, 350, 250, 100, 120], np.uint64), np.array([2, 0, 2, 3, 0], np.uint32)
    table = AllocationTable(ptrs, np.zeros(5, np.uint32), ids).in_order()
    np.testing.assert_array_equal(sample_pages(table, 5, 100), [1, 0, 2, 1, 0])


def test_imagenet_s_orders_take_less_than_a_second():
    ids = np.arange(1_281_167)
    pages = ids // 150
    for order in (
        lambda: random_order(ids, seed=0, epoch=0, world_size=8),
        lambda: repeated_order(ids, repeats=3, seed=0, epoch=0),
        lambda: quasi_random_order(ids, pages, seed=0, epoch=0, world_size=1),
    ):
        times = []
        for _ in range(3):
            started = time.process_time()
            order()
            times.append(time.process_time() - started)
        assert min(times) < 1


def test_torch_s_sampler_would_repeat_what_ours_does_not():
    sampled = [
        i
        for rank in range(4)
        for i in torch.utils.data.DistributedSampler(range(93), num_replicas=4, rank=rank, shuffle=False)
    ]
    ours = np.concatenate([sequential_order(np.arange(93), rank=r, world_size=4, drop_last=False) for r in range(4)])
    assert len(sampled) == 96 and sorted(ours) == list(range(93))
