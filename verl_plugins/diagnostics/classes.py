"""Features by class: counts, means, spread and the quotient of within-class to between-class variance.

What the diagnostics of neural collapse share (Wu & Papyan, arXiv 2405.17767; Tirer et al., arXiv 2210.16658). For class
c with n_c features x: mean mu_c, spread v_c = sum |x - mu_c|^2 / n_c. The global mean mu_G is the unweighted mean of
the classes' means. Degenerate cases: fewer than two classes, or means that are all the same, have no quotient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """K classes, by ascending id; features may have further dimensions [...] before the last."""

    ids: Tensor
    """[K] int64."""
    counts: Tensor
    """[K] float64."""
    means: Tensor
    """[K, ..., D] float64."""
    spread: Tensor
    """[K, ...] float64."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def centred(self) -> Tensor:
        """[K, ..., D] means less the unweighted mean of them."""
        return self.means - self.means.mean(0)

    def where(self, chosen: Tensor) -> Classes:
        """Some of them: chosen [K] bool."""
        return Classes(self.ids[chosen], self.counts[chosen], self.means[chosen], self.spread[chosen])

    def selected(self, at_least: int = 1, below: int | None = None, most: int | None = None) -> Classes:
        """Those with at_least <= n_c < below, and of these the `most` frequent; of equally frequent ones the first."""
        chosen = self.counts >= at_least
        if below is not None:
            chosen &= self.counts < below
        if most is not None:
            order = torch.where(chosen, self.counts, -1.0).argsort(descending=True, stable=True)
            chosen &= torch.zeros_like(chosen).index_fill_(0, order[:most], True)
        return self.where(chosen)


def by_class(features: Tensor, labels: Tensor) -> Classes:
    """All classes of features [N, ..., D] with labels [N]."""
    ids, index, counts = labels.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    per_class = (len(ids), *features.shape[1:])
    over = counts.view(-1, *[1] * (features.dim() - 1))
    means = features.new_zeros(per_class).index_add_(0, index, features) / over.to(features.dtype)
    apart = (features - means[index]).square().sum(-1)
    spread = features.new_zeros(per_class[:-1]).index_add_(0, index, apart).double() / over[..., 0]
    return Classes(ids, counts, means.double(), spread)


def quotient(classes: Classes) -> Tensor:
    """[...] trace(Sigma_W) / trace(Sigma_B), of each of the dimensions between; NaN where it is undefined."""
    weights = classes.counts / classes.counts.sum()
    within = torch.einsum("k,k...->...", weights, classes.spread)
    between = classes.centred.square().sum(-1).mean(0)
    defined = (between > 0) & (len(classes) >= 2)
    return torch.where(defined, within / torch.where(defined, between, 1.0), torch.nan)
