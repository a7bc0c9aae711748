"""STEER: its wrapper around the default policy loss on one micro-batch, then verl's aggregation."""

import torch
from cases import Case, actor_config, aggregate, make_tokens

from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.steer import Steer, entropy_change

NAMES = {
    "policy_loss/clip_fraction": "pg_clipfrac",
    "policy_loss/dual_clip_fraction": "pg_clipfrac_lower",
    "policy_loss/kl": "ppo_kl",
    "steer/token_weight_mean": "token_weight_mean",
    "steer/token_weight_min": "token_weight_min_seen",
    "steer/token_weight_max": "token_weight_max_seen",
}


def replay(case: Case, expected: dict) -> dict:
    defaults = Steer.Config()
    low = case.param("token_weight_min", defaults.token_weight_min)
    high = max(case.param("token_weight_max", defaults.token_weight_max), 1.0)  # exp, which ignores it, gives 1
    plugin = Steer(
        Steer.Config(
            map="linear" if case.param("linear", False) else "exp",
            token_weight_min=low,
            token_weight_max=high,
            floor=case.param("floor", defaults.floor),
        )
    )
    entropy, logged = case.tensor("entropy"), {}
    config = actor_config(case, max(int(torch.tensor(case.input("response_mask")).sum()), 1))
    tokens = make_tokens(
        case,
        advantages=case.tensor("advantages"),
        config=config,
        extra={"entropy": entropy}.__getitem__,
        log=lambda owner, metrics, reduce: logged.update({f"{owner}/{name}": value for name, value in metrics.items()}),
    )
    plugins = Plugins([plugin])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    loss = aggregate(plugins.hook.policy_loss(tokens=tokens), tokens.response_mask, config)
    loss.backward()
    omega = entropy_change(tokens.log_probs.detach(), tokens.old_log_probs, tokens.advantages, entropy)
    return {name: logged.get(key, 0.0) for key, name in NAMES.items()} | {
        "pg_loss": loss.item(),
        "grad_log_prob": tokens.log_probs.grad,
        "token_weights": plugin.weights(tokens),
        "abs_omega": omega.abs() * tokens.response_mask,
    }
