"""Importing FFCV so that it works where it would not, and quickly. To be imported before anything of FFCV's."""

import importlib
import importlib.util
import os

import numba.typed
from numba.core import config

if importlib.util.find_spec("distutils") is None:
    try:
        importlib.import_module("setuptools")  # which provides the distutils that ffcv asks for
    except ImportError:
        raise ImportError(
            "ffcv imports distutils, which Python 3.12 removed and setuptools provides: run `pip install setuptools`"
        ) from None

if len(os.sched_getaffinity(0)) == 1 and config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    # ffcv starts Numba's threading layer when it is imported. On one CPU, TBB leaves the layer's first task for later,
    # a fork loses it, and the interpreter waits for it at its exit. Nothing is parallel there: the plainest will do.
    config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]

# ffcv makes a typed dict of two names, in which nothing compiled looks and for which Numba would compile for seconds.
numba.typed.Dict, _typed_dict = dict, numba.typed.Dict
try:
    importlib.import_module("ffcv")
finally:
    numba.typed.Dict = _typed_dict
