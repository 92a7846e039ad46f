"""Hold some images out of training, so that one folder gives both splits."""

import os
from dataclasses import replace
from hashlib import blake2b, sha256
from itertools import pairwise

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.in_threads import Count, list_in_threads
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.source import Source, Stage

HELD_OUT = "images held out of training"
SAME_BYTES = "images not held out, because an image for training has the same bytes"
_THREADS, _IMAGES_A_TASK = 16, 64


def check_share(share: float, split: str | None) -> None:
    """Raise UserError unless the share is between 0 and 1, and the split is one of the two that there are."""
    if not 0 < share < 1:
        raise UserError(f"hold_out must be between 0 and 1, such as 0.1, not {share:g}")
    if split not in ("train", "val"):
        raise UserError("--hold_out needs --split train for the other images, or --split val for those held out")


def hold_out(source: Source, share: float, split: str | None, stage: Stage = lambda what, count: None) -> Source:
    """Return the images of one split, ``train`` or ``val``, of a source that does not have two.

    The choice is a function of the class and the name of each image. So both splits can be written by themselves,
    from any kind of source. It depends on no seed. Of a class with two images or more, at least one is for training,
    and at least one for validation unless it is a copy. Images are read if a held out and another one have the same
    size.

    Raises
    ------
    UserError
        If no class has two different images.
    """
    is_held = _choose(source, share)
    same = _same_bytes(source, is_held, stage)
    is_held[same] = False
    if not is_held.any():
        raise UserError(f"{source.address}: no image can be held out, because no class has two different ones")
    remarks = [
        Remark(what, len(found), source.keys[int(found[0])])
        for what, found in ((HELD_OUT, np.flatnonzero(is_held)), (SAME_BYTES, same))
        if len(found)
    ]
    chosen = np.flatnonzero(is_held == (split == "val"))
    return replace(
        source,
        keys=source.keys.take(chosen),
        labels=source.labels[chosen],
        places=source.places[chosen],
        sizes_bytes=source.sizes_bytes[chosen],
        facts={**source.facts, "hold_out": share, "split": split},
        remarks=[*source.remarks, *remarks],
    )


def _choose(source: Source, share: float) -> np.ndarray:
    """Return bool (len(keys),): of each class, the images whose names have the smallest hashes.

    A name includes the folders within the class, or frame 1 of all series would be held out together.
    """
    hashes = np.empty(len(source.keys), np.uint64)
    for index, label in enumerate(source.labels.tolist()):
        prefix = os.fsencode(source.classes[label]) + b"/"
        hashed = blake2b(prefix + source.keys.encoded(index).removeprefix(prefix), digest_size=8)
        hashes[index] = int.from_bytes(hashed.digest(), "little")
    is_held = np.zeros(len(hashes), bool)
    bounds = np.searchsorted(source.labels, np.arange(len(source.classes) + 1))  # a source is sorted by class
    for start, end in pairwise(bounds.tolist()):
        count = min(max(round(share * (end - start)), 1), end - start - 1)
        is_held[start + np.argsort(hashes[start:end], kind="stable")[: max(count, 0)]] = True
    return is_held


def _same_bytes(source: Source, is_held: np.ndarray, stage: Stage) -> np.ndarray:
    """Return the numbers of the images that are held out and have the bytes of one that is not."""
    sizes = source.sizes_bytes
    doubtful = np.flatnonzero(np.isin(sizes, np.intersect1d(sizes[is_held], sizes[~is_held])))

    def hash_images(images: np.ndarray, count: Count) -> list[int]:
        hashes = []
        for index in images.tolist():
            try:
                content = source.reader.read(source.keys[index], source.places[index].tolist())
            except OSError:  # a bad image, which the writer will name
                content = b"%d" % index
            hashes.append(int.from_bytes(sha256(content).digest()[:8], "little"))
            count(1)
        return hashes

    tasks = np.split(doubtful, range(_IMAGES_A_TASK, len(doubtful), _IMAGES_A_TASK))
    found = list_in_threads(tasks, hash_images, lambda what, count: stage("images compared", count), _THREADS)
    hashes = np.array([number for numbers in found for number in numbers], np.uint64)
    held = is_held[doubtful]
    return doubtful[held & np.isin(hashes, hashes[~held])]
