"""SPO-chain: a response is cut where the policy was unsure, and a segment earns the change of value that it made.

arXiv:2505.23564, sections 3 to 5. With p_t the probability of token t when it was sampled:

    U = tokens with p_t < rho;   C = (every interval-th of U) - 1, each the last token of a prefix (-1: the bare prompt)
    V(c) = mean reward of `samples` new responses continued after prefix c; of the whole response its own reward
    A = V(end of the segment) - V(end of the one before), on the segment's tokens that are not surer than rho

What differs from GRPO: (1) the advantage, of segments instead of responses, without any group: rollout.n=1 works;
(2) `samples` continuations of each cut prefix, which are scored and thrown away; equal prefixes of a group share
theirs; (3) the loss of the recipe: tokens surer than rho are left out of it (the plugin `prob_mask`), no dual clip, and
a KL term summed over a response. `whiten: batch`, which the authors' code does and the paper does not have, brings the
advantages of the step's unsure tokens to mean 0 and variance 1.

Degenerate cases: without an unsure token there is no cut and no advantage; tokens before the first cut get 0 unless it
is the bare prompt; an answer that was cut off counts as 0, also as a continuation; a prefix none of whose continuations
came back has value 0; fewer than two unsure tokens are not whitened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Plugin, Rollout, Run, Tokens, hookimpl, setting
from verl_plugins.services import Prompt

CUTS, VALUES = "spo_cuts", "spo_values"
"""Fields of a row: ends of its cut prefixes, and their values."""
ROUNDING = 1e-6
CLAMP = 10.0
"""Of log ratios and of the mean ratio from which a micro-batch counts for nothing, as in the authors' code."""


def cutpoints(log_probs: Sequence[float], mask: Sequence[int], rho: float, interval: int) -> list[int]:
    """[n] log-probs and generated tokens of a response -> ends of the prefixes that are valued, ascending, from -1."""
    unsure = (np.exp(np.asarray(log_probs, dtype=np.float64)) < rho - ROUNDING) & np.asarray(mask, dtype=bool)
    return (np.flatnonzero(unsure)[::interval] - 1).tolist()


def valued(cuts: Sequence[Sequence[int]], values: Sequence[Sequence[float]], width: int) -> Tensor:
    """Ragged cuts and values of B rows -> [B,width+1] value of the prefix that ends at token t, at t+1; else NaN."""
    rows = np.repeat(np.arange(len(cuts)), [len(row) for row in cuts])
    table = torch.full((len(cuts), width + 1), torch.nan, dtype=torch.double)
    if len(rows):
        place, value = (
            np.concatenate([np.asarray(row, dtype=kind) for row in part if len(row)])
            for part, kind in ((cuts, np.int64), (values, np.float64))
        )
        table[torch.from_numpy(rows), torch.from_numpy(place) + 1] = torch.from_numpy(value)
    return table


def segment_advantage(table: Tensor, scores: Tensor, lengths: Tensor, log_probs: Tensor, rho: float) -> Tensor:
    """[B,T] the change of value that each token's segment made; 0 on tokens surer than rho and in rows without a cut.

    Args:
        table: [B,T+1] as `valued` gives it.
        scores: [B] of the whole responses.
        lengths: [B] in tokens, from 1.
        log_probs: [B,T] by which tokens are sure.
        rho: from which probability.
    """
    width = table.shape[1] - 1
    place = torch.arange(width).expand(len(table), width)
    value = torch.where(place == lengths[:, None] - 1, scores.double()[:, None], table[:, 1:])
    known = ~value.isnan()
    before = torch.where(known, place, -1).cummax(1).values.roll(1, 1)
    before[:, 0] = -1
    base = torch.where(before >= 0, value.gather(1, before.clamp(min=0)), table[:, :1])
    change = (value - base).nan_to_num(0.0)
    after = torch.where(known, place, width).flip(1).cummin(1).values.flip(1)
    spread = torch.where(after < width, change.gather(1, after.clamp(max=width - 1)), 0.0)
    sure = log_probs.double().exp() > rho + ROUNDING
    return spread.masked_fill(sure | table.isnan().all(1, keepdim=True), 0.0)


def whitened(advantages: Tensor, over: Tensor, mask: Tensor) -> Tensor:
    """[B,T] advantages with mean 0 and variance 1 over the tokens `over`, all moved alike; 0 off the mask."""
    over = over if over.any() else mask
    chosen = advantages[over]
    if len(chosen) < 2:
        return advantages
    return ((advantages - chosen.mean()) * (chosen.var() + 1e-8).rsqrt()).masked_fill(~mask, 0.0)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """[B,T] PPO's loss without dual clip, and where the clip is what counts."""
    free, bound = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, bound), bound > free


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """[B,T] the k3 estimate of the KL from the reference."""
    away = (ref_log_probs - log_probs).clamp(-CLAMP, CLAMP)
    return away.exp() - away - 1


def segment_loss(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[rows,T] the policy loss per token, 0 in a micro-batch that ran away, and where it is clipped; logs both."""
    mask, settings = tokens.response_mask, tokens.config
    ratio = ((tokens.log_probs - tokens.old_log_probs) * mask).clamp(-CLAMP, CLAMP).exp()
    loss, bound = clipped(ratio, tokens.advantages, settings.clip_ratio_low, settings.clip_ratio_high)
    count = mask.sum().clamp(min=1)
    mean = (ratio.detach() * mask).sum() / count
    tokens.log({"ratio_mean": float(mean), "clip_frac": float((bound & mask).sum() / count)})
    return loss * (mean <= CLAMP), bound & mask


def segment_kl(tokens: Tokens, coefficient: float) -> dict[str, Tensor] | None:
    """The KL term per token, which the run's aggregation sums over each row; None without a coefficient."""
    if not coefficient:
        return None
    return {"spo_kl": coefficient * k3(tokens.log_probs, tokens.extra("ref_log_prob")) * per_response(tokens)}


def check_continued(name: str, config: DictConfig) -> None:
    """Raises CompositionError: the run's agent loop cannot continue an answer."""
    loop = config.actor_rollout_ref.rollout.agent.default_agent_loop
    if loop != "single_turn_agent":
        raise CompositionError(
            f"plugins.{name} continues answers from their middle, which actor_rollout_ref.rollout.agent."
            f"default_agent_loop={loop} cannot; use single_turn_agent"
        )


def check_kl(name: str, coefficient: float, config: DictConfig) -> None:
    """Raises CompositionError: the KL term has no reference, or cannot be made a sum over rows."""
    actor = config.actor_rollout_ref.actor
    if coefficient and not (actor.use_kl_loss and actor.loss_agg_mode == "token-mean"):
        raise CompositionError(
            f"plugins.{name}.kl_coef={coefficient} needs a reference and the mean over tokens: set "
            "actor_rollout_ref.actor.use_kl_loss=true, kl_loss_coef=0 and loss_agg_mode=token-mean"
        )


class SpoChain(Plugin):
    """Values cut prefixes by continuing them, and credits segments."""

    name = "spo_chain"
    paper = "arXiv:2505.23564"
    needs = frozenset({"old_log_probs"})

    @dataclass
    class Config:
        interval: int = setting(5, "unsure tokens in a segment", authors=5, ge=1)
        samples: int = setting(9, "continuations of each cut prefix", authors=9, ge=1)
        rho: float = setting(0.9, "a token less probable than this is an unsure one", authors=0.9, gt=0, lt=1)
        whiten: str = setting(
            "batch", "bring advantages to mean 0, variance 1", authors="batch", choices=("batch", "none")
        )
        kl_coef: float = setting(0.0, "of a KL term summed over each response, in place of verl's", authors=1e-4, ge=0)

    def check(self, config: DictConfig) -> None:
        check_continued(self.name, config)
        if not config.actor_rollout_ref.rollout.calculate_log_probs:
            raise CompositionError(
                "plugins.spo_chain cuts by the log-probs of the rollout: set "
                "actor_rollout_ref.rollout.calculate_log_probs=true"
            )
        check_kl(self.name, self.config.kl_coef, config)

    @hookimpl
    async def rollout_group(
        self, run: Run, prompt: Prompt, sample: Callable[..., Awaitable[list[Rollout]]]
    ) -> list[Rollout]:
        rollouts, settings = await sample(), self.config
        cuts = [cutpoints(one.log_probs, one.mask, settings.rho, settings.interval) for one in rollouts]
        prefixes = {
            tuple(one.response_ids[: end + 1]): None for one, ends in zip(rollouts, cuts, strict=True) for end in ends
        }
        tried = await asyncio.gather(*[sample(settings.samples, prefix=prefix) for prefix in prefixes])
        worth = {
            prefix: float(np.mean([0.0 if one.truncated else one.score for one in found])) if found else 0.0
            for prefix, found in zip(prefixes, tried, strict=True)
        }
        for one, ends in zip(rollouts, cuts, strict=True):
            one.fields = {CUTS: ends, VALUES: [worth[tuple(one.response_ids[: end + 1])] for end in ends]}
        self._log(run, rollouts, cuts, [one for found in tried for one in found], [*worth.values()])
        return rollouts

    def _log(
        self,
        run: Run,
        rollouts: Sequence[Rollout],
        cuts: Sequence[Sequence[int]],
        tried: Sequence[Rollout],
        worth: Sequence[float],
    ) -> None:
        asked = sum(map(len, cuts))
        run.log({"num_cutpoints": asked / max(len(rollouts), 1)})
        if rollouts:
            run.log({"extra_tokens_per_response": sum(sum(one.mask) for one in tried) / len(rollouts)})
        if tried:
            run.log(
                {
                    "mc_value_mean": float(np.mean(worth)),
                    "mc_value_std": float(np.std(worth)),
                    "mc_trunc_frac": float(np.mean([one.truncated for one in tried])),
                    "mc_unique_frac": len(worth) / asked,
                }
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        cuts, values = batch.extra(CUTS), batch.extra(VALUES)
        mask, log_probs = batch.response_mask, batch.old_log_probs
        table = valued(cuts, values, mask.shape[1])
        scores = batch.scores.masked_fill(batch.truncated, 0.0)
        advantages = segment_advantage(table, scores, batch.lengths, log_probs, self.config.rho).masked_fill(~mask, 0.0)
        unsure = mask & (log_probs.double().exp() < self.config.rho - ROUNDING)
        moved = advantages[unsure]
        run.log({"adv_nonzero_frac": float((advantages[mask] != 0).double().mean())})
        if len(moved):
            run.log({"segment_advantage_abs": float(moved.abs().mean())})
        return (whitened(advantages, unsure, mask) if self.config.whiten == "batch" else advantages).float()

    @hookimpl
    def policy_loss(self, tokens: Tokens) -> Tensor:
        return segment_loss(tokens)[0]

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> dict[str, Tensor] | None:
        return segment_kl(tokens, self.config.kl_coef)


def per_response(tokens: Tokens) -> float:
    """By what a term is multiplied so that the run's aggregation makes it a sum over each response, mean over these."""
    info = tokens.config.global_batch_info
    return info["batch_num_tokens"] / info["global_batch_size"]
