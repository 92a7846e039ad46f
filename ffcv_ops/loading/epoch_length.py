"""The length of an epoch as arithmetic. Importing this module costs nothing, so plans and checks can use it."""

REPEATED_ROUND = 256
"""Under repeated augmentation an epoch is a multiple of this many samples, as in timm's ``RepeatAugSampler``."""


def samples_per_rank(
    num_samples: int, world_size: int = 1, *, rank: int = 0, drop_last: bool = True, repeats: int = 1
) -> int:
    """Return how many samples one rank sees in one epoch.

    Parameters
    ----------
    num_samples : int
        Samples of the dataset.
    world_size, rank : int
        The number of ranks, and the rank that is asked about. The rank matters only without `drop_last`.
    drop_last : bool
        If True, all ranks see equally many samples. If False, the ranks' samples are disjoint and complete.
    repeats : int
        Copies of a sample under repeated augmentation. Above 1, the rule is that of timm's ``RepeatAugSampler``, and
        `drop_last` has no effect.

    Returns
    -------
    int
    """
    if repeats > 1:
        return repeated_samples_per_rank(num_samples, world_size, repeats)
    if drop_last:
        return num_samples // world_size
    return max(0, -(-(num_samples - rank) // world_size))


def repeated_samples_per_rank(num_samples: int, world_size: int, repeats: int) -> int:
    """Return how many samples one rank sees under repeated augmentation; see `samples_per_rank`."""
    if num_samples >= REPEATED_ROUND:
        selected = num_samples // REPEATED_ROUND * REPEATED_ROUND // world_size
    else:
        selected = -(-num_samples // world_size)
    return min(selected, -(-num_samples * repeats // world_size))


def batches_per_rank(num_samples_of_rank: int, batch_size: int, *, drop_last: bool = True) -> int:
    """Return how many batches the samples of one rank make.

    Parameters
    ----------
    num_samples_of_rank : int
        The result of `samples_per_rank`.
    batch_size : int
        Samples in a batch of one rank.
    drop_last : bool
        If True, a last batch that is not full is left out.

    Returns
    -------
    int
    """
    return num_samples_of_rank // batch_size if drop_last else -(-num_samples_of_rank // batch_size)
