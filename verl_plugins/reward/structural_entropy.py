"""Rewards for failures: ranked within their group by structural entropy (SERR).

R3, arXiv:2601.19620, section 3.2. Over the entropies H of a response's L tokens:

    peak = mean of the k largest H, k = max(1, floor(p L));  mean = mean of all H
    i dominates j if peak_i > peak_j and mean_i < mean_j;  S_i = how many others of its group i dominates
    reward at place k of N, by descending S: r_max (1 - k/(N-1))

Few pairs dominate, since peak and mean rise together: ties are the rule, and share the mean of their rungs (ours).
Degenerate cases: a single ranked answer gets 0 (or r_max, by choice); an empty response must not be ranked.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verl_plugins.groups import Groups


def structural_entropy(entropy: Tensor, mask: Tensor, top_ratio: float) -> tuple[Tensor, Tensor]:
    """[B,T] entropies and mask -> [B] mean of the largest max(1, floor(top_ratio L)) of L entropies, and of all L."""
    lengths = mask.sum(1)
    largest = entropy.double().masked_fill(~mask, -torch.inf).sort(1, descending=True).values
    count = (top_ratio * lengths.double()).floor().clamp(min=1).long()
    among = torch.arange(mask.shape[1]) < count[:, None]
    every = entropy.double().masked_fill(~mask, 0).sum(1) / lengths.clamp(min=1)
    return largest.masked_fill(~(among & mask.any(1, keepdim=True)), 0).sum(1) / count, every


def dominance(peak: Tensor, mean: Tensor, groups: Groups) -> Tensor:
    """[B] how many counted rows of the group have a lower peak and a higher mean; 0 for rows that do not count."""
    counted = torch.ones(len(peak), dtype=torch.bool) if groups.counted is None else groups.counted
    rows = pd.DataFrame({"group": groups.index, "row": np.arange(len(peak)), "peak": peak, "mean": mean})[
        counted.numpy()
    ]
    pairs = rows.merge(rows, on="group", suffixes=("", "_other"))
    above = pairs["row"][(pairs["peak"] > pairs["peak_other"]) & (pairs["mean"] < pairs["mean_other"])]
    return torch.from_numpy(np.bincount(above, minlength=len(peak)))


def ranking_reward(
    dominated: Tensor, groups: Groups, r_max: float, ties: str = "average", singleton: str = "zero"
) -> Tensor:
    """[B] S -> r_max (1 - place/(N-1)), places by descending S among the N counted rows of the group, 0 for the others.

    Args:
        dominated: [B] how many others a row dominates.
        groups: the ranked rows are the counted ones.
        ties: "average" shares the rungs of equal rows, "stable" gives the first of them in row order the highest.
        singleton: what the only ranked row gets: "zero" or "max" (r_max).
    """
    order = dominated.double()
    if ties == "stable":
        order = order * len(order) - torch.arange(len(order))
    count = groups.count()
    reward = r_max * groups.rank(order) / (count - 1).clamp(min=1)
    reward[count == 1] = r_max if singleton == "max" else 0.0
    return reward if groups.counted is None else reward * groups.counted
