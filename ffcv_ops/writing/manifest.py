"""Build the tables of a file and its manifest, when all images have their places."""

import platform
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.files import replace_text
from ffcv_ops.sources.image import Change, change_remark
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.writing.pages import StoredImages
from ffcv_ops.writing.partial_file import partial_paths, read_journal, remove_partial
from ffcv_ops.writing.plan import ROW_TYPE, WritePlan, library_versions


def build_tables(plan: WritePlan, stored: StoredImages, num_pages: int) -> tuple[bytes, np.ndarray]:
    """Return the bytes from the header to the end of the metadata, and the allocation table."""
    kept = stored.kept()
    samples = stored.samples[kept]
    header = np.zeros(1, beton.HEADER_TYPE)
    header["version"], header["num_fields"] = beton.VERSION, 2
    header["page_size"], header["num_samples"] = plan.settings.page_size, len(samples)
    header["alloc_table_ptr"] = plan.data_start + num_pages * plan.settings.page_size
    fields = np.zeros(2, beton.FIELD_TYPE)
    fields["type_id"] = beton.IMAGE_FIELD, beton.INT_FIELD
    fields["name"][:, :5] = np.frombuffer(b"imagelabel", np.uint8).reshape(2, 5)
    rows = np.zeros(len(samples), ROW_TYPE)
    for name in ("mode", "width", "height"):
        rows["f0"][name] = samples[name]
    rows["f0"]["data_ptr"] = samples["ptr"]
    rows["f1"] = plan.source.labels[plan.order[kept]]
    alloc_table = np.zeros(len(samples), beton.ALLOC_TYPE)
    alloc_table["sample_id"] = np.arange(len(samples))
    alloc_table["ptr"], alloc_table["size"] = samples["ptr"], samples["size"]
    return header.tobytes() + fields.tobytes() + rows.tobytes(), alloc_table


def build_manifest(
    plan: WritePlan,
    stored: StoredImages,
    tables: tuple[bytes, np.ndarray],
    page_hashes: Sequence[str],
    target: Path,
) -> dict[str, Any]:
    """Return the manifest of a file with these tables (see `build_tables`) and these SHA-256 of its pages."""
    head, alloc_table = tables
    kept = stored.kept()
    labels = plan.source.labels[plan.order[kept]]
    tables_digest = beton.tables_digest(head, alloc_table)
    skipped = sorted((plan.key(position), reason) for position, reason in stored.reasons.items())
    return {
        "format": beton.MANIFEST_VERSION,
        "file": target.name,
        "size_bytes": plan.data_start + len(page_hashes) * plan.settings.page_size + alloc_table.nbytes,
        "num_samples": len(alloc_table),
        "digest": beton.file_digest(tables_digest, page_hashes),
        "settings": asdict(plan.settings),
        "source": {"kind": plan.source.kind, **plan.source.facts},
        "remarks": [remark.entry() for remark in [*plan.source.remarks, *change_remarks(plan, stored)]],
        "skipped": [{"image": path, "reason": reason} for path, reason in skipped],
        "versions": {"python": platform.python_version(), "encoder": str(plan.encoder), **library_versions()},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "classes": plan.source.classes,
        "class_counts": np.bincount(labels, minlength=len(plan.source.classes)).tolist(),
        "tables": tables_digest,
        "checksums": b64encode(stored.samples["checksum"][kept].tobytes()).decode(),
    }


def change_remarks(plan: WritePlan, stored: StoredImages) -> list[Remark]:
    """Return the remarks on what images lost, each with the first image in the order of the source."""
    remarks = []
    for change in Change:
        places = plan.order[(stored.samples["changes"] & change) != 0]
        if len(places):
            remarks.append(change_remark(change, len(places), plan.source.keys[int(places.min())]))
    return remarks


def write_manifest(target: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a file that is whole, and delete what is left of its partial file."""
    replace_text(beton.manifest_path(target), dumps(manifest, indent=1) + "\n")
    remove_partial(target)


def complete_manifest(plan: WritePlan, target: Path) -> dict[str, Any] | None:
    """Write the manifest of a run that was killed after the file had its name. Return None if no such run was."""
    partial_path, journal_path = partial_paths(target)
    if partial_path.exists() or not target.exists():
        return None
    identity, pages, _ = read_journal(journal_path)
    if identity != plan.identity():
        return None
    stored = StoredImages.from_pages(plan, pages)
    if stored.position < plan.num_images:
        return None
    tables = build_tables(plan, stored, len(pages))
    with open(target, "rb") as file:
        if file.read(len(tables[0])) != tables[0]:
            return None
    manifest = build_manifest(plan, stored, tables, [page["sha256"] for page in pages], target)
    write_manifest(target, manifest)
    return manifest
