"""Rows that leave a step and rows that come to it: what `select_rows` may do, and what later stages see of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verl_plugins.errors import DataError
from verl_plugins.fields import Addition

if TYPE_CHECKING:
    from verl_plugins.batch import Batch
    from verl_plugins.replay import StoredRow


class SelectsRows:
    """Mixed into `Batch`; expects `keys`, `uid`, `session` and `_row_shaped`."""

    keys: list[str]
    uid: np.ndarray
    session: Tensor
    _row_shaped: Callable[[Any, str], None]

    def __init__(self, full: Batch | None) -> None:
        self._full = full
        self.dropped = torch.zeros(len(self.keys), dtype=torch.bool)
        """[B] rows that `drop` removed."""
        self.additions: list[Addition] = []
        """What `add` added and `bring_back` brought; rows of the later stages, not of this batch."""
        self.update_skipped = False
        """Whether `skip_update` was called."""

    def drop(self, rows: Tensor) -> None:
        """Leave rows [B] bool out of the rest of the step (`select_rows` only)."""
        self._row_shaped(rows, "drop")
        if rows.dim() != 1 or bool(((rows != 0) & (rows != 1)).any()):
            raise DataError(
                f"drop: {rows.dtype} {tuple(rows.shape)}, expected one flag per row, bool ({len(self.keys)},)"
            )
        self.dropped = self.dropped | rows.bool()
        if bool(self.dropped.all()) and not self.additions:
            raise DataError(f"select_rows dropped all {len(self.keys)} rows of the batch; at least one must remain")

    def add(
        self,
        like: int,
        response: np.ndarray,
        *,
        reward: float,
        correct: bool,
        rollout_log_probs: np.ndarray | None = None,
    ) -> None:
        """Train on a further response to the prompt of row `like`, in its group (`select_rows` only).

        Args:
            like: a row of this batch.
            response: [n] token ids, all of them the policy's.
            reward: its score.
            correct: its verdict.
            rollout_log_probs: [n] log-probs under the policy that generated it; needed where the rollout reports them.

        Raises:
            DataError: if there is no such row, the response is empty or the log-probs are not one per token.
        """
        if not 0 <= like < len(self.keys) or not len(response):
            raise DataError(
                f"add: row {like} of {len(self.keys)} and {len(response)} tokens; a row and a token are needed"
            )
        if rollout_log_probs is not None and len(rollout_log_probs) != len(response):
            raise DataError(f"add: {len(rollout_log_probs)} rollout_log_probs for {len(response)} tokens")
        if np.asarray(response).dtype.kind not in "iu" or np.min(response) < 0:
            raise DataError(
                f"add: the response is {response!r:.80}, expected token ids, which are whole numbers from 0 on"
            )
        if not math.isfinite(reward):
            raise DataError(f"add: the reward is {float(reward)}, expected a finite number")
        key = self._new_key(self.uid[like])
        new = Addition(key, int(like), response, float(reward), bool(correct), rollout_log_probs)
        self.additions = [*self.additions, new]

    def bring_back(self, rows: Sequence[StoredRow]) -> None:
        """Train on rows of earlier steps as well (`select_rows` only), each with the old log-probs it is stored with.

        A row keeps its uid and is a session of its own; given twice, it is two rows. What is put for the rows of this
        step and no number of `columns` has no value for it.

        Raises:
            DataError: a row has no token, or its log-probs are not one finite number per token.
        """
        like = min(range(len(self.keys)), key=self.keys.__getitem__)
        for row in rows:
            if not len(row.response) or len(row.old_log_probs) != len(row.response):
                raise DataError(
                    f"bring_back: a row of {row.uid} has {len(row.response)} tokens and {len(row.old_log_probs)} "
                    "old_log_probs; a token is needed, and a log-prob for each"
                )
            if not (np.isfinite(row.old_log_probs).all() and math.isfinite(row.reward)):
                raise DataError(f"bring_back: the reward or an old log-prob of a row of {row.uid} is no finite number")
        new = [
            Addition(self._new_key(row.uid), like, row.response, row.reward, row.correct, row.old_log_probs, row)
            for row in rows
        ]
        self.additions = [*self.additions, *new]

    def skip_update(self) -> None:
        """Leave the weights as they are in this step (`select_rows` only): its rows are looked at, not trained on."""
        self.update_skipped = True

    def _new_key(self, uid: str) -> str:
        """Of the next session of a draw."""
        session = self._next_session.get(uid, 0)
        self._next_session[uid] = session + 1
        return f"{uid}_{session}_0"

    @cached_property
    def _next_session(self) -> dict[str, int]:
        return pd.Series(self.session.numpy()).groupby(self.uid).max().add(1).to_dict()

    @property
    def full(self) -> Batch:
        """The batch as it was rolled out, before `select_rows` dropped or added rows (fields known by then)."""
        return self if self._full is None else self._full

    @cached_property
    def is_added(self) -> Tensor:
        """[B] bool: rows that `select_rows` added or brought back."""
        if self._full is None:
            return torch.zeros(len(self.keys), dtype=torch.bool)
        return self._rows_in_full >= len(self._full)

    @cached_property
    def _rows_in_full(self) -> Tensor:
        """[B] int64 place among the rows of `full` and what was added to them."""
        known = [*self._full.keys, *(addition.key for addition in self._full.additions)]
        return torch.from_numpy(pd.Index(known).get_indexer(self.keys))

    def from_full(self, values: Tensor) -> Tensor:
        """Values [B of `full`] of this batch's rows, [B]; an added row has the value of the row it was added like.

        A row that was brought back from an earlier step has 0.
        """
        if self._full is None:
            return values
        additions = self._full.additions
        like = torch.tensor([len(values) if new.past else new.like for new in additions], dtype=torch.int64)
        known = torch.cat([values, values.new_zeros(1)])
        return torch.cat([values, known[like]])[self._rows_in_full]
