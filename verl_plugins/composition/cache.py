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
