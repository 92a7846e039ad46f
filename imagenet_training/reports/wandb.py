"""Record a run in Weights & Biases; offline if there is no API key.

A run that is resumed offline has several parts, each a folder with a transaction log. W&B 0.31 does not connect them: a
part begins at step 0 and may record steps of an earlier part again. Therefore the earlier parts are read, and only what
they lack is recorded.
"""

import json
import os
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagenet_training.state import TrainState

# The transaction log consists of blocks, as LevelDB's log does, behind a header of 7 bytes.
_BLOCK_BYTES, _HEADER_BYTES = 32768, 7
_WHOLE, _LAST = 1, 4


@dataclass(frozen=True)
class Part:
    """The records of one part of a run.

    Attributes
    ----------
    path : Path
        The folder of the part.
    has_run : bool
        False if W&B was killed before it wrote anything. ``wandb sync`` refuses all parts if one is empty.
    last_step, last_epoch : int
        The last step, and the last epoch with its metrics; -1 without one.
    """

    path: Path
    is_offline: bool
    has_run: bool
    last_step: int = -1
    last_epoch: int = -1


def read_parts(folder: Path, wandb_id: str) -> list[Part]:
    """Return the parts of a W&B run in a folder, in their order."""
    logs = [
        path for kind in ("offline-run", "run") for path in folder.glob(f"{kind}-*-{wandb_id}/run-{wandb_id}.wandb")
    ]
    # The names have the local time, which may have been put back between two parts. Steps only grow.
    return sorted(map(_read_part, logs), key=lambda part: (part.last_step, part.path.name.removeprefix("offline-")))


def _read_part(path: Path) -> Part:
    """Read a part up to its end, or to the first record that is damaged."""
    has_run, step, epoch = False, -1, -1
    with suppress(ValueError, OSError):
        for record, _ in _read_log(path):
            has_run |= record.HasField("run")
            if record.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                step = max(step, int(row.get("_step", -1)))
                epoch = max(epoch, int(row.get("epoch", -1)))
    return Part(path.parent, path.parent.name.startswith("offline-"), has_run, step, epoch)


def _read_log(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the whole records of a transaction log, and the offset behind each.

    Raises
    ------
    ValueError
        If a record is damaged.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content, payload, at = path.read_bytes(), b"", _HEADER_BYTES
    while at + _HEADER_BYTES <= len(content):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        at += _HEADER_BYTES + size
        if not kind or at > len(content):
            return
        payload += content[at - size : at]
        if kind in (_WHOLE, _LAST):
            try:
                record = Record.FromString(payload)
            except DecodeError as error:
                raise ValueError(f"{path}: a damaged record before byte {at:,}") from error
            yield record, at
            payload = b""


def cut_torn_end(path: Path) -> None:
    """Cut the incomplete record at the end of a killed part. ``wandb sync`` stops there, before the later parts.

    If a record is damaged, rows may follow, and nothing is cut.
    """
    with suppress(ValueError, OSError):
        end = max((end for _, end in _read_log(path)), default=_HEADER_BYTES)
        if end < path.stat().st_size:
            os.truncate(path, end)


def copy_parts(earlier: Path, folder: Path, wandb_id: str) -> int:
    """Copy the offline parts of a run from an earlier folder into another one. Return the number of new copies."""
    num_copied = 0
    for part in read_parts(earlier, wandb_id):
        target = folder / part.path.name
        if part.is_offline and not target.exists():
            unfinished = folder / f".{part.path.name}.tmp"
            shutil.copytree(part.path, unfinished, symlinks=True, dirs_exist_ok=True)
            unfinished.rename(target)
            num_copied += 1
    return num_copied


class WandbRun:
    """The W&B run of a training run. An error of W&B ends the recording, and never the training.

    What the earlier parts of an offline run have is not recorded again. `log` gets a line of text for what the user
    should know.
    """

    def __init__(self, run: Any, earlier: Sequence[Part], log: Callable[[str], None]):
        self._run, self._print = run, log
        self._id, self._folder, self._is_offline = run.id, Path(run.settings.sync_dir), run.offline
        self.last_step = max((part.last_step for part in earlier), default=-1)
        self._last_epoch = max((part.last_epoch for part in earlier), default=-1)

    def log_step(self, values: Mapping[str, Any], step: int) -> None:
        """Record the values of a step, unless an earlier part has the step."""
        if step > self.last_step:
            self._log(values, step)

    def log_epoch(self, values: Mapping[str, Any], step: int) -> None:
        """Record the values of an epoch, unless an earlier part has the epoch.

        If an earlier part has the step without the values of the epoch, they get the next step.
        """
        if values["epoch"] > self._last_epoch:
            self._log(values, max(step, self.last_step + 1))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # W&B's process may be gone, and its disk full
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._print(f"note: W&B records no more of this run: {type(error).__name__}: {error}")

    def finish(self, exit_code: int) -> None:
        """End the recording, and print the command that uploads an offline run."""
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)
        if self._is_offline and (command := sync_command(self._folder, self._id)):
            self._print(f"W&B: recorded offline; this command uploads the run: {command}")


def sync_command(last: Path, wandb_id: str) -> str:
    """Return the command that uploads all offline parts of a run; "" if no part can be uploaded.

    W&B may still write the last part, so it counts although it looks empty.
    """
    parts = [part for part in read_parts(last.parent, wandb_id) if part.is_offline and part.path.name != last.name]
    paths = [str(part.path) for part in parts if part.has_run]
    paths += [str(last)] if last.is_dir() else []
    return shlex.join(["wandb", "sync", *paths]) if paths else ""


def start_wandb(
    state: TrainState,
    provenance: dict[str, Any],
    folder: Path,
    log: Callable[[str], None],
    records: Sequence[Mapping[str, Any]],
) -> WandbRun | None:
    """Start the W&B run of a recipe, or continue the one that ``state`` names. The state gets the id of the W&B run.

    W&B's own files go below the folder. `log` gets a line of text for each decision made for the user. An offline part
    that was killed may have lost some of the finished epochs in `records`, which are recorded again. Return None if the
    recipe turns W&B off, or if W&B cannot start.
    """
    if not provenance["recipe"]["wandb"]["enable"]:
        return None
    earlier = read_parts(folder / "wandb", state.wandb_id) if state.wandb_id else []
    for part in earlier:
        if part.is_offline and part.has_run:
            cut_torn_end(part.path / f"run-{state.wandb_id}.wandb")
    try:
        run = _init(state, provenance, folder, log)
    except Exception as error:  # a folder's name that is no text, a full disk, and whatever else W&B meets
        log(f"note: W&B does not record this run: {type(error).__name__}: {error}")
        return None
    state.wandb_id = run.id
    recorded = WandbRun(run, earlier if run.offline else (), log)
    if recorded.last_step > state.step:
        log(f"W&B: earlier parts have the steps up to {recorded.last_step}, which stay; only later ones are recorded")
    if run.offline and earlier:
        for record in records:
            values = {key: value for key, value in record.items() if key not in ("step", "time")}
            recorded.log_epoch({**values, "position": record["epoch"] + 1}, record["step"])
    return recorded


def _init(state: TrainState, provenance: dict[str, Any], folder: Path, log: Callable[[str], None]) -> Any:
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not has_wandb_key():
        mode = "offline"
        log(
            "W&B: no API key found, so this run is recorded offline. `bash launch/setup_wandb.sh` stores a key; "
            "`wandb sync` uploads the run; --no_wandb records nothing."
        )
    recipe = provenance["recipe"]["wandb"]
    text = json.dumps(provenance, ensure_ascii=False).encode("utf-8", "replace")  # W&B takes no bytes of a file's name
    settings: dict[str, Any] = {
        "project": recipe["project"],
        "name": recipe["name"] or state.run_name,
        "id": state.wandb_id or None,
        "resume": "allow" if state.wandb_id else None,
        "config": json.loads(text),
        "dir": str(folder),
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        return wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
    except wandb.errors.Error as error:
        log(f"W&B: {error}. This run is recorded offline.")
        return wandb.init(mode="offline", **settings)


def has_wandb_key() -> bool:
    """Return True if W&B could log in without a prompt: by a key in the environment, or kept by `wandb login`."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
