"""The order of samples as pure functions, and the loader's orders, which are FFCV's TraversalOrder over them.

Every function returns the samples of one rank in one epoch. With ``drop_last`` (training) all ranks get equally many
samples, and fewer than ``world_size`` samples are left out. Without it (validation) the ranks' samples are disjoint,
and together they are the whole set, each once, for any number of ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops import rng
from ffcv_ops._ffcv import OrderOption, TraversalOrder
from ffcv_ops.beton.allocations import AllocationTable
from ffcv_ops.errors import UserError
from ffcv_ops.loading.epoch_length import repeated_samples_per_rank, samples_per_rank
from ffcv_ops.operations.base import SampleError

if TYPE_CHECKING:
    from ffcv_ops.loading.loader import Loader

_MAX_DRAWS = 1000


def _dealt(ids: np.ndarray, rank: int, world_size: int, drop_last: bool) -> np.ndarray:
    """Deal samples to ranks like cards, so that a global batch is the same set for any number of ranks.

    The result is a copy, so that it does not keep the samples of all ranks in memory.
    """
    end = len(ids) // world_size * world_size if drop_last else len(ids)
    return ids[rank:end:world_size].copy()


def sequential_order(ids: np.ndarray, *, rank: int = 0, world_size: int = 1, drop_last: bool = True) -> np.ndarray:
    """Keep the given order. Rank r of W gets the samples at r, r + W, r + 2 W, ...

    Parameters
    ----------
    ids : ndarray int (N,)
        Sample ids in the file.
    rank, world_size : int
    drop_last : bool
        Leave out the last N mod W samples, so that all ranks get equally many.

    Returns
    -------
    ndarray, of the dtype of `ids`
    """
    return _dealt(ids, rank, world_size, drop_last)


def random_order(
    ids: np.ndarray, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
) -> np.ndarray:
    """Permute all samples and deal them to the ranks.

    Parameters
    ----------
    seed, epoch : int
        The permutation is a function of these two numbers. So all ranks draw the same permutation.

    The other parameters and the return value are as for `sequential_order`.
    """
    permuted = rng.generator(seed, epoch, rng.ORDER).permutation(ids)
    return _dealt(permuted, rank, world_size, drop_last)


def quasi_random_order(
    ids: np.ndarray,
    pages: np.ndarray,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    buffer_pages: int = 64,
) -> np.ndarray:
    """Permute the pages of the file, deal them to the ranks, and mix the samples of neighbouring pages.

    A rank has at most `buffer_pages` + 1 pages in use at any time, and reads each page once. Every rank gets the same
    number of samples, so two neighbouring ranks may share a page, which both of them read.

    Parameters
    ----------
    ids : ndarray int (N,)
        Sample ids in the file.
    pages : ndarray int (N,)
        The page of each sample; see `sample_pages`.
    buffer_pages : int
        The number of pages that are mixed, at least 1. The stock loader mixes 2 x batch_size pages.

    The other parameters and the return value are as for `random_order`.

    Raises
    ------
    UserError
        If `buffer_pages` is below 1.
    """
    if buffer_pages < 1:
        raise UserError(f"buffer_pages is {buffer_pages}; it must be at least 1")
    generator = rng.generator(seed, epoch, rng.ORDER)
    page_numbers, page_index = np.unique(pages, return_inverse=True)
    # NumPy sorts integers of 16 bits and fewer in linear time.
    position_of_page = generator.permutation(len(page_numbers)).astype(np.min_scalar_type(len(page_numbers)))
    # The samples are permuted first. So chance decides which samples of a shared page go to which rank.
    shuffled = generator.permutation(len(ids))
    positions = position_of_page[page_index[shuffled]]
    by_page = np.argsort(positions, kind="stable")
    start, end = _share(len(ids), rank, world_size, drop_last)
    mine = by_page[start:end]
    # The page at position p sends its samples to places between p and p + buffer_pages.
    jitter = generator.random(len(ids))[start:end]
    mixed = np.argsort(positions[mine] + buffer_pages * jitter, kind="stable")
    return ids[shuffled[mine[mixed]]]


def _share(num_samples: int, rank: int, world_size: int, drop_last: bool) -> tuple[int, int]:
    """Return where the part of a rank begins and ends when the samples are divided into consecutive parts."""
    if drop_last:
        size = num_samples // world_size
        return rank * size, (rank + 1) * size
    return num_samples * rank // world_size, num_samples * (rank + 1) // world_size


def repeated_order(
    ids: np.ndarray,
    *,
    repeats: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Repeat each sample, with its copies on neighbouring ranks, in an epoch that is as long as without repeats.

    This is repeated augmentation (Hoffer et al. 2020; Berman et al. 2019, MultiGrain) with the selection of timm's
    ``RepeatAugSampler``. Of the N x repeats samples, a rank sees (N rounded down to a multiple of 256) / W. Below 256
    samples, N is not rounded.

    Parameters
    ----------
    repeats : int
        The number of copies of a sample.
    shuffle : bool
        If True, permute the samples. If False, keep the given order.

    The other parameters are as for `random_order`.

    Returns
    -------
    ids : ndarray, of the dtype of `ids`
        Sample ids.
    copies : ndarray int32
        The number of each sample's copy, 0 to repeats - 1.
    """
    num_samples = len(ids)
    selected = repeated_samples_per_rank(num_samples, world_size, repeats)
    places = rank + world_size * np.arange(selected)
    if shuffle:
        ids = rng.generator(seed, epoch, rng.ORDER).permutation(ids)
    places %= max(1, num_samples * repeats)
    return ids[places // repeats], (places % repeats).astype(np.int32)


def sample_pages(allocations: AllocationTable, num_samples: int, page_size: int) -> np.ndarray:
    """Return the page of each sample's first bytes.

    Parameters
    ----------
    allocations : AllocationTable
    num_samples : int
    page_size : int
        Bytes.

    Returns
    -------
    ndarray int32 (num_samples,)
        For a sample without bytes in pages: 0, the page of the header.
    """
    pages = np.zeros(num_samples, dtype=np.int32)
    # If an assignment names a sample several times, the last one stays. So the lowest offset comes last.
    pages[allocations.sample_ids[::-1]] = allocations.ptrs[::-1] // np.uint64(page_size)
    return pages


def replace_bad(
    ids: np.ndarray, copies: np.ndarray, bad: Mapping[int, str], candidates: np.ndarray, *, seed: int, epoch: int
) -> np.ndarray:
    """Replace the bad samples of a batch by good ones.

    The replacement is a function of (seed, epoch, sample id, copy): the first of a thousand draws that is not bad.

    Parameters
    ----------
    ids, copies : ndarray int64 (N,)
        The batch.
    bad : mapping of int to str
        Bad samples, and the reason for each.
    candidates : ndarray int (M,)
        The samples to draw from.

    Returns
    -------
    ndarray int64 (N,)

    Raises
    ------
    SampleError
        If all draws are bad.
    """
    ids = ids.copy()
    for i in np.flatnonzero(np.isin(ids, list(bad))):
        drawn = (
            int(candidates[int(rng.uniform(seed, epoch, ids[i], copies[i], rng.REPLACEMENT, draw) * len(candidates))])
            for draw in range(_MAX_DRAWS)
        )
        good = next((sample_id for sample_id in drawn if sample_id not in bad), None)
        if good is None:
            reason = f"{bad[int(ids[i])]}; no good sample to replace it was found"
            raise SampleError([(int(ids[i]), reason)])
        ids[i] = good
    return ids


class EpochOrder(TraversalOrder):
    """An order that also numbers the copies of its samples; the base class of the loader's own orders.

    Parameters
    ----------
    loader : Loader
        Its indices, seed, rank, world size and drop_last are copied. The order does not keep the loader, so that a
        loader without another reference is freed at once.
    """

    def __init__(self, loader: Loader):
        self.indices = loader.indices
        self.seed = loader.seed
        self.distributed = loader.distributed
        self.topology = {"rank": loader.rank, "world_size": loader.world_size}
        self.drop_last = loader.drop_last

    def num_samples(self) -> int:
        """Return how many samples this rank sees in every epoch; no order is drawn."""
        return samples_per_rank(
            len(self.indices), self.topology["world_size"], rank=self.topology["rank"], drop_last=self.drop_last
        )

    @abstractmethod
    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the sample ids of this rank's epoch, and the numbers of their copies; None if all are 0."""

    def sample_order(self, epoch: int) -> np.ndarray:
        """Return the sample ids of this rank's epoch."""
        return self.draw(epoch)[0]


class Sequential(EpochOrder):
    """The order of the file, or of ``indices``; see `sequential_order`."""

    def draw(self, epoch: int) -> tuple[np.ndarray, None]:
        return sequential_order(self.indices, **self.topology, drop_last=self.drop_last), None


class Random(EpochOrder):
    """A permutation of all samples; see `random_order`."""

    def draw(self, epoch: int) -> tuple[np.ndarray, None]:
        return random_order(self.indices, seed=self.seed, epoch=epoch, **self.topology, drop_last=self.drop_last), None


class QuasiRandom(EpochOrder):
    """A permutation of pages with a buffer of mixed pages; see `quasi_random_order`."""

    def __init__(self, loader: Loader, buffer_pages: int = 64):
        super().__init__(loader)
        beton = loader.beton
        self.pages = sample_pages(beton.allocations, beton.num_samples, beton.page_size)[self.indices]
        self.buffer_pages = buffer_pages

    def num_samples(self) -> int:
        start, end = _share(len(self.indices), **self.topology, drop_last=self.drop_last)
        return end - start

    def draw(self, epoch: int) -> tuple[np.ndarray, None]:
        return quasi_random_order(
            self.indices,
            self.pages,
            seed=self.seed,
            epoch=epoch,
            **self.topology,
            drop_last=self.drop_last,
            buffer_pages=self.buffer_pages,
        ), None


class Repeated(EpochOrder):
    """Repeated augmentation; see `repeated_order`."""

    def __init__(self, loader: Loader, shuffle: bool):
        super().__init__(loader)
        self.repeats = loader.repeats
        self.shuffle = shuffle

    def num_samples(self) -> int:
        return repeated_samples_per_rank(len(self.indices), self.topology["world_size"], self.repeats)

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return repeated_order(
            self.indices, repeats=self.repeats, seed=self.seed, epoch=epoch, **self.topology, shuffle=self.shuffle
        )


def build_order(loader: Loader, order: Any, order_kwargs: Mapping[str, Any]) -> TraversalOrder:
    """Return the order that a loader's arguments ask for."""
    if loader.repeats > 1:
        if order not in (OrderOption.SEQUENTIAL, OrderOption.RANDOM) or not loader.drop_last:
            raise UserError("repeats need the order SEQUENTIAL or RANDOM, and drop_last=True")
        return Repeated(loader, shuffle=order == OrderOption.RANDOM)
    if isinstance(order, OrderOption):
        ours = {OrderOption.SEQUENTIAL: Sequential, OrderOption.RANDOM: Random, OrderOption.QUASI_RANDOM: QuasiRandom}
        return ours[order](loader, **order_kwargs)
    if isinstance(order, type) and issubclass(order, TraversalOrder):
        return order(loader, **order_kwargs)
    if isinstance(order, TraversalOrder):
        if not hasattr(order, "loader"):
            TraversalOrder.__init__(order, loader)
        return order
    raise UserError(f"order is {order!r}; it must be an OrderOption, or a TraversalOrder, class or instance")
