"""Keep the listing of a source on disk, so that a run that continues does not list the source again."""

import json
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.files import replacing
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.source import PackedKeys, Reader, Source

_VERSION = 2


def with_index(source: Source, rests_on: Any) -> Source:
    """Return a source that can be saved. `rests_on` is all that the listing depends on, in JSON's types."""
    return replace(source, save_index=partial(_save, source, rests_on))


def _save(source: Source, rests_on: Any, path: Path) -> None:
    remarks = [asdict(remark) for remark in source.remarks]
    text = json.dumps([_VERSION, rests_on, source.classes, source.identity, source.facts, remarks])
    content, keys = np.frombuffer(text.encode(), np.uint8), np.frombuffer(source.keys.block(), np.uint8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, text=content, keys=keys, labels=source.labels, places=source.places)


def load_index(path: Path | None, rests_on: Any, kind: str, address: str, reader: Reader) -> Source | None:
    """Return the source that an interrupted run has saved; None if there is none, or if it rests on other things.

    The last column of the places must be the size of the image.
    """
    if path is None or not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            version, found, classes, identity, facts, remarks = json.loads(arrays["text"].tobytes())
            if (version, found) != (_VERSION, json.loads(json.dumps(rests_on))):
                return None
            block, labels, places = (arrays[name] for name in ("keys", "labels", "places"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # it is damaged, and the source is still there
    keys = PackedKeys()
    keys.extend(block.tobytes())
    source = Source(
        kind, address, classes, keys, labels, places, places[:, -1], reader, identity=identity, facts=facts,
        remarks=[Remark(**remark) for remark in remarks],
    )  # fmt: skip
    return with_index(source, rests_on)
