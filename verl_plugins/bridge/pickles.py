"""What loading verl's files of a checkpoint would run, found without loading them.

verl loads them with `torch.load(…, weights_only=False)`, which calls whatever a file names: weights, optimiser, random
numbers and the place in the data need tensors, numpy arrays and nothing else.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

STATE = re.compile(
    r"numpy\.(ndarray|dtype|(_core|core)\.multiarray\.(_reconstruct|scalar)|dtypes\.\w+DType)"
    r"|torch\.distributed\.(tensor|device_mesh|_shard)\.([a-z_]+\.)*_?[A-Z]\w*"
    r"|torch\.distributed\.remote_device\._remote_device"
)
"""What state is made of beside what torch itself takes for safe: numpy's random state, tensors in shards."""


def foreign(path: Path) -> str | None:
    """What is wrong with a file that is to be unpickled: it names what is no state, or is not of `torch.save`."""
    try:
        names = [name for name in get_unsafe_globals_in_checkpoint(path) if not STATE.fullmatch(name)]
    except (ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError):
        return "is not what torch.save writes"
    return f"would run {min(names)} when it is loaded, and state has no use for that" if names else None
