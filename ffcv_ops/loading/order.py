"""Which samples, in which order, on which rank: pure functions, and FFCV's TraversalOrder over them.

Every function returns what one rank sees in one epoch. With ``drop_last`` (training) all ranks get equally many samples
and fewer than ``world_size`` samples are left out; without it (validation) the ranks' samples are disjoint and together
the whole set, each once, for any number of ranks.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from ffcv_ops import rng
from ffcv_ops._ffcv import TraversalOrder
from ffcv_ops.loading.epoch_length import repeated_samples_per_rank, samples_per_rank


def _dealt(ids: np.ndarray, rank: int, world_size: int, drop_last: bool) -> np.ndarray:
    """Deal samples to ranks like cards, so that a global batch is the same set for any number of ranks."""
    end = len(ids) // world_size * world_size if drop_last else len(ids)
    return ids[rank:end:world_size]


def sequential_order(ids: np.ndarray, *, rank: int = 0, world_size: int = 1, drop_last: bool = True) -> np.ndarray:
    """Keep the given order; rank r of W gets the samples at r, r + W, r + 2 W, ...

    Parameters
    ----------
    ids : ndarray int64 (N,)
        Sample ids in the file.
    rank, world_size : int
    drop_last : bool
        Leave out the last N mod W samples, so that all ranks get equally many.

    Returns
    -------
    ndarray int64
    """
    return _dealt(ids, rank, world_size, drop_last)


def random_order(
    ids: np.ndarray, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
) -> np.ndarray:
    """Permute all samples, anew each epoch, and deal them to the ranks.

    Parameters
    ----------
    seed, epoch : int
        What the permutation depends on, and nothing else: all ranks draw the same.

    Others, and the return value, as for `sequential_order`.
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

    A rank has at most `buffer_pages` + 1 pages in use at any time, and reads each page once. Pages are dealt in equal
    numbers of samples, so that a page on a border is read by the two ranks it belongs to.

    Parameters
    ----------
    ids : ndarray int64 (N,)
        Sample ids in the file.
    pages : ndarray int64 (N,)
        The page each of them is in; see `sample_pages`.
    buffer_pages : int
        How many pages are mixed, at least 1. The stock loader mixes 2 x batch_size pages.

    Others, and the return value, as for `random_order`.
    """
    if buffer_pages < 1:
        raise ValueError(f"buffer_pages is {buffer_pages}; it must be at least 1")
    generator = rng.generator(seed, epoch, rng.ORDER)
    page_numbers, page_index = np.unique(pages, return_inverse=True)
    position_of_page = generator.permutation(len(page_numbers))
    # Permuted before they are gathered by page, so that chance decides which samples of a page go to the next rank.
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
    """Repeat each sample, its copies on neighbouring ranks, and keep a normal epoch's number of samples.

    Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019, MultiGrain), with the selection of timm's
    ``RepeatAugSampler``: of the N x repeats samples a rank sees (N rounded down to a multiple of 256) / W, so that an
    epoch is as long as without repeats. Below 256 samples N is not rounded.

    Parameters
    ----------
    repeats : int
        Number of copies of a sample.
    shuffle : bool
        Permute the samples, else keep the given order.

    Others as for `random_order`.

    Returns
    -------
    ids, copies : ndarray int64, ndarray int64
        Sample ids, and for each the number of its copy, 0 to repeats - 1.
    """
    num_samples = len(ids)
    selected = repeated_samples_per_rank(num_samples, world_size, repeats)
    places = rank + world_size * np.arange(selected)
    if shuffle:
        ids = rng.generator(seed, epoch, rng.ORDER).permutation(ids)
    places %= max(1, num_samples * repeats)
    return ids[places // repeats], places % repeats


def sample_pages(alloc_table: np.ndarray, num_samples: int, page_size: int) -> np.ndarray:
    """Find the page that each sample's first bytes are in.

    Parameters
    ----------
    alloc_table : structured ndarray
        The file's allocation table, fields ``sample_id`` and ``ptr``.
    num_samples : int
    page_size : int
        Bytes.

    Returns
    -------
    ndarray int64 (num_samples,)
        0, the header's page, for a sample without data in pages.
    """
    pages = np.zeros(num_samples, dtype=np.int64)
    last_first = np.argsort(alloc_table["ptr"], kind="stable")[::-1]
    # Of several assignments to one sample the last stays: its lowest pointer's.
    pages[alloc_table["sample_id"][last_first]] = alloc_table["ptr"][last_first] // page_size
    return pages


class EpochOrder(TraversalOrder):
    """An order that also numbers the copies of its samples; base class of the loader's own orders.

    Parameters
    ----------
    loader : ffcv_ops.loader.Loader
        Read for indices, seed, rank, world size and drop_last; not kept, so that a loader nobody uses is freed at once.
    """

    def __init__(self, loader):
        self.indices = loader.indices
        self.seed = loader.seed
        self.distributed = loader.distributed
        self.topology = {"rank": loader.rank, "world_size": loader.world_size}
        self.drop_last = loader.drop_last

    def num_samples(self) -> int:
        """Return how many samples this rank sees in every epoch; no order is drawn."""
        return samples_per_rank(len(self.indices), **self.topology, drop_last=self.drop_last)

    @abstractmethod
    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the sample ids of this rank's epoch, and the numbers of the copies (None: all 0)."""

    def sample_order(self, epoch: int) -> np.ndarray:
        """Return the sample ids of this rank's epoch, int64."""
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
    """Pages permuted, a buffer of them mixed; see `quasi_random_order`."""

    def __init__(self, loader, buffer_pages: int = 64):
        super().__init__(loader)
        beton = loader.beton
        self.pages = sample_pages(beton.alloc_table, beton.num_samples, beton.page_size)[self.indices]
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

    def __init__(self, loader, shuffle: bool):
        super().__init__(loader)
        self.repeats = loader.repeats
        self.shuffle = shuffle

    def num_samples(self) -> int:
        return samples_per_rank(len(self.indices), **self.topology, repeats=self.repeats)

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return repeated_order(
            self.indices, repeats=self.repeats, seed=self.seed, epoch=epoch, **self.topology, shuffle=self.shuffle
        )
