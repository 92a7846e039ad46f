"""Sources on other machines: a web server with ranges, and a server of S3. What fsspec leaves out is tried here too."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from aiohttp import BasicAuth, web
from archives import CONTENTS, NAMES, contents_of, listed, make_folder, tar, tar_of_tars
from test_parquet import DATASETS_5, table
from test_webdataset import CLASSES, samples, write_shards
from web_server import serving

from ffcv_ops.errors import UserError
from ffcv_ops.sources import remote
from ffcv_ops.sources.addresses import name_files
from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.ranges import RangeReader, list_file
from ffcv_ops.sources.source import SourceChanged, SourceError
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.window import LOCAL, REMOTE, Window
from ffcv_ops.writing.partial_file import PartialFile, index_path
from ffcv_ops.writing.writer import write

ROOT = Path(__file__).parents[1]
# webdataset leaves its files for Python to close, and fsspec its connections.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The images of one folder as archives, shards and tables."""
    data = tmp_path_factory.mktemp("data")
    folder = make_folder(data / "folder")
    tar_of_tars(data / "train.tar", folder)
    tar(data / "folders.tar", ".", folder=folder)
    flat = make_folder(data / "flat", {name.rpartition("/")[2]: CONTENTS[name] for name in NAMES})
    tar(data / "flat.tar", ".", folder=flat)
    (data / "labels.csv").write_text("".join(f"{name.rpartition('/')[2]},{name[:3]}\n" for name in NAMES))
    shards = write_shards(data / "shards", samples())
    (shards / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (data / "table" / "data").mkdir(parents=True)
    for number, part in enumerate((table().slice(0, 6), table().slice(6))):
        pq.write_table(part, data / "table" / "data" / f"train-{number:05d}-of-00002.parquet", **DATASETS_5)
    pq.write_table(table(), data / "snappy.parquet")
    pq.write_table(table(), data / "gzip.parquet", compression="gzip")
    return data


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Do not wait between tries."""
    monkeypatch.setattr(remote, "_LISTING_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(remote, "_READING_WAITS_S", (0.0,) * 5)
    monkeypatch.setattr(remote, "_gives_ranges_on", {})


@pytest.fixture
def server(data):
    with serving(data) as server:
        yield server


KINDS = [
    ("train.tar", "tar"), ("folders.tar", "tar"), ("shards/", "webdataset"), ("shards/train-*.tar", "webdataset"),
    ("shards/train-{0000..0002}.tar", "webdataset"), ("table/", "parquet"), ("table/data/train-*.parquet", "parquet"),
    ("snappy.parquet", "parquet"), ("gzip.parquet", "parquet"), ("snappy.parquet?token=secret", "parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_source_of_a_web_server_is_the_folder(data, server, name, kind):
    source = open_source(SourceSpec(f"{server.url}/{name}", split=None))
    assert source.kind == kind and contents_of(source) == listed(data / "folder")
    assert "secret" not in json.dumps([source.identity, source.facts, source.reader.locate("x")])
    assert pickle.loads(pickle.dumps(source.reader)).read(source.keys[0], source.places[0].tolist())
    archives = {path for path, _, _ in server.answers if path.endswith((".tar", ".parquet"))}
    assert archives and {status for path, status, _ in server.answers if path in archives} == {206}


def test_a_flat_archive_takes_its_labels_from_here(data, server):
    assert listed(f"{server.url}/flat.tar", labels=str(data / "labels.csv")) == listed(data / "folder")
    with pytest.raises(UserError, match="holds images but no class folders"):
        listed(f"{server.url}/flat.tar")


def run_writer(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "write_beton.py", *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_file_is_that_of_the_folder(data, server, tmp_path):
    settings = ("--split", "train", "--num_workers", 2)
    remote_file, local_file = tmp_path / "remote.beton", tmp_path / "local.beton"
    found = run_writer("--source", f"{server.url}/train.tar?token=secret", "--target", remote_file, *settings)
    assert found.returncode == 0, found.stderr
    assert run_writer("--source", data / "folder", "--target", local_file, *settings).returncode == 0
    assert remote_file.read_bytes() == local_file.read_bytes()
    assert "secret" not in found.stdout + found.stderr
    manifest = (tmp_path / "remote.beton.json").read_text()
    assert json.loads(manifest)["source"]["path"] == f"{server.url}/train.tar" and "secret" not in manifest
    refused = run_writer("--source", f"{server.url}/train.tar?token=secret", *settings)
    assert refused.returncode == 2 and "train.tar: lies on another machine; name the file" in refused.stderr


def test_a_subset_reads_its_images_only(data, tmp_path):
    folder = make_folder(tmp_path / "in", {f"n/{i:03d}.JPEG": os.urandom(300_000) for i in range(40)})
    tar(tmp_path / "large.tar", "n", folder=folder)
    with serving(tmp_path) as server:
        source = open_source(SourceSpec(f"{server.url}/large.tar"))
        server.answers.clear()
        for index in range(0, 40, 10):
            assert source.reader.read("", source.places[index].tolist()) == (folder / source.keys[index]).read_bytes()
        assert sum(size for *_, size in server.answers) == 4 * 300_000


def test_images_in_parquet_are_looked_for_once(tmp_path):
    """Not in each process. With Snappy, neighbouring blocks of 64 KiB are read, and in a small page all of it."""
    images = [{"bytes": os.urandom(200_000), "path": f"{i:03d}.jpg"} for i in range(30)]
    rows = table({"image": images, "label": [i % 3 for i in range(30)]})
    pq.write_table(rows, tmp_path / "plain.parquet", row_group_size=10, **DATASETS_5)
    pq.write_table(rows, tmp_path / "snappy.parquet", row_group_size=10)
    with serving(tmp_path) as server:
        for name, most_bytes in (("plain", 200_000), ("snappy", 200_000 + 2 * 65_600)):
            source = open_source(SourceSpec(f"{server.url}/{name}.parquet"))
            reader = pickle.loads(pickle.dumps(source.reader))
            server.answers.clear()
            for key, place in zip(source.keys, source.places.tolist(), strict=True):
                assert reader.read(key, place) == images[int(key[:3])]["bytes"]
            assert len(server.answers) == 30 and max(size for *_, size in server.answers) <= most_bytes
            assert source.sizes_bytes.tolist() == [200_000] * 30


def test_a_listing_that_was_kept_is_used(data, server, tmp_path):
    spec = SourceSpec(f"{server.url}/table/", index=tmp_path / "index")
    source = open_source(spec)
    source.save_index(spec.index)
    server.answers.clear()
    again = open_source(spec)
    assert contents_of(again) == contents_of(source) and again.facts == source.facts
    num_images = len(source.keys)
    assert len([size for path, _, size in server.answers if path.endswith(".parquet")]) < 3 * num_images


def test_a_server_without_ranges_is_refused_before_it_sends_much(data, server):
    """fsspec's `cat_file` would return the whole file for each image."""

    def whole(request):
        return web.Response(body=b"\0" * 4_000_000) if request.path.endswith("train.tar") else None

    server.fault = whole
    with pytest.raises(UserError, match="whole files only, no ranges"):
        list_file(f"{server.url}/train.tar")


def test_a_server_may_compress_what_it_is_not_told_to_leave(data, server):
    """nginx then ignores the range, and seems to give whole files only."""

    def zipped(request):
        return web.Response(body=b"\0" * 4_000_000) if "gzip" in request.headers["Accept-Encoding"] else None

    server.fault = zipped
    assert listed(f"{server.url}/train.tar") == listed(data / "folder")


@pytest.mark.parametrize("name", ["shards", "train.tar", "folders.tar?token=secret"])
def test_a_page_is_no_archive(server, name):
    """A folder without its slash, or a page that asks for a password."""
    server.fault = lambda request: web.Response(text="<html>", content_type="text/html")
    with pytest.raises(UserError, match=f"/{name.partition('?')[0]}: is a page, not a file; .* needs a slash"):
        open_source(SourceSpec(f"{server.url}/{name}"))


def test_a_password_opens_the_names_of_classes_too(data, server):
    """They lie beside the shards. Without them, the classes would be named by their numbers."""
    allowed = BasicAuth("me", "secret@").encode()

    def closed(request):
        is_allowed = request.headers.get("Authorization") == allowed or request.query.get("token") == "secret"
        return None if is_allowed else web.Response(status=401)

    server.fault = closed
    host = server.url.removeprefix("http://")
    for address in (
        f"http://me:secret%40@{host}/shards/",
        f"{server.url}/shards/train-{{0000..0002}}.tar?token=secret",
    ):
        source = open_source(SourceSpec(address))
        assert source.classes == CLASSES
        assert "secret" not in json.dumps([source.address, source.identity, source.facts, source.locate(0)])


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("a.tar", {"class_names": "names.txt"}), ("a.tar", {"labels": "http://me:secret@127.0.0.1:1/labels.csv"}),
        ("a.arrow", {}), ("a.tar", {"kind": "folder"}), ("flat.tar", {}), ("table/*.tar", {}), ("nothing/", {}),
        ("table/", {"kind": "tar"}), ("table/", {"split": "val"}), ("shards/", {"label_column": "x"}),
        ("shards/", {"class_names": "http://me:secret@[::1/x"}), ("train.tar", {"kind": "parquet"}),
    ],
)  # fmt: skip
def test_messages_hold_no_secrets(server, address, options):
    host = server.url.removeprefix("http://")
    with pytest.raises(UserError) as raised:
        open_source(SourceSpec(f"http://me:secret@{host}/{address}", **options))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("address", ["http:///a?secret", "http://me:sec/ret@h/a", "https://[::1/a", "http://h:70000/a"])
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match=r"^https?://\.\.\.: is no URL of a host") as raised:
        open_source(SourceSpec(address))
    assert "sec" not in str(raised.value)


def test_a_reason_holds_no_secrets():
    error = OSError("cannot open 'https://me:secret@h/a?secret', s3://b/c?secret=1 or http://h/d (why?)")
    assert remote._reason(error) == "OSError: cannot open 'https://h/a', s3://b/c or http://h/d (why?)"


def test_a_server_that_is_silent_is_not_waited_for_long(data, server, monkeypatch):
    """A question has a time limit, and all tries together have one too."""
    reader = RangeReader([list_file(f"{server.url}/train.tar")])
    reader.read(0, 0, 10)
    monkeypatch.setattr(remote, "_TIMEOUT_S", 0.1)
    monkeypatch.setattr(remote, "_MOST_S", 0.15)
    monkeypatch.setattr(remote, "_READING_WAITS_S", (0.0,) * 50)
    server.fault = lambda request: time.sleep(0.2)
    with pytest.raises(SourceError, match="no answer in time; tried [23] times"):
        reader.read(0, 0, 10)


def test_the_listing_outlives_a_server_that_fails(data, tmp_path):
    """Also if nothing is on disk yet, so that the same command does not list again."""
    target = tmp_path / "a.beton"
    with serving(data) as server:
        server.fault = lambda request: web.Response(status=403) if is_read else None
        is_read = False

        spec = SourceSpec(f"{server.url}/folders.tar")
        save = PartialFile.__init__

        def begin(self, *arguments):
            nonlocal is_read
            save(self, *arguments)
            is_read = True

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as threads:
            patch.setattr(PartialFile, "__init__", begin)
            with pytest.raises(SourceError, match="answers 403"):
                write(spec, target, executor=threads, num_workers=1)
    assert index_path(target).exists()


def test_the_kind_does_not_depend_on_a_failure(data, server):
    """Shards whose labels cannot be read are not taken for an archive of folders."""
    server.fault = lambda request: web.Response(status=503) if request.http_range.start == 0 else None
    with pytest.raises(UserError, match="answers 503"):
        open_source(SourceSpec(f"{server.url}/shards/"))
    server.fault = lambda request: web.Response(status=503) if request.path.endswith(".txt") else None
    with pytest.raises(UserError, match="classes.txt: the server answers 503"):
        open_source(SourceSpec(f"{server.url}/shards/"))


def test_failures_are_tried_again(data, server):
    file = list_file(f"{server.url}/train.tar")
    failures = iter([500, 429, 503])

    def fault(request):
        status = next(failures, None)
        return web.Response(status=status) if status else None

    server.fault = fault
    content = (data / "train.tar").read_bytes()
    assert RangeReader([file]).read(0, 100, 50) == content[100:150]


@pytest.mark.parametrize(
    ("status", "reason"),
    [(503, "answers 503 .*; tried 6 times"), (403, "answers 403 .Forbidden."), (404, "not the file that was listed")],
)
def test_a_server_that_goes_on_failing_ends_the_run(data, server, status, reason):
    reader = RangeReader([list_file(f"{server.url}/train.tar?token=secret")])
    reader.read(0, 0, 10)
    server.fault = lambda request: web.Response(status=status)
    with pytest.raises(SourceError, match=f"{re.escape(server.url)}/train.tar: .*{reason}") as raised:
        reader.read(0, 0, 10)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("nothing.tar", None, "no such file"),
        ("shards/train-{0000..0007}.tar", None, "train-0003.tar: no such file"),
        ("train.tar", 401, "the server answers 401 .Unauthorized."),
        ("train.tar", 500, "answers 500 .Internal Server Error.; tried 3 times in 0 s"),
    ],
)
def test_a_source_that_cannot_be_listed_says_why(data, server, name, status, reason):
    """fsspec's HTTP file system calls each of them a missing file."""
    server.fault = lambda request: web.Response(status=status) if status else None
    with pytest.raises(UserError, match=f"{reason}$"):
        open_source(SourceSpec(f"{server.url}/{name}", kind="webdataset"))


def test_a_server_that_does_not_answer(data):
    with serving(data) as server:
        reader = RangeReader([list_file(f"{server.url}/train.tar")])
    with pytest.raises(SourceError, match="Cannot connect to host .*; tried 6 times .*the same command goes on"):
        reader.read(0, 0, 10)
    with pytest.raises(UserError, match="Cannot connect to host"):
        list_file(f"{server.url}/train.tar")


def test_an_archive_that_changes_is_refused(tmp_path):
    """By the next read, since the server is asked for the version that was listed, and at the end."""
    path = tmp_path / "a.tar"
    path.write_bytes(b"a" * 1000)
    with serving(tmp_path) as server:
        reader = RangeReader([list_file(f"{server.url}/a.tar")])
        assert reader.read(0, 0, 10) == b"a" * 10
        reader.check()
        path.write_bytes(b"b" * 1000)
        os.utime(path, (1, 1))
        for attempt in (lambda: reader.read(0, 0, 10), reader.check):
            with pytest.raises(SourceChanged, match="not the file that was listed"):
                attempt()
        path.unlink()
        with pytest.raises(SourceChanged, match="not the file that was listed"):
            reader.check()


@pytest.mark.parametrize(
    ("address", "options", "reason"),
    [
        ("s4://bucket/train.tar", {}, "Protocol not known: s4"),
        ("http://127.0.0.1:1/folder", {"kind": "folder"}, "no folders of images; mount the folder"),
        ("http://127.0.0.1:1/a.arrow", {}, "must lie on this machine"),
        ("memory://bucket/train.tar", {}, "no such file"),
        ("memory://bucket/*.tar", {}, "no file has such a name"),
    ],
)
def test_addresses_that_cannot_be_read(address, options, reason):
    with pytest.raises(UserError, match=reason):
        open_source(SourceSpec(address, **options))


def test_names_hold_no_secrets():
    assert remote.public_name("https://me:key@host:1/a/b.tar?X-Amz-Signature=1#x") == "https://host:1/a/b.tar"
    assert remote.public_name("abfs://container@account.dfs.core.windows.net/a?.tar").startswith("abfs://container@")
    assert remote.public_name("/data/a?b.tar") == "/data/a?b.tar"
    assert name_files(["s3://b/x/1.parquet?t", "s3://b/x/y/2.parquet"]) == ["1.parquet?t", "y/2.parquet"]


def test_a_window_reads_more_where_reads_are_near_to_each_other():
    content = os.urandom(3 << 20)
    asked = []

    def read(offset, size_bytes):
        asked.append((offset, size_bytes))
        return content[offset : offset + size_bytes]

    for sizes, step, most_reads in ((LOCAL, 100_000, 32), (REMOTE, 100_000, 8), (LOCAL, 600, 20)):
        asked.clear()
        window = Window(read, len(content), sizes)
        for offset in range(0, len(content) - 512, step):
            assert window.get(offset, 512) == content[offset : offset + 512]
        assert len(asked) <= most_reads
        assert all(size <= sizes.most for _, size in asked)


@pytest.fixture
def bucket(data, monkeypatch):
    """The data in a bucket of moto's server of S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setattr(remote, "_file_systems", {})
    bucket = boto3.resource("s3").Bucket("bucket")
    bucket.create()
    for path in [*data.rglob("*.tar"), *data.rglob("*.parquet"), *data.rglob("classes.txt")]:
        if ".classes" not in str(path):
            bucket.upload_file(str(path), str(path.relative_to(data)))
    yield bucket
    server.stop()


def test_a_bucket_of_s3(data, bucket, tmp_path):
    expected = listed(data / "folder")
    names = (
        "train.tar",
        "folders.tar",
        "shards",
        "shards/train-*.tar",
        "table",
        "table/data/*.parquet",
        "snappy.parquet",
    )
    for name in names:
        assert listed(f"s3://bucket/{name}") == expected, name
    target = tmp_path / "a.beton"
    found = run_writer("--source", "s3://bucket/table", "--split", "train", "--target", target, "--num_workers", 2)
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "a.beton.json").read_text())["source"]["path"] == "s3://bucket/table"
    with pytest.raises(UserError, match="s3://bucket/nothing.tar: no such file"):
        listed("s3://bucket/nothing.tar")
    reader = RangeReader([list_file("s3://bucket/train.tar")])
    reader.read(0, 0, 10)
    bucket.put_object(Key="train.tar", Body=b"a" * reader.files[0].size_bytes)
    with pytest.raises(SourceChanged, match="not the file that was listed"):
        reader.check()


def test_a_folder_that_is_not_for_writing_is_named_before_the_listing(data, tmp_path, monkeypatch):
    """The folder of a source may be for reading only. Root may write anywhere, so the answer of the system is set."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"a\.beton cannot be written there; choose another place with --target"):
        write(data / "folder", tmp_path / "a.beton")


def test_a_missing_package_is_named():
    error = ImportError("Install s3fs to access S3")
    assert remote._reason(error).startswith("Install s3fs to access S3; pip install '.[remote]' for https, s3")
