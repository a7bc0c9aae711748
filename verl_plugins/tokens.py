"""What the loss sees of the data: `Tokens`, one micro-batch in an actor worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_plugins.errors import DataError
from verl_plugins.fields import version


def row_number(key: str) -> int:
    """A positive number of 63 bits for the key of a row: who the row is, in the loss."""
    return (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1) | 1


class Tokens:
    """One micro-batch in the loss, in an actor worker; [rows,T] tensors, T the longest response of the micro-batch.

    Rows of the synthetic padding are present here with an empty `response_mask`.
    """

    def __init__(
        self,
        *,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        config: Any,
        entropy: Tensor | None = None,
        extra: Callable[[str], Any] | None = None,
        log: Callable[[str, Mapping[str, float], str], None] | None = None,
        step: int = 0,
        mini_batch: int = 0,
        micro_batch: int = 0,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        owner: str = "",
    ) -> None:
        self.log_probs = log_probs
        """[rows,T] log-probs under the policy being trained, with gradient."""
        self.old_log_probs = old_log_probs
        """[rows,T] log-probs under the policy before the step."""
        self.advantages = advantages
        """[rows,T]"""
        self.response_mask = response_mask.bool()
        """[rows,T] bool: tokens that count."""
        self.entropy = entropy
        """[rows,T] entropy under the policy being trained, with gradient; None unless `current_entropy` is needed."""
        self.config = config
        """verl's actor settings: clip_ratio_low, clip_ratio_high, clip_ratio_c, loss_agg_mode, …"""
        self.step, self.mini_batch, self.micro_batch = step, mini_batch, micro_batch
        self._extra, self._log, self._seed, self._owner = extra, log, seed, owner
        self._given = {name: version(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        self._rows = [micro_batch] if rows is None else sorted(row for row in rows if row)  # 0 in padding rows

    def scoped(self, owner: str) -> Tokens:
        """The same tokens in the hands of plugin `owner`: its metrics and random numbers are its own."""
        other = object.__new__(Tokens)
        other.__dict__.update(self.__dict__, _owner=owner)
        return other

    def changed_in_place(self) -> list[str]:
        """Names of the tensors that were written into: others read them, too."""
        return [name for name, known in self._given.items() if version(getattr(self, name)) != known]

    def extra(self, name: str) -> Any:
        """Another field of the queue: [rows,T] or [rows] tensor, or a list per row (old entropy is `entropy`)."""
        if self._extra is None:
            raise DataError(f"field {name!r} is not in the micro-batch")
        return self._extra(name)

    def log(self, metrics: Mapping[str, float], reduce: str = "mean") -> None:
        """Add metrics as `plugins/<plugin>/<key>`; `reduce` over micro-batches and ranks: mean, sum, min or max.

        A key need not be logged by every micro-batch and rank: the mean is that of the values there are. Over the
        mini-batches of a step, min and max stay what they are, means and sums are averaged.
        """
        if self._log is not None:
            self._log(self._owner, metrics, reduce)

    def rng(self, name: str = "") -> torch.Generator:
        """A CPU generator of its own for (seed, step, mini-batch, rows of the micro-batch, plugin, name).

        Every process that holds these rows (tensor, sequence and pipeline parallel ranks) draws the same from it.
        """
        entropy = [self._seed, self.step, self.mini_batch, *self._rows, *f"{self._owner}/{name}".encode()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator().manual_seed(seed)
