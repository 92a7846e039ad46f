"""Walk the headers of a tar archive without reading its files.

All formats of GNU tar and of Python's ``tarfile`` are read: v7, ustar, GNU and pax. ``tarfile`` itself takes several
times as long and keeps an object for each file. Its result is the same (``tests/test_tar.py``).
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from ffcv_ops.errors import UserError
from ffcv_ops.sources.window import LOCAL, Read, Window, WindowSizes

BLOCK = 512
# Distance behind the end mark within which another archive is looked for. GNU tar fills the last 10 KiB with zeros.
_BEHIND_END = 64 << 10
# A long name, and what else a pax header holds. Linux's longest path has 4 KiB.
_MOST_HEADER_BYTES = 1 << 20
_MOST_DIGITS = 20
_COMPRESSED = {
    b"\x1f\x8b": ("compressed (gzip)", "gunzip --keep"),
    b"BZh": ("compressed (bzip2)", "bunzip2 --keep"),
    b"\xfd7zXZ\0": ("compressed (xz)", "unxz --keep"),
    b"\x28\xb5\x2f\xfd": ("compressed (Zstandard)", "unzstd"),
    b"\x04\x22\x4d\x18": ("compressed (LZ4)", "unlz4"),
    b"PK\x03\x04": ("a zip archive", "unzip"),
}
HARD_LINK, SYMBOLIC_LINK, FOLDER, FILE = "hard link", "symbolic link", "folder", "file"
_KINDS = {ord("1"): HARD_LINK, ord("2"): SYMBOLIC_LINK, ord("5"): FOLDER, ord("D"): FOLDER}
_KINDS |= dict.fromkeys(b"0\x007", FILE)
_DEVICES = frozenset(b"346")
_SKIPPED = frozenset(b"V")
_EXTENDED = frozenset(b"xXgLK")
_REFUSED = {
    ord("S"): "a sparse file; make the archive without --sparse",
    ord("M"): "a part of a file; join the volumes",
}


class Member(NamedTuple):
    """A file, folder or link in an archive. `offset` is where its content begins; `target` is that of a link."""

    name: bytes
    kind: str
    offset: int
    size_bytes: int
    target: bytes


class TarError(UserError):
    """An archive that is damaged, cut, compressed, or of a kind that cannot be read by place."""


class TarWalk:
    """The members of an archive, in order.

    Parameters
    ----------
    read : callable
        See `Read`.
    where : str
        The name of the archive in messages.
    start, end : int
        The place of the archive in what `read` reads, in bytes. An archive may lie in another one.
    sizes : WindowSizes
    """

    def __init__(self, read: Read, where: str, start: int, end: int, sizes: WindowSizes = LOCAL):
        self._window = Window(read, end, sizes)
        self._where, self._start, self._end = where, start, end

    def content(self, member: Member) -> bytes:
        """Return the content of a small file, which often lies in what has been read anyway."""
        return self._window.get(member.offset, member.size_bytes)

    def __iter__(self) -> Iterator[Member]:
        position, extended = self._start, dict[str, bytes]()
        while True:
            block = self._window.get(position, BLOCK)
            if len(block) < BLOCK:
                check_not_compressed(block, self._where)
                raise self._cut(position, "has no end mark")
            if not block[0] and block.count(0) == BLOCK:
                self._check_end(position)
                return
            self._check_sum(block, position)
            kind = block[156]
            if kind in _EXTENDED:
                size_bytes = self._read_extended(block, position, extended)
            else:
                member, size_bytes = self._read_member(block, position, extended)
                extended = {}
                if kind not in _DEVICES and kind not in _SKIPPED:
                    yield member
            position += BLOCK + -(-size_bytes // BLOCK) * BLOCK

    def _read_member(self, block: bytes, position: int, extended: dict[str, bytes]) -> tuple[Member, int]:
        """Return a member, and the size of what follows its header."""
        kind, name = block[156], extended.get("path") or _name(block)
        if kind in _REFUSED or "sparse" in extended:
            raise TarError(f"{self._where}: {os.fsdecode(name)} is {_REFUSED.get(kind, _REFUSED[ord('S')])}")
        what = _KINDS.get(kind, FILE)
        if what == FILE and name.endswith(b"/") and kind in b"\0" + b"0":
            what = FOLDER  # as the oldest archives mark it
        size_bytes = 0
        if kind == ord("D") or (what == FILE and kind not in _DEVICES):
            size_bytes = self._size(extended.get("size") or block[124:136], position, 10 if "size" in extended else 8)
        self._check_inside(position + BLOCK, size_bytes, os.fsdecode(name))
        target = extended.get("linkpath") or block[157:257].split(b"\0", 1)[0]
        return Member(name, what, position + BLOCK, size_bytes, target), size_bytes

    def _read_extended(self, block: bytes, position: int, extended: dict[str, bytes]) -> int:
        """Note what the header of a long name or a pax header tells about the next member, and return its size."""
        kind, size_bytes = block[156], self._size(block[124:136], position, 8)
        self._check_inside(position + BLOCK, size_bytes, "a header")
        if size_bytes > _MOST_HEADER_BYTES:
            raise self._damaged(position)
        content = self._window.get(position + BLOCK, size_bytes)
        if kind == ord("L"):
            extended["path"] = content.split(b"\0", 1)[0]
        elif kind == ord("K"):
            extended["linkpath"] = content.split(b"\0", 1)[0]
        elif kind != ord("g"):
            for key, value in _pax_records(content):
                if key in (b"path", b"linkpath", b"size"):
                    extended[key.decode()] = value
                elif key.startswith(b"GNU.sparse."):
                    extended["sparse"] = value
        return size_bytes

    def _check_end(self, position: int) -> None:
        behind = self._window.get(position, min(_BEHIND_END, self._end - position))
        if behind.strip(b"\0"):
            raise TarError(
                f"{self._where}: has data behind its end mark at byte {position - self._start}, as archives have that "
                "`cat` joined; join them with `tar --concatenate`, or give each on its own"
            )

    def _check_sum(self, block: bytes, position: int) -> None:
        found = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        try:
            expected = int(block[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
        except ValueError:
            expected = -1
        if found == expected:
            return
        if position > self._start:
            raise self._damaged(position)
        check_not_compressed(block, self._where)
        raise TarError(f"{self._where}: is no tar archive")

    def _size(self, field: bytes, position: int, base: int) -> int:
        if field[0] & 0x80:
            return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        digits = field.split(b"\0", 1)[0].strip() or b"0"
        if not digits.isdigit() or len(digits) > _MOST_DIGITS or (base == 8 and max(digits) > ord("7")):
            raise self._damaged(position)
        return int(digits, base)

    def _damaged(self, position: int) -> TarError:
        at = position - self._start
        return TarError(f"{self._where}: is damaged at byte {at}, in a header; make or copy it again")

    def _check_inside(self, offset: int, size_bytes: int, what: str) -> None:
        if offset + size_bytes > self._end:
            raise self._cut(self._end, f"ends within {what}")

    def _cut(self, position: int, reason: str) -> TarError:
        return TarError(f"{self._where}: is cut at byte {position - self._start} ({reason}); copy or make it again")


def check_not_compressed(beginning: bytes, where: str) -> None:
    """Raise TarError if a file that begins so is compressed."""
    for magic, (what, command) in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise TarError(
                f"{where}: is {what}, so single images cannot be read from it; unpack it once: {command} {where}"
            )


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    # GNU's own format has other fields there, and another magic.
    if block[257:263] == b"ustar\0" and block[345]:
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of ``length key=value`` lines."""
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not int(length):
            return
        record, content = content[: int(length)], content[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        yield key, value
