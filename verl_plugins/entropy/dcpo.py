"""DCPO (Distribution-Centric): reinforce right answers as if they had been sampled at another temperature.

arXiv:2601.12730, on top of any estimator's advantage A (the authors': GRPO). Once per step, with the policy before the
update, H its entropy, H0 the target `entropy_base`, p the share of right responses, z = 1 for a right one:

    T      = temperature_high if H <= H0 else temperature_low          times the rollout temperature
    rho    = pi_T / pi                                                 per token, from one extra forward pass
    a0     = min(|H0 - H|, alpha_cap);   alpha = a0 / (a0 + p)
    A'     = (1 - alpha) A + alpha z rho                               a constant in the loss

Against GRPO: the second term. Too certain a policy is pulled towards a flatter version of itself, too uncertain a one
towards a sharper one, by importance weights on the samples it has. H is this step's exact entropy; the authors take the
mean of -log pi over the tokens of the step before, while the policy was being updated, and 0 in the first step
(`entropy_source: previous_mc`).

Degenerate cases. p = 0: alpha is 0 (NaN in the authors' code). On target: A' = A. In neither case is the pass made, and
it is made for right responses only. All right: A is 0 and the policy is still reinforced by rho.

Another method called DCPO, "Dynamic Clipping Policy Optimization", is arXiv:2509.02333.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Plugin, Run, Tokens, hookimpl, setting
from verl_plugins.fields import TensorSource

READ_BY_A_FORWARD_PASS = ("prompts", "prompt_lengths", "responses", "response_lengths", "response_mask")


def mixing_weight(gap: float, success_rate: float, cap: float) -> float:
    """alpha, the weight of the REINFORCE term: a0 / (a0 + p) with a0 = min(|gap|, cap), and 0 where p is 0."""
    size = min(abs(gap), cap)
    return size / (size + success_rate) if success_rate > 0 else 0.0


class Dcpo(Plugin):
    """Mixes into any estimator's advantages a REINFORCE term on right responses, weighed towards a temperature."""

    name = "dcpo"
    paper = "arXiv:2601.12730"
    needs = frozenset({"entropy", "old_log_probs"})

    @dataclass
    class Config:
        entropy_base: float = setting(
            0.25, "target entropy in nats; 0.25 is the authors' best, 0.5 stands in their script", authors=0.25, ge=0
        )
        temperature_high: float = setting(1.2, "T where entropy is at or below the target", authors=1.2, gt=1)
        temperature_low: float = setting(0.8, "T where entropy is above the target", authors=0.8, gt=0, lt=1)
        alpha_cap: float = setting(0.1, "largest a0", authors=0.1, ge=0)
        score_threshold: float = setting(0.05, "a response is right if its score is larger", authors=0.05)
        entropy_source: str = setting(
            "current",
            "this step's exact entropy, or the last update's estimate from the sampled tokens",
            authors="previous_mc",
            choices=("current", "previous_mc"),
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._measured = 0.0

    def check(self, config: DictConfig) -> None:
        if config.algorithm.use_kl_in_reward:
            raise CompositionError(
                "algorithm.use_kl_in_reward=True takes a KL penalty off the scores that plugins.dcpo.score_threshold "
                "is compared with: set it to False"
            )

    @hookimpl(wrapper=True)
    def estimate_advantage(self, run: Run, batch: Batch) -> Generator[None, Tensor, Tensor]:
        advantages, settings, mask, everyone = (yield), self.config, batch.response_mask, batch.full
        entropy = self._measured
        if settings.entropy_source == "current":
            entropy = float(batch.entropy[mask].double().mean())
        right = batch.scores > settings.score_threshold
        success_rate = float((everyone.scores > settings.score_threshold)[everyone.is_last].double().mean())
        gap = settings.entropy_base - entropy
        alpha = mixing_weight(gap, success_rate, settings.alpha_cap)
        temperature = settings.temperature_high if gap >= 0 else settings.temperature_low
        run.log(
            {
                "entropy": entropy,
                "target_gap": gap,
                "temperature": temperature,
                "a0": min(abs(gap), settings.alpha_cap),
                "alpha": alpha,
                "true_ratio": success_rate,
            }
        )
        run.log({"forward_pass": float(alpha > 0 and bool(right.any()))})
        mixed = (1 - alpha) * advantages
        if alpha == 0 or not right.any():
            return mixed
        ratio = tempered_ratio(run, batch, right, temperature)
        mixed[right] += (alpha * ratio * mask[right]).to(mixed.dtype)
        run.log(_about(ratio[mask[right]], advantages, mixed, alpha, mask))
        return mixed

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> None:
        """Adds nothing: measures -log pi of the policy being trained, for the next step."""
        if self.config.entropy_source == "previous_mc" and (count := int(tokens.response_mask.sum())):
            total = float((tokens.log_probs.detach() * tokens.response_mask).sum())
            tokens.log({"previous_entropy": -total / count})

    @hookimpl
    def on_step_end(self, metrics: Mapping[str, Any]) -> None:
        self._measured = float(metrics.get("plugins/dcpo/previous_entropy", self._measured))

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._measured = state["entropy"]


def tempered_ratio(run: Run, batch: Batch, rows: Tensor, temperature: float) -> Tensor:
    """[R,T] pi_T / pi at the tokens of the R rows that are marked, by a forward pass over those alone.

    The base distribution is the one that was sampled from: T is relative to the rollout temperature.
    """
    picked = rows.nonzero()[:, 0]
    fields = {name: batch.extra(name)[picked] for name in READ_BY_A_FORWARD_PASS}
    part = Batch(TensorSource([batch.keys[row] for row in picked.tolist()], fields))
    sampled_at = run.config.actor_rollout_ref.rollout.temperature
    return (run.log_probs(part, temperature=temperature * sampled_at) - batch.old_log_probs[picked]).exp()


def _about(ratio: Tensor, before: Tensor, after: Tensor, alpha: float, mask: Tensor) -> dict[str, float]:
    """Metrics: rho on tokens of right responses, mean sizes of A and A', and the REINFORCE term's share of the mass."""
    tokens, size, added = int(mask.sum()), float((before.abs() * mask).sum()), alpha * float(ratio.sum())
    return {
        "rho_mean": float(ratio.mean()),
        "rho_min": float(ratio.min()),
        "rho_max": float(ratio.max()),
        "rho_p99": float(np.quantile(ratio.numpy(), 0.99)),
        "abs_advantage_before": size / tokens,
        "abs_advantage": float((after.abs() * mask).sum()) / tokens,
        "reinforce_share": added / ((1 - alpha) * size + added),
    }
