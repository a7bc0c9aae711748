"""What imbalanced tokens should look like: orthogonal class means, short features of frequent tokens, lost rare ones.

Dang, Tran, Osher, Tran-The, Ho, Nguyen, Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data, ICML
2023, arXiv 2301.00437. The paper's is the claim of orthogonal class means whose lengths depend on the classes' sizes,
for squared error without bias; the formulas are derived here (see the lab of this recipe), its theorems were not read.
For M linear layers with decays lw_m, feature decay lh, n_k of N samples in class k and
C_k = (lw_1 ... lw_M lh n_k)^(1/(M+1)):

    p_k in [0, 1] minimises n_k/(2N) (p - 1)^2 + (M+1)/2 C_k p^(2/(M+1));  M = 1: p_k = max(0, 1 - N sqrt(lw lh / n_k))
    t_k = C_k p_k^(2/(M+1)), |feature| = sqrt(t_k / (lh n_k)), singular value of layer m = sqrt(t_k / lw_m)

So for p near 1 and M = 1 |mu_k| goes as n_k^(-1/4) and |w_k| as n_k^(1/4). Measured on the tokens of a step, with the
features x and head rows w of `linguistic_collapse`: the cosines of class means, not centred since the head has no bias,
and the least-squares slopes of log |mu_c| and log |w_c| on log n_c.

What differs from GRPO: 1. Nothing in training: `observe` measures. 2. In steps that are due the pass for the old
log-probs also returns hidden states.

Degenerate cases. Fewer than three classes: no slope, no cosine. Classes of one size, or a mean of length 0: no slope.
p_k = 0 makes all lengths of the class 0; a class without samples has p_k = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from verl_plugins import Batch, Plugin, Run, Wish, hookimpl, setting
from verl_plugins.diagnostics.classes import Classes, by_class
from verl_plugins.diagnostics.linguistic_collapse import rows_of

ENOUGH = 3
"""Classes from which a slope says anything."""


@dataclass(frozen=True)
class Problem:
    """Samples per class, decay of each layer, decay of the features."""

    counts: tuple[int, ...]
    decays: tuple[float, ...]
    feature_decay: float


@dataclass(frozen=True)
class Optimum:
    """By class."""

    fit: Tensor
    """p [classes]: the response of the class's own output."""
    feature_norm: Tensor
    """Length of each feature [classes]."""
    singular_values: Tensor
    """Of each layer [classes, layers]."""
    objective: Tensor
    """Scalar."""


def fitted(share: Tensor, cost: Tensor, layers: int) -> Tensor:
    """p [classes] that minimises share/2 (p - 1)^2 + (M+1)/2 cost p^(2/(M+1)) for share n_k/N and cost C_k."""
    if layers == 1:
        return torch.where(share > 0, 1 - cost / share.clamp_min(1e-300), torch.zeros_like(share)).clamp_min(0)
    power = (1 - layers) / (1 + layers)
    best = torch.ones_like(share)
    for _ in range(200):
        slope = share * (best - 1) + cost * best**power
        bend = share + power * cost * best ** (power - 1)
        step = torch.where(bend > 0, slope / bend.clamp_min(1e-300), torch.full_like(best, torch.inf))
        best = (best - step.clamp_min(0)).clamp_min(0)
    gain = share / 2 - class_objective(best, share, cost, layers)
    return torch.where((best > 0) & (gain > 0), best, torch.zeros_like(best))


def class_objective(p: Tensor, share: Tensor, cost: Tensor, layers: int) -> Tensor:
    """The part of each class [classes] at response p."""
    return share / 2 * (p - 1).square() + (layers + 1) / 2 * cost * p ** (2 / (layers + 1))


def optimum(problem: Problem) -> Optimum:
    """The global minimum, by class.

    Raises:
        ValueError: a decay is not positive, so that lengths have no limit, or there is no sample.
    """
    counts = torch.tensor(problem.counts, dtype=torch.float64)
    decays = torch.tensor(problem.decays, dtype=torch.float64)
    if not (float(decays.min()) > 0 and problem.feature_decay > 0 and float(counts.sum()) > 0):
        raise ValueError("decays must be positive, and there must be samples")
    layers = len(problem.decays)
    share = counts / counts.sum()
    cost = (decays.prod() * problem.feature_decay * counts) ** (1 / (layers + 1))
    p = fitted(share, cost, layers)
    term = cost * p ** (2 / (layers + 1))
    return Optimum(
        fit=p,
        feature_norm=(term / (problem.feature_decay * counts.clamp_min(1))).sqrt(),
        singular_values=(term[:, None] / decays).sqrt(),
        objective=class_objective(p, share, cost, layers).sum(),
    )


def frame_errors(means: Tensor) -> tuple[float, float]:
    """Root mean square and largest size of the cosines of different class means [K,D]."""
    i, j = torch.triu_indices(len(means), len(means), 1)
    unit = normalize(means, dim=1)
    cosines = (unit @ unit.T)[i, j]
    return float(cosines.square().mean().sqrt()), float(cosines.abs().max())


def slope(counts: Tensor, lengths: Tensor) -> float:
    """Of log lengths on log counts, [K] each, by least squares; NaN where it is undefined."""
    x, y = counts.log(), lengths.log()
    centred = x - x.mean()
    return float((centred * y).sum() / centred.square().sum()) if bool((counts != counts[0]).any()) else torch.nan


class NCDeepLinear(Plugin):
    """Measures how far class means of tokens are from orthogonal, and how lengths go with the tokens' frequency."""

    name = "nc_deep_linear"
    paper = "arXiv:2301.00437"
    needs = frozenset({"hidden_states"})

    @dataclass
    class Config:
        freq: int = setting(10, "steps between two measurements, from the first step on", ge=1)
        tokens_per_response: int = setting(8, "generated tokens of each response that are looked at", ge=1)
        max_tokens: int = setting(16384, "tokens of a step that are looked at, at most", ge=1)
        min_per_class: int = setting(4, "tokens from which a class counts", ge=1)
        max_classes: int = setting(1024, "classes of tokens, the most frequent", ge=3)
        layers: int = setting(1, "M, of the model that predicts which classes vanish", ge=1)
        weight_decay: float | None = setting(None, "lw of each layer; none: the actor's optim.weight_decay", gt=0)
        feature_decay: float | None = setting(None, "N lh, the features' decay by sample; none: no prediction", gt=0)

    def hidden_wish(self) -> Wish:
        return Wish(tokens=self.config.tokens_per_response, every=self.config.freq, head_rows=True)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        hidden = self.hidden_wish().of(batch.hidden, run.step)
        if hidden is None:
            return
        chosen = hidden.first(self.config.max_tokens)
        observed = by_class(hidden.features[chosen, -1], hidden.label[chosen])
        if (lost := self._lost(run, observed)) is not None:
            run.log({"predicted_collapse": lost})
        classes = observed.selected(self.config.min_per_class, most=self.config.max_classes)
        run.log({"n_classes": len(classes)})
        if len(classes) < ENOUGH:
            return
        rms, largest = frame_errors(classes.means)
        run.log({"of_error": rms, "of_error_max": largest})
        head = rows_of(classes, hidden.label[chosen], hidden.head_row[chosen])
        slopes = slope(classes.counts, classes.means.norm(dim=1)), slope(classes.counts, head.double().norm(dim=1))
        if all(-torch.inf < value < torch.inf for value in slopes):
            run.log({"norm_slope_feature": slopes[0], "norm_slope_head": slopes[1]})

    def _lost(self, run: Run, observed: Classes) -> float | None:
        """Share of the observed tokens' classes that the model loses; None where it has no decay or no tokens."""
        decay = self.config.weight_decay
        decay = run.config.actor_rollout_ref.actor.optim.weight_decay if decay is None else decay
        if self.config.feature_decay is None or not decay > 0 or not len(observed):
            return None
        counts = observed.counts
        problem = Problem(
            tuple(map(int, counts)), (decay,) * self.config.layers, self.config.feature_decay / float(counts.sum())
        )
        return float((optimum(problem).fit == 0).double().mean())
