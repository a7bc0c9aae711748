"""RiskPO: learn from the tail of the returns, where the policy fails, instead of from their mean.

arXiv:2510.00911, as the authors' code computes it, with quantiles really tracked. Prompts are cut into bundles. Paper j
of a bundle is the j-th response to each of its prompts, S its total reward: so 0/1 rewards become a graded return. With
the quantiles qa < qb of the returns at the levels `quantile_down` and `quantile_up`:

    rvar = [(S - qa)+ - (S - qb)+] / (quantile_up - quantile_down)             range value at risk
    cvar = -(qa - S)+ / quantile_down                                          the lower tail
    a    = (tail_weight cvar + rvar) / (tail_weight + 1) / std of the bundle's papers

a is shared out over the responses of the paper (`credit`). Against GRPO: no centring within a prompt; what counts is on
which side of two quantiles a paper lies. These are tracked over steps: q_k += lr_q (level_k - share of S < q_k).
The release computes them too late to ever use them, so its runs took each bundle's own quantiles: `quantiles: batch`.

Degenerate cases. All papers of a bundle equal: 0 with its own quantiles; not with tracked ones, where its std counts
as 1 (the authors would divide by 1e-6). Responses beyond the smallest group of a bundle: 0. A shorter last bundle is
scored like the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, Groups, Plugin, Run, hookimpl, setting

LEVELS = torch.arange(1, 20, dtype=torch.float64) / 20
"""Levels of the tracked quantiles."""
EPSILON, STD_GUARD = 1e-6, 1e-3
"""Added to what is divided by; standard deviations up to the guard count as 1."""


def bundle_order(groups: Groups, rng: np.random.Generator) -> Tensor:
    """[G] the place of each prompt in the sequence that is cut into bundles: random, but the same for any row order."""
    place = np.empty(len(groups), dtype=np.int64)
    place[np.argsort(groups.labels.astype(str))] = rng.permutation(len(groups))
    return torch.from_numpy(place)


class Papers(NamedTuple):
    """The papers of a batch, as a table [bundles, papers]."""

    scores: Tensor
    """[bundles, papers] float64 total reward; 0 where there is no paper."""
    there: Tensor
    """[bundles, papers] bool"""
    prompts: Tensor
    """[bundles] prompts in the bundle, so responses in each of its papers."""
    cell: Tensor
    """[rows] the number of each row's paper in the flattened table; past its end for the surplus of larger groups."""

    def total(self, values: Tensor) -> Tensor:
        """Values [rows] -> their sum over each paper, [bundles, papers] float64."""
        sums = torch.bincount(self.cell, values.double(), minlength=self.there.numel() + 1)
        return sums[:-1].view(self.there.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Values [bundles, papers] -> the value of each row's paper, [rows]; 0 for the surplus."""
        return torch.nn.functional.pad(values.flatten(), (0, 1)).index_select(0, self.cell)


def make_papers(scores: Tensor, groups: Groups, session: Tensor, bundle: Tensor) -> Papers:
    """Scores and session number of each row, [rows], the bundle of each prompt, [G]: its responses by session."""
    group, bundle, session = groups.index.numpy(), bundle.numpy(), session.numpy()
    size = groups.per_group(groups.count()).numpy()
    order = np.argsort(group * (session.max() + 1) + session, kind="stable")
    order = order if groups.counted is None else order[groups.counted.numpy()[order]]
    place = np.full(len(group), len(group))
    place[order] = np.arange(len(order)) - (size.cumsum() - size)[group[order]]

    prompts = np.bincount(bundle)
    fewest = np.full(len(prompts), len(group))
    np.minimum.at(fewest, bundle, size)
    width = int(fewest.max())
    there = np.arange(width) < fewest[:, None]
    cell = np.where(place < fewest[bundle][group], (bundle * width)[group] + place, there.size)
    papers = Papers(torch.empty(0), *(torch.from_numpy(part) for part in (there, prompts, cell)))
    return papers._replace(scores=papers.total(scores))


def bundle_quantiles(papers: Papers, levels: Sequence[float]) -> list[Tensor]:
    """Empirical quantiles of each bundle's papers, linearly interpolated, [bundles, 1] for each level."""
    ordered = torch.where(papers.there, papers.scores, torch.inf).sort(1).values
    place = (papers.there.sum(1, keepdim=True) - 1) * torch.tensor(levels, dtype=torch.float64)
    below, above = (ordered.gather(1, side.long()) for side in (place.floor(), place.ceil()))
    return list((below + place.frac() * (above - below)).split(1, dim=1))


def bundle_std(papers: Papers, guard: float = STD_GUARD) -> Tensor:
    """Unbiased std of each bundle's papers, [bundles, 1]; 1 for a single paper and where it is at most `guard`."""
    count = papers.there.sum(1, keepdim=True)
    centred = (papers.scores - papers.scores.sum(1, keepdim=True) / count) * papers.there
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where((count == 1) | (std <= guard), 1.0, std)


def parts(returns: Tensor, low: Tensor, high: Tensor, natural_baseline: bool) -> tuple[Tensor, Tensor]:
    """rvar and cvar of returns, before the division by the levels; `natural_baseline`: the first less qb - qa."""
    middle = (returns - low).clamp(min=0) - (returns - high).clamp(min=0)
    return middle + low - high if natural_baseline else middle, -(low - returns).clamp(min=0)


def risk(scores: Tensor, low: Tensor, high: Tensor, config: Any, average: Sequence[float]) -> Tensor:
    """Returns [bundles, papers] and two quantiles, broadcast to it -> the advantage before the division by the std.

    `average`: mean of rvar and cvar over the tracked distribution, the baseline if there is to be one.
    """
    weight, down, up = config.tail_weight, config.quantile_down, config.quantile_up
    middle, tail = parts(scores, low, high, config.natural_baseline_adv or config.objective == "paper")
    if config.objective == "paper":
        return (1 + weight) * tail + middle
    if config.mean_baseline:
        middle, tail = middle - average[0], tail - average[1]
    middle, tail = middle / (up - down + EPSILON), tail / (down + EPSILON)
    if config.objective == "rvar":
        return middle
    if config.objective == "upper_tail":
        tail = (scores - high).clamp(min=0) / (1 - up + EPSILON)
    return (weight * tail + middle) / (weight + 1)


def share_out(advantage: Tensor, papers: Papers, scores: Tensor, groups: Groups, credit: str) -> Tensor:
    """Advantage of each paper [bundles, papers], scores [rows] -> advantage of each response, [rows] float64."""
    if credit == "sum-mean":
        above = scores.double() - groups.sum(scores.double()) / groups.count()
        total = papers.total(above)
        varied = total.abs() > EPSILON
        by_score, alike = advantage / total, advantage / papers.prompts[:, None]
        return papers.spread(by_score.where(varied, 0.0)) * above + papers.spread(alike.where(~varied, 0.0))
    given = papers.spread(advantage)
    if credit == "score":
        return given * torch.where(scores > 0, 0.5, 1.5)
    if credit == "std":
        std = groups.std(scores).double()
        return given / (torch.where(std <= STD_GUARD, 1.0, std) + EPSILON)
    return given


def track(quantiles: Tensor, scores: Tensor, lr: float) -> Tensor:
    """One step of the tracked quantiles [19] by all papers' scores [papers]; an empty tensor starts at theirs."""
    if not len(quantiles):
        return torch.quantile(scores.double(), LEVELS)
    below = (scores < quantiles[:, None]).double().mean(1)
    return quantiles + lr * (LEVELS - below)


def at_level(quantiles: Tensor, level: float) -> Tensor:
    """The tracked quantile of the nearest level."""
    return quantiles[nearest(level)]


def nearest(level: float) -> int:
    """The place in LEVELS of the nearest one, of two equally near ones the lower."""
    return int(np.argmin((LEVELS - level).abs().numpy().round(9)))


def averages(quantiles: Tensor, low: Tensor, high: Tensor, natural_baseline: bool) -> list[float]:
    """rvar and cvar integrated over the levels of the tracked quantiles."""
    return [float(torch.trapezoid(part, LEVELS)) for part in parts(quantiles, low, high, natural_baseline)]


class RiskPo(Plugin):
    """Advantages by the quantiles of the returns of bundles of prompts."""

    name = "riskpo"
    paper = "arXiv:2510.00911"

    @dataclass
    class Config:
        bundle_size: int = setting(5, "prompts per bundle", authors=5, ge=1)
        quantile_down: float = setting(0.2, "level of the lower quantile", authors=0.2, gt=0, lt=1)
        quantile_up: float = setting(0.8, "level of the upper one; authors: 0.9 on easy math", authors=0.8, gt=0, lt=1)
        quantiles: str = setting(
            "track",
            "tracked over steps, each bundle's own (batch: what the published runs did), or their mean",
            authors="track",
            choices=("track", "batch", "mix"),
        )
        lr_q: float = setting(0.1, "step of the tracked quantiles", authors=0.1, gt=0)
        objective: str = setting(
            "mixed",
            "cvar and rvar; rvar alone; rvar and the upper tail; or the paper's own formula",
            authors="mixed",
            choices=("mixed", "rvar", "upper_tail", "paper"),
        )
        tail_weight: float = setting(1.5, "weight of the tail; the paper's omega is not known", authors=1.5, ge=0)
        credit: str = setting(
            "sum-mean",
            "how a paper's advantage is shared out; authors: std on easy math",
            authors="sum-mean",
            choices=("uniform", "score", "std", "sum-mean"),
        )
        scale: str = setting(
            "std", "divide by the std of the bundle's papers, or by nothing", authors="std", choices=("std", "none")
        )
        natural_baseline_adv: bool = setting(
            False, "subtract qb - qa from rvar, so that nothing is rewarded; authors: true on easy math", authors=False
        )
        mean_baseline: bool = setting(False, "subtract the tracked distribution's mean of each part", authors=False)
        natural_baseline_base: bool = setting(True, "subtract qb - qa within that mean, too", authors=True)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._levels = (self.config.quantile_down, self.config.quantile_up)
        self.tracked = torch.zeros(0, dtype=torch.float64)
        """[19] quantiles of the papers' returns at LEVELS; empty before the first step."""

    def check(self, config: DictConfig) -> None:
        own = self.config
        if own.quantile_down >= own.quantile_up:
            raise CompositionError(
                f"plugins.riskpo.quantile_down={own.quantile_down} must be less than "
                f"plugins.riskpo.quantile_up={own.quantile_up}"
            )
        plain = (own.credit, own.scale) == ("uniform", "none") and not (own.natural_baseline_adv or own.mean_baseline)
        if own.objective == "paper" and not plain:
            raise CompositionError(
                "plugins.riskpo.objective=paper has neither std nor baseline and gives each response its paper's "
                "advantage; set plugins.riskpo.credit=uniform, scale=none, and natural_baseline_adv and mean_baseline "
                "to false"
            )
        n = OmegaConf.select(config, "actor_rollout_ref.rollout.n")
        if n is not None and n < 2 and own.quantiles == "batch":
            raise CompositionError(
                f"plugins.riskpo.quantiles=batch compares the papers of a bundle, and actor_rollout_ref.rollout.n={n} "
                "leaves one; set actor_rollout_ref.rollout.n to 2 or more"
            )
        if own.credit == "sum-mean" and own.natural_baseline_adv:
            logging.getLogger(__name__).warning(
                "plugins.riskpo: credit=sum-mean turns the sign of the never positive advantages of "
                "natural_baseline_adv=true around; the authors pair sum-mean with false and std with true"
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        config, groups, scores = self.config, batch.groups, batch.scores
        bundle = bundle_order(groups, run.rng("bundles")) // config.bundle_size
        papers = make_papers(scores, groups, batch.session, bundle)
        low, high = self.limits(papers)
        std = bundle_std(papers)
        average = [0.0, 0.0]
        if len(self.tracked):
            average = averages(self.tracked, *self._tracked(), config.natural_baseline_base)
        advantage = risk(papers.scores, low, high, config, average)
        advantage = advantage / (std + EPSILON) if config.scale == "std" else advantage
        given = share_out(advantage, papers, scores, groups, config.credit)
        run.log(summary(papers, advantage, low, high, config))
        surplus = (papers.cell == papers.there.numel()) & batch.is_last
        run.log({"abs_adv_max": float(given.abs().max()), "surplus_responses": float(surplus.sum())})
        self.tracked = track(self.tracked, papers.scores[papers.there], config.lr_q)
        run.log({f"quantile_{level:.2f}": float(q) for level, q in zip(LEVELS.tolist(), self.tracked, strict=True)})
        return batch.to_tokens(batch.of_session(given))

    def limits(self, papers: Papers) -> list[Tensor]:
        """Both quantiles, [bundles, 1] or []: each bundle's own as long as none have been tracked."""
        own, mode = bundle_quantiles(papers, self._levels), self.config.quantiles
        if mode == "batch" or not len(self.tracked):
            return own
        return self._tracked() if mode == "track" else [(q + t) / 2 for q, t in zip(own, self._tracked(), strict=True)]

    def _tracked(self) -> list[Tensor]:
        return [at_level(self.tracked, level) for level in self._levels]

    def state_dict(self) -> dict[str, Any]:
        return {"tracked": self.tracked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracked = torch.as_tensor(state["tracked"], dtype=torch.float64)


def summary(papers: Papers, advantage: Tensor, low: Tensor, high: Tensor, config: Any) -> dict[str, float]:
    """How the papers lie to the two quantiles in use, and what they get."""
    scores, there = papers.scores, papers.there
    found = advantage[there]
    metrics = {
        "papers": float(there.sum()),
        "q_alpha": float(low.mean()),
        "q_beta": float(high.mean()),
        "papers_below": float((scores < low)[there].double().mean()),
        "papers_above": float((scores > high)[there].double().mean()),
        "zero_std_bundles": float(((scores == scores[:, :1]) | ~there).all(1).double().mean()),
        "paper_advantage_mean": float(found.mean()),
        "paper_advantage_min": float(found.min()),
    }
    for name, inside in (("cvar", scores <= low), ("rvar", (scores >= low) & (scores <= high))):
        if (inside & there).any():
            metrics[name] = float(scores[inside & there].mean())
    if {"cvar", "rvar"} <= metrics.keys():
        weight = config.tail_weight
        metrics["mixed_risk"] = (weight * metrics["cvar"] + metrics["rvar"]) / (weight + 1)
    return metrics
