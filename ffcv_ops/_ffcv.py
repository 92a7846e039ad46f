"""The one import of FFCV: quick, on every supported Python, and with two faults of ffcv 1.0.2 fixed.

The whole project takes FFCV's names from here.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import numba.typed
import numpy as np
from numba.core import config

if importlib.util.find_spec("distutils") is None:
    try:
        importlib.import_module("setuptools")  # provides the distutils that ffcv imports
    except ImportError:
        raise ImportError(
            "ffcv imports distutils, which Python 3.12 removed and setuptools provides: run `pip install setuptools`"
        ) from None

if len(os.sched_getaffinity(0)) == 1 and config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    # ffcv starts Numba's threading layer when it is imported. On one CPU, TBB postpones the layer's first task, a fork
    # loses the task, and the interpreter waits for it at its exit. The workqueue layer does not.
    config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]

# ffcv makes a typed dict of two names, for which Numba compiles for seconds. No compiled code reads the dict.
numba.typed.Dict, _typed_dict = dict, numba.typed.Dict
try:
    importlib.import_module("ffcv")
finally:
    numba.typed.Dict = _typed_dict

from ffcv.fields.basics import BasicDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader.loader import DEFAULT_OS_CACHE, OrderOption
from ffcv.loader.loader import Loader as StockLoader
from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery, allocate_query
from ffcv.pipeline.graph import INITIAL_STATE, DecoderNode, Graph, RefNode
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from ffcv.transforms import ToDevice, ToTensor
from ffcv.traversal_order.base import TraversalOrder

__all__ = [
    "DEFAULT_OS_CACHE",
    "INITIAL_STATE",
    "AllocationQuery",
    "BasicDecoder",
    "Compiler",
    "DecoderNode",
    "Graph",
    "OSCacheManager",
    "OpenedReader",
    "Operation",
    "OrderOption",
    "PipelineSpec",
    "ProcessCacheManager",
    "Reader",
    "RefNode",
    "SimpleRGBImageDecoder",
    "State",
    "StockLoader",
    "ToDevice",
    "ToTensor",
    "TraversalOrder",
    "allocate_query",
    "read_mapped",
]


class OpenedReader(Reader):
    """FFCV's reader of a file whose tables are in memory. It reads only the header and the fields' descriptors.

    Parameters
    ----------
    beton : Beton
        The file.
    custom_fields : mapping of str to Field class
    """

    def __init__(self, beton: Any, custom_fields: Mapping[str, Any]):
        self._beton = beton
        super().__init__(os.fspath(beton.path), custom_fields)

    def read_metadata(self) -> None:
        """Take the metadata over."""
        self.metadata = self._beton.metadata

    def read_allocation_table(self) -> None:
        """Do nothing: `alloc_table` reads the table when it is needed."""

    @property
    def alloc_table(self) -> np.ndarray:
        """The allocation table. Only FFCV's memory managers need it."""
        return self._beton.alloc_table


def read_mapped(address: np.uint64, storage_state: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the bytes of the value at an offset of a mapped file, for FFCV's decoders to be compiled with.

    Parameters
    ----------
    address : uint64
        Offset in the file, in bytes.
    storage_state : tuple
        The file, uint8 (B,); the offsets of its values, ascending, and their sizes in bytes, each uint64 (R,).

    Returns
    -------
    uint8 array (size,)
    """
    row = np.searchsorted(storage_state[1], address, side="right") - 1
    return storage_state[0][address : address + storage_state[2][row]]


def _compile_reader(manager: OSCacheManager) -> Callable[..., Any]:
    """Compile FFCV's reader of a mapped file, and leave its types to Numba's inference.

    FFCV declares the types, and sets ``mutable`` on the ``uint8[::1]`` that Numba shares within a process. That changes
    the type's hash. Every kernel compiled for such arrays before then raises a KeyError if another kernel calls it.
    """
    return Compiler.compile(read_mapped)


# Processes may use FFCV's own loader beside ours.
OSCacheManager.compile_reader = _compile_reader
