"""Clip-Cov: the policy-loss hook on one micro-batch, watched while it chooses, then verl's aggregation."""

import torch
from cases import Case, actor_config, aggregate, make_tokens

from verl_plugins.entropy.clip_cov import ClipCov, candidates

OPTIONS = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")


class Watched(ClipCov):
    """Keeps the candidates that the hook chooses from, [rows,T] bool."""

    def _choose(self, cov, mask, clipped, rng):
        places = candidates(cov, mask, self.config.clip_cov_lb, self.config.clip_cov_ub, clipped)
        self.candidates = torch.zeros_like(mask).flatten().index_fill_(0, places, True).view_as(mask)
        chosen, found = super()._choose(cov, mask, clipped, rng)
        self.chosen = torch.zeros_like(mask).flatten().index_fill_(0, chosen, True).view_as(mask)
        return chosen, found


def replay(case: Case, expected: dict) -> dict:
    defaults = ClipCov.Config()
    plugin = Watched(ClipCov.Config(**{name: case.param(name, getattr(defaults, name)) for name in OPTIONS}))
    logged = {}
    config = actor_config(case)
    tokens = make_tokens(
        case,
        rng_seed=case.param("seed", None),
        advantages=case.tensor("advantages"),
        config=config,
        log=lambda owner, metrics, reduce: logged.update(metrics),
    )
    loss = aggregate(plugin.policy_loss(tokens), tokens.response_mask, config)
    loss.backward()
    return logged | {
        "pg_loss": loss.item(),
        "loss": loss.item(),
        "grad_log_prob": tokens.log_probs.grad,
        "candidate_mask": plugin.candidates,
        "selected_mask": plugin.chosen,
    }
