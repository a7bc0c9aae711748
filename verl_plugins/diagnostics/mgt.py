"""Geometry by depth: at which layer the policy's tokens become alike.

Su, You, Geometric and Dynamic Scaling in Deep Transformers, arXiv 2601.01014: a proposal without experiments, whose
worry is that deep stacks lose rank. Its block is for models trained from scratch (the lab of this recipe); what serves
a policy is the ruler, which is ours. Of states [layers, tokens, D] of a few tokens of many responses, for each layer

    effective rank exp(H(sigma / sum sigma)) of the singular values of [tokens, D], not centred
    mean cosine of two different tokens, mean norm
    and from one layer looked at to the next: cosine of the states, cosine of state and update

What differs from GRPO: 1. Nothing in training: `observe` measures. 2. In steps that are due the pass for the old
log-probs also returns the states of every so many layers.

Degenerate cases. A single token has rank 1 and, by convention, cosine 1. No token: nothing is logged. One layer: no
cosine of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from verl_plugins import Batch, Plugin, Run, Wish, hookimpl, setting

OF_LAYERS = {"eff_rank": "effective_rank", "cos": "mean_pairwise_cosine", "norm": "mean_norm"}
"""What is logged of each layer, and what it is called here."""


def effective_rank(states: Tensor) -> Tensor:
    """exp(entropy of sigma / sum sigma) of the singular values of states [..., tokens, d], not centred."""
    values = torch.linalg.svdvals(states)
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()


def pairwise_cosine(states: Tensor) -> Tensor:
    """Mean cosine of two different tokens of states [..., tokens, d]; 1 for a single token."""
    tokens = states.shape[-2]
    if tokens < 2:
        return states.new_ones(states.shape[:-2])
    unit = normalize(states, dim=-1)
    return (unit.sum(-2).square().sum(-1) - unit.square().sum((-1, -2))) / (tokens * (tokens - 1))


def depth_geometry(states: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Of states [layers, tokens, d] and the tokens that count, mask [tokens]: a value for each layer, or each step."""
    states = states if mask is None else states[:, mask.bool()]
    before, after = states[:-1], states[1:]
    return {
        "effective_rank": effective_rank(states),
        "mean_pairwise_cosine": pairwise_cosine(states),
        "mean_norm": states.norm(dim=2).mean(1),
        "layer_to_layer_cosine": cosine_similarity(before, after, dim=2).mean(1),
        "update_alignment": cosine_similarity(before, after - before, dim=2).mean(1),
    }


class ManifoldGeometry(Plugin):
    """Measures rank, cosines and norms of hidden states layer by layer."""

    name = "mgt"
    paper = "arXiv:2601.01014"
    needs = frozenset({"hidden_states"})

    @dataclass
    class Config:
        freq: int = setting(10, "steps between two measurements, from the first step on", ge=1)
        layer_step: int = setting(4, "every so many layers, and the last", ge=1)
        tokens_per_response: int = setting(2, "generated tokens of each response that are looked at", ge=1)
        max_tokens: int = setting(256, "tokens of a step that are looked at, at most", ge=1)

    def hidden_wish(self) -> Wish:
        return Wish(self.config.tokens_per_response, self.config.freq, self.config.layer_step)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        hidden = self.hidden_wish().of(batch.hidden, run.step)
        if hidden is None or not len(hidden.row):
            return
        states = hidden.features[hidden.first(self.config.max_tokens)].transpose(0, 1)
        found = {name: values.tolist() for name, values in depth_geometry(states).items()}
        for word, name in OF_LAYERS.items():
            run.log({f"{word}_{layer}": value for layer, value in zip(hidden.layers, found[name], strict=True)})
        run.log({"eff_rank_last": found["effective_rank"][-1], "n_tokens": states.shape[1]})
        if len(hidden.layers) > 1:
            run.log({"min_layer_cos": min(found["layer_to_layer_cosine"])})
            run.log({"min_update_alignment": min(found["update_alignment"])})
