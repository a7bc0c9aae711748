"""Statistics per group, broadcast back to rows, without a Python loop over rows or groups.

Notation: B rows, G groups. A group is the responses of one draw of a prompt (one `uid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

RUNS_FROM = 4096
"""Rows from which looking for runs of equal labels pays off."""


class Groups:
    """The partition of B rows into groups.

    Every statistic takes values [B], is computed over the counted rows of each group and comes back as [B], one value
    per row of the group. A group without counted rows gives 0. Where all counted values of a group are equal, the mean
    is that very value, and the centred values and the deviation are exactly 0: no rounding makes such a group non-zero.
    Computed in float64 on the CPU; floating values keep their dtype, of integers mean and std are float32.

    Args:
        labels: [B] group of each row: strings or integers, in any order.
        counted: [B] bool, rows that count; None counts all. Sessions with several outputs count their last one.
    """

    def __init__(self, labels: Sequence | np.ndarray | Tensor, counted: Tensor | None = None) -> None:
        if isinstance(labels, Tensor):
            labels = labels.numpy()
        elif not isinstance(labels, np.ndarray):
            labels = np.asarray(labels, dtype=object)
        self._codes, self.labels = _factorize(labels)
        self.index = torch.from_numpy(self._codes)
        """[B] group number of each row, in order of first appearance; `labels` [G] has the label of each group."""
        if counted is not None and counted.shape != self.index.shape:
            raise ValueError(f"counted has shape {tuple(counted.shape)}, labels have {tuple(self.index.shape)}")
        self.counted = None if counted is None or bool(counted.all()) else counted.bool()
        self._counted = slice(None) if self.counted is None else self.counted.numpy()
        self._rows = self._codes[self._counted]
        """[counted rows] group number of each row that counts."""
        self._size = np.bincount(self._rows, minlength=len(self))

    def __len__(self) -> int:
        return len(self.labels)

    def count(self) -> Tensor:
        """[B] int64: how many counted rows the group has."""
        return torch.from_numpy(self._size[self._codes])

    def sum(self, values: Tensor) -> Tensor:
        """[B] sum over the group; of flags, how many rows have it."""
        return self._spread(self._sum(self._pick(values)), values.dtype if values.is_floating_point() else torch.int64)

    def mean(self, values: Tensor) -> Tensor:
        """[B] mean over the group; the common value itself where all are equal."""
        member, _, shift = self._from_member(self._pick(values))
        return self._spread(member + shift, _floating(values))

    def std(self, values: Tensor, unbiased: bool = True) -> Tensor:
        """[B] standard deviation; exactly 0 where all are equal and for groups of one."""
        return self.moments(values, unbiased)[1]

    def moments(self, values: Tensor, unbiased: bool = True) -> tuple[Tensor, Tensor]:
        """[B] mean and [B] standard deviation, for the price of the latter."""
        member, centred, shift = self._from_member(self._pick(values))
        centred -= shift[self._rows]
        centred *= centred
        variance = self._sum(centred) / np.maximum(self._size - int(unbiased), 1)
        dtype = _floating(values)
        return self._spread(member + shift, dtype), self._spread(np.sqrt(variance), dtype)

    def min(self, values: Tensor) -> Tensor:
        """[B] smallest value of the group."""
        return self._ordered(values, np.zeros_like(self._size))

    def max(self, values: Tensor) -> Tensor:
        """[B] largest value of the group."""
        return self._ordered(values, self._size - 1)

    def median(self, values: Tensor) -> Tensor:
        """[B] lower median (as torch.median): always a value that occurs in the group."""
        return self._ordered(values, (self._size - 1) // 2)

    def rank(self, values: Tensor) -> Tensor:
        """[B] float32: how many counted values of the group are smaller, plus half of the other equal ones.

        0 for the smallest of distinct values, count-1 for the largest; ties share their average. Uncounted rows get
        their group's place among the counted values in the same way.
        """
        counted = np.ones(len(self.index)) if self.counted is None else self.counted.numpy().astype(np.float64)
        ties = pd.factorize(self._array(values), sort=True)[0] + self._codes * len(values)
        ties, tie = np.unique(ties, return_inverse=True)
        equal = np.bincount(tie, counted, minlength=len(ties))
        smaller = (np.cumsum(equal) - equal)[tie] - (np.cumsum(self._size) - self._size)[self._codes]
        return torch.from_numpy(smaller + (equal[tie] - counted) / 2).float()

    def any(self, flags: Tensor) -> Tensor:
        """[B] bool: whether any counted row of the group has the flag."""
        return self._spread(self._sum(self._pick(flags)) > 0, torch.bool)

    def all(self, flags: Tensor) -> Tensor:
        """[B] bool: whether every counted row of the group has the flag (false for a group without counted rows)."""
        return self._spread((self._sum(self._pick(flags)) == self._size) & (self._size > 0), torch.bool)

    def first(self, flags: Tensor) -> Tensor:
        """[B] bool: true on one counted row per group, the first in row order that has the flag."""
        flags = flags.bool() if self.counted is None else flags.bool() & self.counted
        rows = np.flatnonzero(flags.numpy())
        found = torch.zeros(len(flags), dtype=torch.bool)
        found[rows[np.unique(self._codes[rows], return_index=True)[1]]] = True
        return found

    def per_group(self, values: Tensor) -> Tensor:
        """[G] in the order of `labels`, from values [B] that are the same over each group, as statistics are."""
        found = np.empty(len(self), dtype=values.numpy().dtype)
        found[self._codes] = values.numpy()
        return torch.from_numpy(found)

    # Below, values are float64 arrays: [counted rows], or [G] once reduced.

    def _array(self, values: Tensor) -> np.ndarray:
        if values.shape != self.index.shape:
            raise ValueError(f"a group statistic takes one value per row: {len(self.index)}, got {tuple(values.shape)}")
        return values.detach().double().numpy()

    def _pick(self, values: Tensor) -> np.ndarray:
        return self._array(values)[self._counted]

    def _spread(self, per_group: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(per_group).to(dtype).index_select(0, self.index)

    def _sum(self, picked: np.ndarray) -> np.ndarray:
        return np.bincount(self._rows, picked, minlength=len(self))

    def _from_member(self, picked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[G] one member of each group, [counted rows] the values from it, [G] their mean; 0 where all are equal."""
        member = np.zeros(len(self))
        member[self._rows] = picked
        centred = picked - member[self._rows]
        return member, centred, self._sum(centred) / np.maximum(self._size, 1)

    @cached_property
    def _by_group(self) -> np.ndarray:
        """[counted rows] their order when sorted by group."""
        narrow = self._rows.astype(np.uint16) if len(self) < 1 << 16 else self._rows  # numpy sorts 16 bits by radix
        return np.argsort(narrow, kind="stable")

    def _ordered(self, values: Tensor, place: np.ndarray) -> Tensor:
        """[B] the group's value at `place` [G] in ascending order; 0 for a group without counted rows."""
        grouped, largest = self._pick(values)[self._by_group], int(self._size.max(initial=1))
        if len(grouped) == len(self) * largest:
            table = grouped.reshape(-1, largest)
        else:
            table = np.full((len(self), largest), np.inf)
            table[np.arange(largest) < self._size[:, None]] = grouped
        table.sort(axis=1)
        found = table[np.arange(len(self)), place]
        if self.counted is not None:
            found[self._size == 0] = 0
        return self._spread(found, values.dtype)


def _floating(values: Tensor) -> torch.dtype:
    """What mean and std of these come in."""
    return values.dtype if values.is_floating_point() else torch.float32


def _factorize(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B] labels -> [B] int64 codes in order of first appearance, [G] labels; faster where equal labels are neighbours.

    The bridge sorts a step's rows by key, so they usually are; then only the first row of each run is looked up.
    """
    if len(labels) < RUNS_FROM or not (labels[:1] == labels[1:2]).all():
        codes, uniques = pd.factorize(labels)
        return codes.astype(np.int64, copy=False), uniques
    starts = np.concatenate([[True], (labels[1:] != labels[:-1]).astype(bool)])
    codes, uniques = pd.factorize(labels[starts])
    return codes.astype(np.int64, copy=False)[np.cumsum(starts) - 1], uniques
