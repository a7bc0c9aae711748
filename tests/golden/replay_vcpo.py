"""VCPO: the step's multiplier, baselines and advantages, and the loss they go into."""

from __future__ import annotations

import torch
from cases import Case, NotOffered, Rows, actor_config, aggregate

from verl_plugins import Batch, Tokens
from verl_plugins.advantage.vcpo import LIMIT, Vcpo, effective_sample_size, log_weights
from verl_plugins.bridge.defaults import clipped_loss

OPTIONS = ("scope", "agg_mode", "use_is_weights", "use_clipped_is_ratios", "normalize_by_length", "norm_by_std")


def replay(case: Case, expected: dict) -> dict:
    if case.param("eps", 1e-8) != 1e-8:
        raise NotOffered("the epsilon is 1e-8")
    return {"ess_lr": step, "opob": advantage, "loss": loss}[case.param("op")](case, expected)


def weights(case: Case, mask: torch.Tensor) -> torch.Tensor:
    """[rows] log w within its bounds; rows that verl made up are the case's own business."""
    return log_weights(case.tensor("old_log_probs"), case.tensor("rollout_log_probs"), mask).clamp(-LIMIT, LIMIT)


def step(case: Case, expected: dict) -> dict:
    mask = torch.tensor(case.input("response_mask")).double()
    uid = case.input("uid", None)
    w = weights(case, mask).exp()
    real = torch.tensor([not str(name).startswith("pad") for name in uid]) if uid else torch.ones(len(w)).bool()
    names = {"scaling_rule": "sqrt", "base_ess_ratio": 1.0, "use_clipped": False, "rollout_is_threshold": 8.0}
    plugin = Vcpo(Vcpo.Config(**{name: case.param(name, value) for name, value in names.items()}))
    told, multiplier = plugin.of_step(w[real])
    clipped = w.clamp(max=plugin.config.rollout_is_threshold)
    return {
        "seq_is": w,
        "seq_is_clipped": clipped,
        "ess": told["ess"],
        "ess_ratio": told["ess_ratio"],
        "ess_clipped": effective_sample_size(clipped[real]),
        "ess_ratio_clipped": told["ess_ratio_clipped"],
        "lr_multiplier": multiplier,
        "effective_lr": multiplier * case.param("lr", 1e-6),
    }


def advantage(case: Case, expected: dict) -> dict:
    rows = Rows(case)
    mask, real = rows.mask.double(), rows.real
    defaults = Vcpo.Config()
    chosen = {name: case.param(name, getattr(defaults, name)) for name in OPTIONS}
    source = case.param("grad_norm_source", "given" if case.input("grad_norm", None) is not None else "logit_proxy")
    plugin = Vcpo(
        Vcpo.Config(
            **chosen,
            rollout_is_threshold=case.param("rollout_is_threshold", 8.0),
            grad_norm_includes_is=case.param("grad_norm_includes_is", False),
            score_norm="length" if source == "length" else "logit_proxy",
        )
    )
    squares = case.tensor("sum_pi_squared") if source == "logit_proxy" else torch.zeros_like(mask)
    old, rollout = case.tensor("old_log_probs"), case.tensor("rollout_log_probs")
    fields = {"old_log_probs": old, "rollout_log_probs": rollout, "sum_pi_squared": squares}
    batch = Batch.from_tensors(
        uid=rows.batch.uid.tolist(),
        session=rows.batch.session.tolist(),
        turn=rows.batch.turn.tolist(),
        rm_scores=rows.batch.rewards,
        response_mask=rows.batch.response_mask,
        **{name: values[real] for name, values in fields.items()},
    )
    log_weight = plugin.of_sessions(batch, log_weights(old, rollout, mask)[real])
    given = case.tensor("grad_norm")[real].double() if source == "given" else None
    score = plugin.score_squared(batch) if given is None else given.square()
    weight = plugin.weights(log_weight, score, plugin.of_sessions(batch, mask[real].sum(1))) * batch.is_last
    scalars = case.input("advantage_scalar", None)
    if plugin.config.scope == "minibatch" and scalars is not None:
        values = torch.tensor(scalars, dtype=torch.float64)[real]
        found, level = plugin.against_baseline(values, weight, torch.zeros_like(batch.groups.index), batch)
    else:
        found, level = plugin.advantage(batch, weight)
    if plugin.config.scope == "group":
        found = lone_as_theirs(plugin, batch, weight, found, level)
    return {
        "seq_is": rows.on_all(log_weight.clamp(-LIMIT, LIMIT).exp()),
        "baseline": rows.on_all(level),
        "advantage_scalar": rows.on_all(found),
        "advantages": rows.on_all(found[:, None] * batch.response_mask),
        "grad_norm": rows.on_all(score.sqrt()),
    }


def lone_as_theirs(plugin: Vcpo, batch: Batch, weight: torch.Tensor, found: torch.Tensor, level: torch.Tensor):
    """Ours is exactly 0 for a lone response; the authors' is what rounding and the epsilon leave of R - b."""
    lone = batch.groups.count() == 1
    assert not found[lone].any()
    return torch.where(lone, batch.scores.double() - level, found)


def loss(case: Case, expected: dict) -> dict:
    mask = torch.tensor(case.input("response_mask"))
    if case.param("rollout_is", "sequence") != "sequence":
        raise NotOffered("the weights are those of whole trajectories")
    w = weights(case, mask.double()).exp().clamp(max=case.param("rollout_is_threshold", 8.0))
    log_probs = case.tensor("log_prob").requires_grad_()
    config = actor_config(case, batch_num_tokens=int(mask.sum()))
    tokens = Tokens(
        log_probs=log_probs,
        old_log_probs=case.tensor("old_log_probs"),
        advantages=case.tensor("advantages"),
        response_mask=mask.bool(),
        config=config,
    )
    value = aggregate(clipped_loss(tokens) * w[:, None], mask, config)
    value.backward()
    return {"rollout_is_weights_seq": w, "loss": value.detach(), "grad_log_prob": log_probs.grad}
