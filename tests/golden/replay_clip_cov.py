"""Clip-Cov: the policy-loss hook on one micro-batch, then verl's aggregation."""

import torch
from cases import Case, actor_config, aggregate, make_tokens

from verl_plugins.entropy.clip_cov import ClipCov, candidates, covariance

OPTIONS = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")


def replay(case: Case, expected: dict) -> dict:
    defaults = ClipCov.Config()
    plugin = ClipCov(ClipCov.Config(**{name: case.param(name, getattr(defaults, name)) for name in OPTIONS}))
    logged = {}
    config = actor_config(case)
    tokens = make_tokens(
        case,
        rng_seed=case.param("seed", None),
        advantages=case.tensor("advantages"),
        config=config,
        log=lambda owner, metrics, reduce: logged.update(metrics),
    )
    losses = plugin.policy_loss(tokens)
    loss = aggregate(losses, tokens.response_mask, config)
    loss.backward()

    mask = tokens.response_mask
    cov = covariance(tokens.advantages, tokens.log_probs.detach(), mask.double())
    ratio = (tokens.log_probs - tokens.old_log_probs).detach().exp()
    bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    clipped = -tokens.advantages * bounded > -tokens.advantages * ratio
    candidate = torch.zeros_like(mask).flatten()
    candidate[candidates(cov, mask, plugin.config.clip_cov_lb, plugin.config.clip_cov_ub, clipped)] = True
    return logged | {
        "pg_loss": loss.item(),
        "loss": loss.item(),
        "grad_log_prob": tokens.log_probs.grad,
        "candidate_mask": candidate.view_as(mask),
    }
