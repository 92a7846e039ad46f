"""Make the data that `tests/test_frozen.py` compares with.

    git worktree add --detach ../frozen f539592
    python tests/frozen/make.py ../frozen

The data in this folder are of commit f5395926, the last one before the code moved into packages. Make them again only
where a format is meant to change, from the commit before that change.
The digests of ``jpg`` and ``proportion`` are newer. They are of version 3 of the encoder, whose JPEGs share tables.
"""

import json
import lzma
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = Path(sys.argv[1] if __name__ == "__main__" else HERE).resolve()
sys.path[:0] = [str(ROOT), str(HERE)]

import cases  # noqa: E402

# The writer, killed as soon as its journal has noted a page.
KILLED_WRITER = """
import os, runpy, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from ffcv_ops.journal import PartialFile
commit = PartialFile._commit
def commit_and_die(self, lines):
    commit(self, lines)
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    PartialFile._commit = commit_and_die
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    import ffcv_ops

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases.save_photographs(folder / "photographs")
        expected = {
            "machine": cases.machine(),
            "public": sorted(ffcv_ops.__all__),
            "help": {script: cases.help_defaults(ROOT, script) for script in ("write_beton.py", "train_imagenet.py")},
            "files": {mode: make_file(folder, mode) for mode in cases.MODES},
            "half_written": make_half_written(folder),
            "batches": {
                kind: cases.describe_batches(kind, folder / "proportion.beton")
                for kind in ("training", "quasi_random", "validation")
            },
            **make_checkpoint(folder),
        }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def make_file(folder: Path, mode: str) -> dict[str, str]:
    target = folder / f"{mode}.beton"
    cases.write(ROOT, folder / "photographs", target, *cases.MODES[mode])
    return digests(target)


def digests(target: Path) -> dict[str, str]:
    """Return the digest of a file's bytes and that of its manifest."""
    manifest = json.loads(Path(f"{target}.json").read_bytes())
    return {"bytes": sha256(target.read_bytes()).hexdigest(), "manifest": manifest["digest"]}


def make_half_written(folder: Path) -> dict[str, str]:
    """Keep what a killed writer leaves, and return the digests of the file that an undisturbed one writes."""
    cases.save_tiles(folder / "tiles")
    target, script = folder / "tiles.beton", folder / "killed_writer.py"
    cases.write(ROOT, folder / "tiles", target, *cases.HALF_WRITTEN)
    expected = digests(target)
    target.unlink()
    Path(f"{target}.json").unlink()
    script.write_text(KILLED_WRITER)
    where = ["--source", folder / "tiles", "--target", target, f"--page_size={cases.PAGE_BYTES}", "--num_workers=1"]
    cases.run([script, ROOT / "write_beton.py", *where, *cases.HALF_WRITTEN], folder, status=-9)
    for suffix in (".partial", ".partial.journal"):
        content = Path(f"{target}{suffix}").read_bytes()
        (HERE / f"tiles.beton{suffix}.xz").write_bytes(lzma.compress(content, preset=9))
    return expected


def make_checkpoint(folder: Path) -> dict:
    """Keep the checkpoint of a run that is stopped within an epoch, and the weights of an undisturbed run."""
    cases.save_digits(folder)
    runs = {name: folder / name for name in ("whole", "stopped")}
    for name, run in runs.items():
        run.mkdir()
        for split in ("train", "val"):
            cases.write(ROOT, folder / split, run / f"{split}.beton")
        cases.train(ROOT, run, **({"STOP_AFTER": "15", "status": 75} if name == "stopped" else {}))
    stopped = (runs["stopped"] / "checkpoints" / "last.ckpt").read_bytes()
    (HERE / "last.ckpt").write_bytes(stopped)
    whole = torch.load(runs["whole"] / "checkpoints" / "last.ckpt", weights_only=True)
    arrays = {f"{part}/{key}": value.numpy() for part in ("model", "ema") for key, value in whole[part].items()}
    np.savez_compressed(HERE / "weights.npz", **arrays)
    (record,) = runs["whole"].glob("logs/*.jsonl")
    return {"record": sorted(json.loads(record.read_text().splitlines()[-1])), "checkpoint": sorted(whole)}


if __name__ == "__main__":
    main()
