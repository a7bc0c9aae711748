"""Where models and tasks that are made once are kept, and how: whole, or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_plugins.errors import RunError

CACHE_VARIABLE = "VERL_PLUGINS_CACHE"
HASHES = "hashes.json"
"""What each file of a folder contained when it was written."""


def cache_folder() -> Path:
    """$VERL_PLUGINS_CACHE, or a folder in the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "verl_plugins"
    try:
        return Path.home() / ".cache" / "verl_plugins"
    except RuntimeError:  # neither HOME nor the user's entry in the list of users
        raise RunError(f"this user has no home folder for the cache: set {CACHE_VARIABLE} to a folder") from None


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` write a folder of the cache, unless it is there with every file as it was written.

    It appears under its name only when it is complete, so a kill leaves no half-made one. Of two processes at once one
    makes it and the other waits. A folder with a file that is not as it was written is made again.

    Raises:
        RunError: the folder is not there, and the cache cannot be written.
    """
    if whole(folder):
        return
    try:
        with _alone(folder):
            if not whole(folder):
                _make_in_place(folder, make)
    except OSError as error:
        raise RunError(
            f"the cache {folder.parent} cannot be written ({error.strerror or error}): set {CACHE_VARIABLE} to a "
            "folder that can"
        ) from error


def whole(folder: Path) -> bool:
    """Whether the folder is there with every file as it was written."""
    try:
        told = json.loads((folder / HASHES).read_text())
        there = _hashes(folder)
        return bool(told) and all(there.get(name) == value for name, value in told.items())
    except (OSError, ValueError, AttributeError):
        return False


def _make_in_place(folder: Path, make: Callable[[Path], None]) -> None:
    for old in folder.parent.glob(f".{folder.name}.*"):
        if old.is_dir():  # what a kill left: nobody else is at it
            shutil.rmtree(old, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        make(unfinished)
        (unfinished / HASHES).write_text(json.dumps(_hashes(unfinished), indent=1))
        if folder.exists():
            print(f"{folder} is damaged and was made again", file=sys.stderr)
            shutil.rmtree(folder)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process makes this folder; the lock ends with its process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def find_room_for_datasets() -> None:
    """Where `datasets`, through which verl reads files, keeps what it has read: in our cache if not in the user's own.

    Called before `datasets` is imported, which reads its variables then.

    Raises:
        RunError: the folder that the user has named for it cannot be written.
    """
    for name, below in (("HF_DATASETS_CACHE", ""), ("HF_HOME", "datasets")):
        if named := os.environ.get(name):
            if not _can_be_written(Path(named).expanduser() / below):
                raise RunError(f"{name}={named} cannot be written: set {name} to a folder where data can be kept")
            return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not _can_be_written(Path(base) / "huggingface" / "datasets"):
        os.environ["HF_DATASETS_CACHE"] = str(cache_folder() / "datasets")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
