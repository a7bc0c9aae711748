"""The run folder: one run at a time in it, and what may be wrong with it when a run fails."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_plugins.errors import RunError

LOCK = ".lock"
FINISHED = "finished"
"""Is in the folder when the run came to its end."""
LEAST_BYTES = 1 << 20
"""With less room than this a disk counts as full."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder and hold its lock, which ends with this process however it ends; no child process inherits it.

    Raises:
        RunError: another run is going on in it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"--out {out} cannot be written ({error.strerror}): name another folder, as in --out outputs/NAME"
        ) from error
    try:
        _lock(descriptor, out)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        pid = os.read(descriptor, 20).decode(errors="replace") or "unknown"
        raise RunError(
            f"--out {out} is the folder of a run that is going on (pid {pid}): wait for its end, or name another "
            "folder, as in --out outputs/NAME"
        ) from None
    except OSError:
        return  # a file system without locks
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def trouble(*folders: Path) -> str | None:
    """What is wrong with one of these folders that makes writing there fail."""
    for folder in folders:
        if not folder.is_dir():
            return f"the folder {folder} was deleted or moved while the run was writing to it"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"the folder {folder} can no longer be written"
        if shutil.disk_usage(folder).free < LEAST_BYTES:
            return f"the disk of {folder} is full: free some room"
    return None


def mend_lines(path: Path, step: int) -> None:
    """Keep the records up to `step` of a file of JSON lines that a run after `step` continues.

    Others, among them a line that a kill cut off, move to `<name>.replaced.jsonl`: these steps are trained again.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _counts(line, step)]
    if len(kept) == len(lines):
        return
    with path.with_suffix(".replaced.jsonl").open("ab") as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for line in lines if not _counts(line, step))
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_bytes(b"".join(kept))
    os.replace(whole, path)


def _counts(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and 0 <= record["step"] <= step and step > 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
