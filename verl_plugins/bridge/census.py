"""Every process of a run says at start which code it has, and stops the run when that is not the driver's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from verl_plugins import manager
from verl_plugins.errors import CompositionError
from verl_plugins.identity import difference, identify
from verl_plugins.manager import Plugins

DIGESTS_VARIABLE = "VERL_PLUGINS_DIGESTS"
"""The driver's digests as JSON, in the environment of every process of the run."""


def announce(section: Mapping[str, Any]) -> dict[str, str]:
    """The driver's digests, as the environment variable its workers compare themselves with."""
    return {DIGESTS_VARIABLE: json.dumps(identify(section, "driver").digests)}


def build(section: Mapping[str, Any], role: str) -> Plugins:
    """The plugins of a process of kind `role`, which is reported in the log.

    Raises:
        CompositionError: this process has another version of the package or of a plugin than the driver.
    """
    own = identify(section, role)
    print(f"verl_plugins: {own}", flush=True)
    if sentence := difference(json.loads(os.environ[DIGESTS_VARIABLE]), own):
        raise CompositionError(sentence)
    return manager.build(section)
