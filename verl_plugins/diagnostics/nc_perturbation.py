"""Depth-wise variability: from which layer on the policy's states of one class lie close together.

Tirer, Huang, Niles-Weed, Perturbation Analysis of Neural Collapse, ICML 2023, arXiv 2210.16658. A layer can move what
comes in only a little; the paper models it as features H that stay near those of the layer before, and shows that the
within-class variability falls from layer to layer if layers act like its flow (the lab of this recipe). Of each layer

    NC1_l = trace(Sigma_W) / trace(Sigma_B)          ratio_l = NC1_l / NC1_(l-1)

with the covariances within and between classes (`verl_plugins.diagnostics.classes`). Classes are prompts, with the mean
state of each response (`uid`, ours), or tokens, with the state that predicts them (`token`).

What differs from GRPO: 1. Nothing in training: `observe` measures. 2. In steps that are due the pass for the old
log-probs also returns the states of every so many layers.

Degenerate cases. Fewer than two classes, or means of a layer that are all the same: its quotient is left out. One
layer: no ratio. A quotient of 0: no ratio to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verl_plugins import Batch, Hidden, Plugin, Run, Wish, hookimpl, setting
from verl_plugins.diagnostics.classes import by_class, quotient


class DepthNC1(NamedTuple):
    """By layer; NaN where it is undefined."""

    quotient: Tensor
    """[layers]."""
    ratio: Tensor
    """[layers - 1] of each layer to the one before it."""


def depth_nc1(features: Tensor, labels: Tensor, at_least: int = 1) -> DepthNC1:
    """Features [N, layers, D], labels [N]; classes with fewer than `at_least` of them are left out."""
    values = quotient(by_class(features, labels).selected(at_least))
    before = values[:-1]
    return DepthNC1(values, torch.where(before > 0, values[1:] / before, torch.nan))


class NCPerturbation(Plugin):
    """Measures the within-class variability of hidden states layer by layer."""

    name = "nc_perturbation"
    paper = "arXiv:2210.16658"
    needs = frozenset({"hidden_states"})

    @dataclass
    class Config:
        labels: str = setting("uid", "classes: prompts (uid) or tokens", choices=("uid", "token"))
        freq: int = setting(10, "steps between two measurements, from the first step on", ge=1)
        layer_step: int = setting(4, "every so many layers, and the last", ge=1)
        tokens_per_response: int = setting(2, "of each response, for the classes token", ge=1)
        min_per_class: int = setting(2, "responses, or tokens, from which a class counts", ge=1)

    def hidden_wish(self) -> Wish:
        tokens = self.config.tokens_per_response if self.config.labels == "token" else 0
        return Wish(tokens=tokens, every=self.config.freq, layer_step=self.config.layer_step)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        hidden = self.hidden_wish().of(batch.hidden, run.step)
        if hidden is None:
            return
        found = depth_nc1(*self._samples(batch, hidden), self.config.min_per_class)
        of_layers = zip(hidden.layers, found.quotient.tolist(), strict=True)
        run.log({f"quotient_layer_{layer}": value for layer, value in of_layers if value == value})
        ratio = found.ratio[found.ratio.isfinite()]
        if len(ratio):
            lowest = int(found.ratio.nan_to_num(torch.inf).argmin())
            run.log({"fraction_decreasing": float((ratio < 1).double().mean()), "min_ratio": float(ratio.min())})
            run.log({"min_ratio_layer": hidden.layers[lowest + 1]})

    def _samples(self, batch: Batch, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """[N, layers, D] and labels [N]; each session counts once, by its last output."""
        if self.config.labels == "token":
            return hidden.features, hidden.label
        rows = batch.is_last & batch.response_mask.any(1)
        return hidden.pooled[rows], batch.groups.index[rows]
