"""Averages of groups in which rows weigh differently: what a baseline of least variance is made of."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to the sum of the weights."""
TAIL = 0.05
"""Share of the weights at each end that a winsorised mean pulls in."""


def average(values: Tensor, weights: Tensor, index: Tensor, agg_mode: str = "mean") -> Tensor:
    """[rows] weighted mean, median or winsorised mean (5 % at each end) of the row's group, in float64.

    values, weights [rows]; index [rows] numbers of the groups, from 0.
    """
    values, weights = values.double(), weights.double()
    if agg_mode == "median":
        return _quantile(values, weights, index, 0.5)
    if agg_mode == "winsorized_mean":
        low, high = (_quantile(values, weights, index, share) for share in (TAIL, 1 - TAIL))
        values = values.clamp(min=low, max=high)
    return total(weights * values, index) / (total(weights, index) + EPSILON)


def total(values: Tensor, index: Tensor) -> Tensor:
    """[rows] sum over the row's group."""
    sums = values.new_zeros(int(index.max()) + 1 if len(index) else 0)
    return sums.index_add_(0, index, values)[index]


def _quantile(values: Tensor, weights: Tensor, index: Tensor, share: float) -> Tensor:
    """[rows] least value of the group up to which the weights reach `share` of theirs; 0 where nothing weighs."""
    whole = total(weights, index)
    shares = torch.where(whole > 0, weights / whole.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(index[order], stable=True)]
    group, running = index[order], shares[order].cumsum(0)
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    start = (running - shares[order])[first][first.cumsum(0) - 1]
    reached = running - start >= share - 1e-12
    place = torch.where(reached, torch.arange(len(order)), len(order) - 1)
    at = torch.full((int(index.max()) + 1,), len(order) - 1) if len(index) else index
    at = at.scatter_reduce(0, group, place, "amin")[index]
    return torch.where(whole > 0, values[order][at], 0.0)
