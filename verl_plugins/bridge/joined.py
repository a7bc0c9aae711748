"""What plugins log in the actor: one number per key and update, whatever each micro-batch and each rank has logged.

verl wants the same keys, equally often, from every rank, and averages sums over ranks. A method logs where it has
something to say: only micro-batches with tokens, only ranks where something was chosen. So its metrics are gathered
here and given to verl at the end of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_plugins.errors import DataError, nearest

REDUCTIONS: Mapping[str, Callable[..., Any]] = {"mean": np.mean, "sum": np.sum, "min": np.min, "max": np.max}
OVER_MINI_BATCHES = {"mean": "mean", "sum": "mean", "min": "min", "max": "max"}
"""Mini-batches are updates of their own: what is counted in each is averaged over them."""


class JoinedMetrics:
    """Metrics of one actor worker, joined over micro-batches and ranks per mini-batch, then over mini-batches."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[str, list[float]]] = {}
        self._joined: dict[str, tuple[str, list[float]]] = {}

    def add(self, key: str, value: float | Tensor, reduce: str) -> None:
        """Note one value.

        Raises:
            DataError: `reduce` is unknown or was another one before, or `value` is not one number.
        """
        if reduce not in REDUCTIONS:
            raise DataError(f"metric {key!r} is logged with reduce={reduce!r}{nearest(reduce, REDUCTIONS)}")
        before, values = self._logged.get(key, (reduce, []))
        if before != reduce:
            raise DataError(f"metric {key!r} is logged with reduce={before!r} and with reduce={reduce!r}: choose one")
        try:
            values.append(float(value))
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"metric {key!r} is logged as {value!r}: it must be one number") from None
        self._logged[key] = reduce, values

    def close_mini_batch(self, group: Any = None) -> None:
        """Join what the ranks of `group` (None: this one alone) have logged since the last call; a collective call."""
        everyone = [logged := self.leave()]
        if group is not None and torch.distributed.get_world_size(group) > 1:
            everyone = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(everyone, logged, group=group)
        self.join(everyone)

    def leave(self) -> dict[str, tuple[str, list[float]]]:
        """What was logged since the last call, not joined: key -> how to reduce, values."""
        logged, self._logged = self._logged, {}
        return logged

    def join(self, everyone: Sequence[Mapping[str, tuple[str, list[float]]]]) -> None:
        """Reduce what several ranks have logged in one mini-batch."""
        for key in dict.fromkeys(key for own in everyone for key in own):
            found = [own[key] for own in everyone if key in own]
            reduce, values = found[0][0], [value for _, values in found for value in values]
            _, joined = self._joined.setdefault(key, (OVER_MINI_BATCHES[reduce], []))
            joined.append(float(REDUCTIONS[reduce](values)))

    def take(self) -> dict[str, tuple[str, list[float]]]:
        """Key -> how to reduce over mini-batches, and a value of each that has one; everything since the last call."""
        joined, self._joined = self._joined, {}
        return joined
