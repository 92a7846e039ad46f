"""Run a program as on a terminal: behind a pseudo-terminal of a given width."""

import errno
import fcntl
import os
import pty
import struct
import subprocess
import termios


def run_on_terminal(command, *, columns=100, **options):
    """Return the exit status and all that was written to the terminal, carriage returns and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            written += chunk
    except OSError as error:  # how Linux says that the other end was closed
        assert error.errno == errno.EIO
    finally:
        os.close(ours)
    return process.wait(timeout=60), written.decode()


def screen(written):
    """What remains to be read, line by line, once carriage returns and clearing have done their work."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        kept = ""
        for part in line.split("\r"):
            kept = part + kept[len(part) :]
        lines.append(kept.rstrip())
    return lines
