"""MC-GRPO: pivots dropped, advantages of the whole group, verl's clipped loss on what is kept."""

import torch
from cases import Case, Rows, actor_config, aggregate, make_tokens
from fakes import FakeRun
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, kl_penalty

from verl_plugins import Batch
from verl_plugins.advantage.mc_grpo import McGrpo, median_and_mad

OPTIONS = ("epsilon", "scale", "rescale_nonzero", "advantage_clip", "drop_only_if_complete")


def replay(case: Case, expected: dict) -> dict:
    rows = Rows(case)
    defaults = McGrpo.Config()
    plugin = McGrpo(McGrpo.Config(**{name: case.param(name, getattr(defaults, name)) for name in OPTIONS}))
    batch, groups = rows.batch, rows.batch.groups
    size = case.param("rollout_n", int(groups.count().max()))
    run = FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": size}}}))

    plugin.select_rows(run, batch)
    median, mad = median_and_mad(batch.scores, groups)
    advantages = rows.on_all(plugin.estimate_advantage(run, batch))
    found = {
        "advantages": advantages,
        "group_median": rows.on_all(median),
        "group_mad": rows.on_all(mad),
        "pivot_candidate_mask": rows.on_all(batch.scores == median),
        "keep_mask": rows.on_all(~batch.dropped, padding=1),
    }
    if "pivots_dropped_per_uid" in expected:
        found["pivots_dropped_per_uid"] = dropped_per_uid(batch, expected["pivots_dropped_per_uid"])
    found["seq_advantage"] = rows.on_all(plugin._advantage(batch.scores, median, mad, groups))
    return found | (replay_loss(case, plugin, run, rows) if case.has("log_prob") else {})


def dropped_per_uid(batch: Batch, expected: int | list | dict) -> int | list | dict:
    """By uid, in order of first appearance, or one number where all groups lose as many."""
    counts = batch.groups.per_group(batch.groups.sum(batch.dropped & batch.is_last)).tolist()
    if isinstance(expected, dict):
        return dict(zip(batch.groups.labels.tolist(), counts, strict=True))
    assert isinstance(expected, list) or len(set(counts)) == 1, "groups lost different numbers of sessions"
    return counts if isinstance(expected, list) else counts[0]


def kept(batch: Batch) -> Batch:
    """The batch after `select_rows`, as the trainer builds it: it still knows the full one."""
    rows = (~batch.dropped).nonzero()[:, 0]
    fields = {name: batch._source.fetch(name)[rows] for name in ("rm_scores", "response_mask")}
    return Batch.from_tensors(
        uid=batch.uid[rows], session=batch.session[rows], turn=batch.turn[rows], full=batch, **fields
    )


def replay_loss(case: Case, plugin: McGrpo, run: FakeRun, rows: Rows) -> dict:
    part = kept(rows.batch)
    places = rows.real.nonzero()[:, 0][~rows.batch.dropped]
    case.param("authors_loss_type", None)
    count = case.param("token_count", "kept rows only")
    assert count.startswith(("kept", "all")), f"unknown token_count {count!r}"
    config = actor_config(case, None if count.startswith("kept") else int(rows.mask.sum()))
    advantages = plugin.estimate_advantage(run, part).double()
    tokens = make_tokens(case, rows=places, advantages=advantages, config=config)
    loss, _ = compute_policy_loss_vanilla(
        tokens.old_log_probs, tokens.log_probs, advantages, tokens.response_mask, config.loss_agg_mode, config
    )
    weight, kind = case.param("kl_loss_coef", 0.0), case.param("kl_loss_type", "low_var_kl")
    if weight:
        kl = kl_penalty(tokens.log_probs, case.tensor("ref_log_prob")[places], kind)
        loss = loss + weight * aggregate(kl, tokens.response_mask, config)
    loss.backward()
    gradient = torch.zeros(rows.mask.shape, dtype=torch.float64)
    gradient[places] = tokens.log_probs.grad
    return {"loss": loss.item(), "grad_log_prob": gradient}
