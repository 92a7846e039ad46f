"""Files that a user names for a page or a picture: they replace no file of a training run."""

import os
from pathlib import Path

from ffcv_ops.errors import UserError
from ffcv_ops.files import check_output

# The lock of a run in its folder.
LOCK_NAME = "run.lock"


def check_own_output(path: Path, kind: str) -> None:
    """Check that a page or picture that a user names can be written, and replaces no file of a training run."""
    if _is_file_of_run(path):
        raise UserError("a training run writes this file; choose another name")
    check_output(path, kind)


def _is_file_of_run(path: Path) -> bool:
    """Return True if a training run writes this file: its report, or a file among its logs and checkpoints."""
    path = Path(os.path.abspath(path))
    names = ("logs", "checkpoints")
    folder = path.parent.parent if path.parent.name in names else path.parent
    is_run = (folder / LOCK_NAME).exists() or any((folder / "logs").glob("train_*.jsonl"))
    return is_run and (path.name in ("report.html", LOCK_NAME) or path.parent.name in names)
