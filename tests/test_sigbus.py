"""Reading a mapped file that was cut: zeros and a note for a watched map, the end of the process for others."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import mmap, os, sys
    import numpy as np
    from ffcv_ops import _sigbus

    path, which = sys.argv[1:]
    with open(path, "rb") as file:
        ours, other = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for _ in range(2))
    data = np.frombuffer(ours, np.uint8)
    number = _sigbus.watch(data.ctypes.data, data.size)
    assert data.sum() == 1 << 20 and not _sigbus.was_cut(number)
    os.truncate(path, 1 << 18)
    assert data.sum() == 1 << 18 and _sigbus.was_cut(number)
    if which == "forgotten":
        _sigbus.forget(number)
        os.truncate(path, 1 << 17)
        data[(1 << 18) - 1]
    elif which == "other":
        other[1 << 19]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the handler is made for Linux")
@pytest.mark.parametrize(("which", "status"), [("ours", 0), ("other", -signal.SIGBUS), ("forgotten", -signal.SIGBUS)])
def test_a_cut_file(tmp_path, which, status):
    path = tmp_path / "file"
    path.write_bytes(b"\1" * (1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), path, which],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
