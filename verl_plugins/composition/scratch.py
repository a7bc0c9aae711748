"""The temporary folder of one run on one machine, and what killed runs left of theirs.

Everything temporary of a run is in one folder, which is removed at its end. The folder names its owner (process id and
start time) and the owner holds a lock on it as long as it lives; so another run, or `doctor --clean`, can tell a folder
whose owner is gone from one in use, also where process ids mean something else (containers that share the folder).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from verl_plugins.errors import RunError

PREFIX = "vp_"
OWNER = "owner.json"
LONGEST = 31
"""Characters of the folder around ours: Ray puts Unix sockets 76 characters below it, of 107 that one may have."""


COMPILED = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder of this process's own; Python's `tempfile` points into it, here and in child processes."""
    place = _place()
    for folder in leftovers(place):
        remove(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    lock = _own(folder)
    inside = folder / "t"
    inside.mkdir(mode=0o700)
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(inside)
    try:
        yield folder
    finally:
        tempfile.tempdir = before[1]
        os.environ.pop("TMPDIR")
        if before[0] is not None:
            os.environ["TMPDIR"] = before[0]
        remove(folder)
        os.close(lock)


@contextmanager
def no_folder_of_the_compiler() -> Iterator[None]:
    """While something imports torch's compiler, which at once makes a folder for what it will compile, and names it.

    What a run compiles goes where the run has it; nobody looks at a folder that is empty.
    """
    named = COMPILED in os.environ
    try:
        yield
    finally:
        if not named and (folder := os.environ.pop(COMPILED, None)):
            with contextlib.suppress(OSError):  # it holds what others have compiled
                os.rmdir(folder)


def leftovers(place: Path | None = None) -> list[Path]:
    """Folders of runs of this user whose owner is gone."""
    places = {place} if place else set(_places())
    found = [folder for one in places for folder in one.glob(f"{PREFIX}*") if (folder / OWNER).is_file()]
    return sorted(folder for folder in found if folder.lstat().st_uid == os.getuid() and not _alive(folder / OWNER))


def clean() -> list[Path]:
    """Remove what killed runs left; returns the folders."""
    gone = leftovers()
    for folder in gone:
        remove(folder)
    return gone


def remove(folder: Path) -> None:
    """Remove the temporary folder of a run that has ended.

    Who owned it goes last: what cannot be removed now, because a process is still writing there, the next run can.
    """
    with contextlib.suppress(OSError):
        for inside in folder.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside, ignore_errors=True)
            elif inside.name != OWNER:
                inside.unlink(missing_ok=True)
        if [inside.name for inside in folder.iterdir()] in ([], [OWNER]):
            shutil.rmtree(folder)


def _own(folder: Path) -> int:
    """Write whose folder it is; returns the descriptor that holds the lock."""
    descriptor = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}).encode())
    return descriptor


def _alive(owner: Path) -> bool:
    """Whether the process that a folder belongs to still runs; in doubt it does."""
    try:
        with owner.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            told = json.load(file)
        return abs(psutil.Process(told["pid"]).create_time() - told["started"]) < 1
    except psutil.NoSuchProcess:
        return False
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return True


def _places() -> Iterator[Path]:
    for name in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        place = Path(name)
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            yield place


def _place() -> Path:
    """The temporary folder of this machine, or where its path is too long for sockets the usual short one.

    Raises:
        RunError: there is none that can be written.
    """
    for place in _places():
        if len(os.fsencode(place)) <= LONGEST and " " not in str(place):
            return place
    raise RunError(
        f"the temporary folder {tempfile.gettempdir()} has a path of more than {LONGEST} characters, too long for "
        "sockets, and none of /tmp, /var/tmp and /dev/shm can be written: set TMPDIR to a folder with a shorter path"
    )
