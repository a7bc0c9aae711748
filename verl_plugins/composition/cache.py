"""Where models and tasks that are made once are kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "VERL_PLUGINS_CACHE"


def cache_folder() -> Path:
    """$VERL_PLUGINS_CACHE, or a folder in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or home / "verl_plugins")
