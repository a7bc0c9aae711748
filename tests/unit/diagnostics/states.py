"""Batches with hidden states for tests of the diagnostics."""

from __future__ import annotations

from typing import Any

import torch

from verl_plugins import Batch, Hidden


def hidden_of(features: torch.Tensor, row: list[int], pooled: torch.Tensor, **more: Any) -> Hidden:
    """Features [N, layers, D] of rows in ascending order, pooled [B, layers, D]."""
    rows = torch.tensor(row)
    draw = torch.tensor([row[:place].count(one) for place, one in enumerate(row)])
    known = {"label": torch.zeros(len(row), dtype=torch.int64), **more}
    layers = tuple(range(1, features.shape[1] + 1))
    return Hidden(layers, features, rows, draw, draw, pooled=pooled, **known)


def batch_of(hidden: Hidden | None, uid: list[str], scores: list[float], **more: Any) -> Batch:
    """One generated token for each row, unless a mask is given."""
    mask = more.pop("response_mask", torch.ones(len(uid), 1))
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.tensor(scores)
    return Batch.from_tensors(uid=uid, rm_scores=rewards, response_mask=mask, hidden_states=hidden, **more)
