"""RAVL: the authors' critic through the lab's target and the stage `value_loss`, ours through verl's GAE."""

from types import SimpleNamespace

import torch
from cases import Case, NotOffered
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import agg_loss, compute_gae_advantage_return

from verl_plugins import Batch, Values
from verl_plugins.advantage.ravl import Ravl, diversity, spread
from verl_plugins.bridge.defaults import CriticDefaults, DriverDefaults
from verl_plugins.bridge.valuing import KnowsValues
from verl_plugins.composition.manager import Plugins
from verl_plugins.labs.ravl import td_target
from verl_plugins.testing import FakeRun


def replay(case: Case, expected: dict) -> dict:
    mode = case.param("mode", "gae_truncated_bootstrap")
    if mode not in ("td_min_ensemble", "gae_truncated_bootstrap"):
        raise NotOffered(f"no mode is called {mode!r}")
    return replay_critic(case) if mode == "td_min_ensemble" else replay_gae(case)


def replay_critic(case: Case) -> dict:
    alpha, eta, gamma = case.param("alpha", 0.0), case.param("eta", 1.0), case.param("gamma", 0.99)
    behind, members = (case.tensor(name).movedim(0, -1) for name in ("q_next_members", "q_members"))
    log_prob = case.tensor("next_log_prob")
    target = td_target(case.tensor("rewards"), case.tensor("dones"), behind, log_prob, gamma, alpha)
    weights = case.tensor("action_grad_members")
    several, mask = len(weights) > 1, torch.ones(len(target), 1)
    found = spread(behind, torch.ones(len(behind), dtype=torch.bool))
    values = Values(
        values=members[:, None],
        old_values=members[:, None],
        returns=target[:, None],
        response_mask=mask,
        head_weight=weights if several else None,
        config=SimpleNamespace(cliprange_value=0.5),
    )
    # verl's loss of values is half of the squared error.
    plugins = Plugins([Ravl(Ravl.Config(members=len(weights), eta=eta / 2))])
    plugins.add_fallback(CriticDefaults())
    loss = 2 * agg_loss(plugins.hook.value_loss(values=values), mask, "token-mean") if len(target) else torch.tensor(0)
    return {
        "target": target,
        "critic_loss": float(loss),
        "diversity": float(diversity(weights)) if several else 0.0,
        "q_next_std": 0.0 if found is None else float(found),
    }


class Critic(KnowsValues):
    """As far as verl's estimator is called."""

    def __init__(self, gamma: float) -> None:
        self.config = OmegaConf.create({"algorithm": {"gamma": gamma}})


def replay_gae(case: Case) -> dict:
    gamma, lam = case.param("gamma", 1.0), case.param("lam", 1.0)
    rewards, mask = case.tensor("token_level_rewards"), torch.tensor(case.input("response_mask")).long()
    heads, ends = (case.tensor(name).movedim(0, -1) for name in ("values_members", "bootstrap_values_members"))
    cut = torch.tensor(case.input("truncated", [0] * len(rewards))).bool()
    settings = {
        "bootstrap": case.param("bootstrap", "truncated_only"),
        "aggregate": case.param("aggregate", "min"),
        "baseline": case.param("baseline", "min"),
    }
    if not len(rewards):
        return {"values": [], "advantages": [], "advantages_unwhitened": [], "returns": []}
    batch = Batch.from_tensors(
        uid=[str(row) for row in range(len(rewards))],
        rm_scores=rewards,
        response_mask=mask,
        truncated=cut,
        values=heads.mean(-1),
        head_values=heads,
        bootstrap_values=ends,
    )
    columns = {"token_level_rewards": rewards.clone(), "values": heads.mean(-1), "response_mask": mask}
    found = {}

    def verls_gae() -> torch.Tensor:
        with Critic(gamma)._assigned_values(SimpleNamespace(batch=columns), torch.arange(len(rewards)), batch):
            advantages, found["returns"] = compute_gae_advantage_return(**columns, gamma=gamma, lam=lam)
        return advantages

    plugins, defaults, run = (
        Plugins([Ravl(Ravl.Config(members=heads.shape[-1], **settings))]),
        DriverDefaults(),
        FakeRun(),
    )
    plugins.add_fallback(defaults)
    defaults.estimator = verls_gae
    advantages = plugins.hook.estimate_advantage(run=run, batch=batch)
    return {
        "values": columns["values"],
        "advantages": advantages,
        "advantages_unwhitened": found["returns"] - columns["values"],
        "returns": found["returns"],
        "value_std_interior": run.metrics.get("ensemble_std_interior", 0.0),
        "value_std_boundary": run.metrics.get("ensemble_std_boundary", 0.0),
    }
