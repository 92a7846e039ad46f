"""Files at addresses such as ``s3://bucket/train.tar``: listed, and read in ranges, through fsspec.

What fsspec and its file systems do not do is done here. They do not compare a file with the one that was listed. Their
HTTP file system reports all failures as a missing file, tries nothing twice, and takes the whole file from a server
that ignores the range (``tests/test_remote.py``). Credentials and endpoints come from the environment, as fsspec and
its file systems document.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, urlsplit, urlunsplit

from ffcv_ops.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from ffcv_ops.sources.ranges import RangeFile

_WEB = ("http", "https")
# Facts that tell whether a file has changed, by the names of the file systems. The first that is there counts.
_VERSIONS = (
    "generation", "ETag", "etag", "blob_id", "md5Hash", "content_md5", "Content-MD5", "LastModified", "last_modified",
    "Last-Modified", "mtime", "updated", "modified", "created",
)  # fmt: skip
# Seconds between tries: a listing has a user who waits, and a run of hours should outlive the restart of a server.
_LISTING_WAITS_S = (0.5, 1.5)
_READING_WAITS_S = (0.5, 1.5, 5.0, 15.0, 40.0)
# A server that is silent is asked twice.
_TIMEOUT_S, _MOST_S = 120.0, 180.0
_HOPELESS = (PermissionError, IsADirectoryError, ImportError, ValueError, NotImplementedError)
# User and query of a URL are left out, which may be secret.
_URL = re.compile(r"(\w+://)(?:[^/\s'\"@]*@)?([^\s'\"?]*)(?:[?][^\s'\"]*)?")
_CHANGED, _GONE, _TRY_AGAIN = 412, (404, 410), (408, 425, 429)

Answer = TypeVar("Answer")
Question = Callable[["AbstractFileSystem", str], Answer]
"""Called with the file system of an address, and with the path in it."""


class RemoteChanged(Exception):
    """A file is not the one that was listed."""


class RemoteError(Exception):
    """A file cannot be read; the message is the reason in a few words."""


class RemoteMissing(RemoteError):
    """There is no such file."""


class RemoteRefused(RemoteError):
    """The server answers, and does not give the file."""


def is_remote(address: str) -> bool:
    """Return whether an address is a URL, and not a path of this machine."""
    return "://" in address


def is_web(address: str) -> bool:
    """Return whether a URL is one of the web. Raise UserError if it is none."""
    return _split(address).scheme in _WEB


def public_name(address: str) -> str:
    """Return an address without what may be secret: a password, and the part behind the question mark."""
    if not is_remote(address):
        return address
    parts = _split(address)
    user, _, host = parts.netloc.rpartition("@")
    netloc = host if ":" in user else parts.netloc
    if parts.scheme in _WEB:
        return urlunsplit((parts.scheme, netloc, parts.path, "", ""))
    return address.replace(parts.netloc, netloc, 1)


def _split(address: str) -> SplitResult:
    """Return the parts of a URL.

    Raises
    ------
    UserError
        If it is none. The message does not hold it, because it is not clear where a password stands.
    """
    with suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme not in _WEB or (parts.hostname and parts.port != 0):
            return parts
    scheme = address.partition("://")[0]
    raise UserError(f"{scheme}://...: is no URL of a host; in a password, write characters such as / as %2F")


def ask(address: str, question: Question[Answer]) -> Answer:
    """Return an answer about an address that the user gave. Raise UserError if there is none."""
    try:
        return _try(address, question, _LISTING_WAITS_S)
    except RemoteError as error:
        raise UserError(f"{public_name(address)}: {error}") from error


def has_file(address: str) -> bool:
    """Return whether there is a file that the server gives. Raise UserError if the server does not answer."""
    try:
        _try(address, _info, _LISTING_WAITS_S)
    except (RemoteMissing, RemoteRefused):
        return False
    except RemoteError as error:
        raise UserError(f"{public_name(address)}: {error}") from error
    return True


def describe(address: str) -> tuple[int, str]:
    """Return the size of a file in bytes, and what tells that it has changed; nothing if the server does not tell.

    Raises
    ------
    UserError
        If there is no such file, or if it cannot be read in ranges.
    """
    name = public_name(address)
    info = ask(address, _info)
    if info.get("type") == "directory":
        raise UserError(f"{name}: is a folder, not a file")
    size: Any = info.get("size")
    reason = ""
    if size is None:
        reason = "the server does not tell the size of the file"
    elif info.get("partial") is False or (is_web(address) and not _gives_ranges(address, size)):
        reason = "the server gives whole files only, no ranges"
    if reason and info.get("mimetype") == "text/html":
        raise UserError(f"{name}: is a page, not a file; the address of a folder needs a slash at its end")
    if reason:
        raise UserError(f"{name}: {reason}; copy the file here, or to another server")
    return int(size), _version(info)


def check(file: "RangeFile") -> None:
    """Raise RemoteChanged or RemoteMissing if a file is not the one that was listed. See `read` for other errors."""
    info = _try(file.path, _info, _READING_WAITS_S)
    if (info.get("size"), _version(info)) != (file.size_bytes, file.version):
        raise RemoteChanged


def read(file: "RangeFile", offset: int, size_bytes: int) -> bytes:
    """Return a range of a file, which lies in it.

    Raises
    ------
    RemoteChanged
        If the server tells that the file is not the one that was listed, or gives too little.
    RemoteMissing
        If there is no such file any more.
    RemoteError
        If the file cannot be read, also after a minute, or after four from a silent server.
    """
    if not size_bytes:
        return b""

    def read_range(fs: "AbstractFileSystem", path: str) -> bytes:
        return fs.cat_file(path, start=offset, end=offset + size_bytes, **_options(fs, file))

    content = _try(file.path, read_range, _READING_WAITS_S)
    if len(content) > size_bytes:
        raise RemoteError("the server gave more than the range it was asked for")
    if len(content) < size_bytes:
        raise RemoteChanged
    return content


def limit(fs: "AbstractFileSystem") -> dict[str, Any]:
    """Return the time limit of a question, for file systems that have one."""
    return {"timeout": _TIMEOUT_S} if fs.async_impl else {}


def _info(fs: "AbstractFileSystem", path: str) -> dict[str, Any]:
    found: dict[str, Any] = fs.info(path, **limit(fs))
    return found


def _options(fs: "AbstractFileSystem", file: "RangeFile") -> dict[str, Any]:
    """Return how a range is asked for: with a time limit, and on the web only from the file that was listed."""
    options = limit(fs)
    if is_web(file.path):
        kind, _, value = str(file.version).partition(" ")
        condition = {"ETag": "If-Match", "Last-Modified": "If-Unmodified-Since"}.get(kind)
        headers = _headers(fs)
        if condition and not value.startswith("W/"):  # a weak tag never matches
            headers[condition] = value
        options["headers"] = headers
    return options


def _headers(fs: "AbstractFileSystem") -> dict[str, str]:
    """Return what a web server is told: a range of compressed content would be of no use."""
    return {**getattr(fs, "kwargs", {}).get("headers", {}), "Accept-Encoding": "identity"}


def _version(info: dict[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name)), "")


_gives_ranges_on: dict[str, bool] = {}


def _gives_ranges(address: str, size_bytes: int) -> bool:
    """Return whether a web server gives ranges. Each server is asked once."""
    host = _split(address).netloc
    if size_bytes > 1 and host not in _gives_ranges_on:

        def read_last(fs: "AbstractFileSystem", path: str) -> bool:
            with fs.open(path, "rb", cache_type="none", size=size_bytes, headers=_headers(fs)) as file:
                file.seek(size_bytes - 1)
                try:
                    return len(file.read(1)) == 1
                except ValueError:  # it begins with the whole file
                    return False

        _gives_ranges_on[host] = ask(address, read_last)
    return _gives_ranges_on.get(host, True)


def _try(address: str, question: Question[Answer], waits_s: tuple[float, ...]) -> Answer:
    """Return the answer of a file system, which may take several tries.

    Raises
    ------
    RemoteChanged
        If the server tells that the file has changed.
    RemoteMissing
        If there is no such file.
    RemoteRefused
        If it is of no use to ask again.
    RemoteError
        If there is no answer.
    """
    started_s, num_tries = time.monotonic(), 0
    while True:
        num_tries += 1
        try:
            fs, path = _file_system(address)
            return question(fs, path)
        except Exception as raised:  # each file system has classes of its own
            error = _hidden_error(raised)
            status, reason = getattr(error, "status", None), _reason(error)
            if status == _CHANGED:
                raise RemoteChanged from error
            if isinstance(error, FileNotFoundError) or status in _GONE:
                raise RemoteMissing(reason) from error
            is_refusal = isinstance(status, int) and 400 <= status < 500 and status not in _TRY_AGAIN
            if isinstance(error, _HOPELESS) or is_refusal:
                raise RemoteRefused(reason) from error
            took_s = time.monotonic() - started_s
            if num_tries > len(waits_s) or took_s > _MOST_S:
                raise RemoteError(f"{reason}; tried {num_tries} times in {took_s:.0f} s") from error
        time.sleep(waits_s[num_tries - 1])


def _hidden_error(error: Exception) -> BaseException:
    """Return the error behind another one. fsspec's HTTP file system reports each failure as a missing file."""
    hidden = error.__cause__
    is_of_the_web = isinstance(hidden, OSError) or type(hidden).__module__.startswith(("aiohttp", "asyncio"))
    return hidden if isinstance(error, FileNotFoundError) and hidden is not None and is_of_the_web else error


def _reason(error: BaseException) -> str:
    """Return what went wrong in a few words, without the address, which may hold a secret."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in _GONE:
        return "no such file"
    if isinstance(status, int) and status:
        return f"the server answers {status} ({getattr(error, 'message', '') or 'no reason given'})"
    if reason := getattr(getattr(error, "certificate_error", None), "verify_message", ""):
        return f"the certificate of the server is not trusted ({reason}); SSL_CERT_FILE names a file of those to trust"
    text = _URL.sub(r"\1\2", " ".join(str(error).split()))
    if isinstance(error, ImportError):
        return f"{text}; pip install '.[remote]' for https, s3 and gs, pip install huggingface_hub for hf"
    if type(error).__name__.endswith("TimeoutError") and not text:
        return "no answer in time"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_lock = threading.Lock()
_file_systems: dict[tuple[str, int], "AbstractFileSystem"] = {}


def _file_system(address: str) -> tuple["AbstractFileSystem", str]:
    """Return the file system of an address, and the path in it. A process opens each file system once."""
    from fsspec.core import url_to_fs

    parts = _split(address)
    root = f"{parts.scheme}://{parts.netloc}"
    key = root, os.getpid()  # what a parent has opened does not work in a fork
    with _lock:
        fs = _file_systems.get(key)
        if fs is None:
            fs, _ = url_to_fs(f"{root}/", use_listings_cache=False)
            if fs.async_impl:  # others serve one thread only, and fsspec keeps them for it
                _file_systems[key] = fs
    return fs, fs._strip_protocol(address)
