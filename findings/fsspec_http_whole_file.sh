#!/usr/bin/env bash
# fsspec 2026.9.0, HTTPFileSystem: cat_file(start, end) gives another content than asked for, without an error.
#
# A server may answer a request for a range with the whole file and status 200, as Python's own http.server does. For
# cat_file(url, start=1000, end=1010), fsspec then returns the whole file: 5,000 bytes in place of 10, from another
# position. open(), seek(), read() of the same file system raise a ValueError there. The file system also hides why a
# file cannot be had: for a port on which nobody listens, info() raises FileNotFoundError, as for a file that is not
# there. And ukey(), "Hash of file properties, to tell if it has changed", is the same for other content under the URL,
# because it is a hash of the URL only.
#
# Expected: 10 bytes or an error; an error that tells the connection from the file; another ukey.
# Seen:
#   cat_file(1000, 1010): 5000 bytes, the first is from position 0
#   info, nobody listens: FileNotFoundError
#   open, seek, read: ValueError
#   ukey after a change: the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
cd "$folder"
mkdir shown
cat >check.py <<'PYTHON'
import functools
import http.server
import threading
from pathlib import Path

import fsspec

content = bytes(number % 251 for number in range(5000))
path = Path("shown/data")
path.write_bytes(content)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


handler = functools.partial(Quiet, directory="shown")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/data"
fs = fsspec.filesystem("http")

found = fs.cat_file(url, start=1000, end=1010)
position = 0 if found.startswith(content[:10]) else 1000
print(f"cat_file(1000, 1010): {len(found)} bytes, the first is from position {position}")

try:
    with fs.open(url, "rb", cache_type="none") as file:
        file.seek(1000)
        print("open, seek, read:", len(file.read(10)), "bytes")
except ValueError:
    print("open, seek, read: ValueError")

before = fs.ukey(url)
path.write_bytes(content[::-1])
print("ukey after a change:", "the same" if fs.ukey(url) == before else "another one")

server.shutdown()
server.server_close()
try:
    fs.info(url)
except Exception as error:
    print(f"info, nobody listens: {type(error).__name__}")
PYTHON
"$folder/venv/bin/python" check.py | sort | tee seen
diff seen - <<'EXPECTED'
cat_file(1000, 1010): 5000 bytes, the first is from position 0
info, nobody listens: FileNotFoundError
open, seek, read: ValueError
ukey after a change: the same
EXPECTED
