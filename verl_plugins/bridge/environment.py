"""The environment variables of a run: what every one of its processes has as the driver has it."""

from __future__ import annotations

import os

from verl_plugins.bridge import RUN_VARIABLE
from verl_plugins.composition import manager, manifest

DIGESTS_VARIABLE = "VERL_PLUGINS_DIGESTS"
"""The driver's digests as JSON: which code the others must have."""
VARIABLES = (RUN_VARIABLE, "VERL_PLATFORM", "VERL_ENGINE_DEVICE", DIGESTS_VARIABLE)
VARIABLES += (manifest.ALLOW_VARIABLE, manifest.BLOCK_VARIABLE, manager.TRACE_VARIABLE)


def of_this_run() -> dict[str, str]:
    """Those that are set, with their values."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
