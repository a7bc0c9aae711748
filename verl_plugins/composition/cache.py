"""Where models and tasks that are made once are kept."""

from __future__ import annotations

import os
from pathlib import Path

from verl_plugins.errors import RunError

CACHE_VARIABLE = "VERL_PLUGINS_CACHE"


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
