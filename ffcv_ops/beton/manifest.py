"""The manifest beside a ``.beton`` file: reading it, and checking that it belongs to the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.beton.layout import MANIFEST_VERSION, manifest_path
from ffcv_ops.errors import UserError


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file that is damaged."""
    return UserError(f"{path}: damaged or not a .beton file: {what}; write it again with write_beton.py")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the content of the manifest of a ``.beton`` file; None if there is no manifest."""
    manifest = manifest_path(path)
    try:
        content = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError):
        raise UserError(f"{manifest}: not a readable manifest; restore it, or delete it to go without") from None
    types = {"size_bytes": int, "num_samples": int, "classes": list, "class_counts": list, "tables": str}
    types |= {"digest": str, "checksums": str}
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > MANIFEST_VERSION:
        raise UserError(
            f"{manifest}: a manifest of format {number}, which a newer version has written; this version reads format "
            f"{MANIFEST_VERSION}: use the newer version"
        )
    if number != MANIFEST_VERSION:
        raise UserError(f"{manifest}: not a manifest of format {MANIFEST_VERSION}; restore it, or delete it")
    for key, kind in types.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{manifest}: lacks {key!r}; restore it, or delete it to go without")
    if not all(isinstance(name, str) for name in content["classes"]):
        raise UserError(f"{manifest}: its classes are not names; restore it, or delete it to go without")
    return content


def check_manifest(path: Path, manifest: dict[str, Any], size_bytes: int, num_samples: int, tables: str) -> None:
    """Check that a manifest belongs to a file of this size, with so many samples and these tables (their SHA-256)."""
    beside = manifest_path(path).name
    for what, found in (("size_bytes", size_bytes), ("num_samples", num_samples)):
        if manifest[what] != found:
            raise UserError(
                f"{path}: damaged, or {beside} belongs to another file: {what} is {found} and should be "
                f"{manifest[what]}; write it again with write_beton.py"
            )
    if manifest["tables"] != tables:
        raise UserError(
            f"{path}: damaged, or {beside} belongs to another file: header and tables have another SHA-256 than it "
            "says; write it again with write_beton.py"
        )


def check_labels(path: Path, manifest: dict[str, Any], labels: np.ndarray) -> None:
    """Check that the labels of a file are class numbers of its manifest, and as many of each as the manifest says."""
    num_classes = len(manifest["classes"])
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        sample = int(np.argmax(outside))
        raise damaged(path, f"sample {sample} has label {labels[sample]}, the manifest {num_classes} classes")
    if np.bincount(labels, minlength=num_classes).tolist() != manifest["class_counts"]:
        raise UserError(f"{path}: the images per class are not those of {manifest_path(path).name}")
