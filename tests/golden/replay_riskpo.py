"""RiskPO: stages `advantage` (bundles given), `state` (the tracker) and `bundling`."""

import torch
from cases import Case, Rows, in_order_of

from verl_plugins import Groups
from verl_plugins.advantage.riskpo import (
    EPSILON,
    LEVELS,
    STD_GUARD,
    Papers,
    RiskPo,
    at_level,
    averages,
    bundle_quantiles,
    bundle_std,
    make_papers,
    nearest,
    risk,
    share_out,
    track,
)

USUAL = RiskPo.Config()
"""For settings that a case leaves out."""


def replay(case: Case, expected: dict) -> dict:
    if case.has("bundle_scores_per_step"):
        return replay_tracker(case)
    return replay_advantage(case, expected) if case.has("bundle_uid") else replay_bundling(case)


def replay_bundling(case: Case) -> dict:
    groups = Groups([name for name in case.input("uid") if not str(name).startswith("pad")])
    real = [not str(name).startswith("pad") for name in case.input("uid")]
    index = torch.full((len(real),), -1)
    index[torch.tensor(real)] = groups.index // case.param("bundle_size")
    return {"bundle_index": index}


def config_of(case: Case) -> RiskPo.Config:
    mixing, upper = case.param("use_mixing_risk_measure", False), case.param("risk_seeking_upper_tail", False)
    weights = {"mixed": case.param("w_mix", 1.5), "upper_tail": case.param("upper_weight", 1.5), "rvar": 1.5}
    objective = "mixed" if mixing else "upper_tail" if upper else "rvar"
    assert case.param("epsilon", EPSILON) == EPSILON
    return RiskPo.Config(
        quantile_down=case.param("quantile_down", USUAL.quantile_down),
        quantile_up=case.param("quantile_up", USUAL.quantile_up),
        quantiles=case.param("use_q_track_mode", USUAL.quantiles),
        objective=objective,
        tail_weight=weights[objective],
        credit=case.param("credit_assign_mode", USUAL.credit),
        scale="std" if case.param("norm_adv_by_std_in_grpo", True) else "none",
        natural_baseline_adv=case.param("natural_baseline_adv", False),
        mean_baseline=case.param("use_mean_as_baseline", False),
    )


def replay_advantage(case: Case, expected: dict) -> dict:
    rows, config = Rows(case), config_of(case)
    batch, groups = rows.batch, rows.batch.groups
    case.param("natural_baseline_base", True)  # acts within the averages, which are given
    names = [name for name, real in zip(case.input("bundle_uid"), rows.real.tolist(), strict=True) if real]
    bundles = Groups(names)
    papers = make_papers(batch.scores, groups, batch.session, groups.per_group(bundles.index))
    low, high = limits(case, config, papers)
    average = (case.param("g_rvar_avg", 0.0), case.param("g_cvar_avg", 0.0))
    advantage = risk(papers.scores, low, high, config, average)
    std = bundle_std(papers, case.param("bundle_std_guard", STD_GUARD))
    advantage = advantage / (std + EPSILON) if config.scale == "std" else advantage
    given = batch.of_session(share_out(advantage, papers, batch.scores, groups, config.credit))
    scores = [row[there].tolist() for row, there in zip(papers.scores, papers.there, strict=True)]
    order = in_order_of(expected.get("bundle_ids"), bundles.labels)
    return {
        "advantages": rows.on_all(batch.to_tokens(given)),
        "seq_advantage": rows.on_all(given),
        "bundle_ids": bundles.labels[order].tolist(),
        "bundle_scores": [scores[bundle] for bundle in order],
    }


def limits(case: Case, config: RiskPo.Config, papers: Papers) -> list[torch.Tensor]:
    """What the plugin takes, the tracked quantiles being given at the two levels only."""
    plugin = RiskPo(config)
    down, up = case.param("q_track_down", None), case.param("q_track_up", None)
    if down is not None:
        plugin.tracked = torch.full((len(LEVELS),), torch.nan, dtype=torch.float64)
        for level, value in ((config.quantile_down, down), (config.quantile_up, up)):
            plugin.tracked[nearest(level)] = value
    low, high = plugin.limits(papers)
    if down is None or config.quantiles == "batch":
        own = bundle_quantiles(papers, [config.quantile_down, config.quantile_up])
        assert torch.equal(low, own[0]) and torch.equal(high, own[1])
    return low, high


def replay_tracker(case: Case) -> dict:
    torch.testing.assert_close(LEVELS, torch.tensor(case.param("alpha_list", LEVELS.tolist()), dtype=torch.float64))
    levels = [case.param(name, getattr(USUAL, name)) for name in ("quantile_down", "quantile_up")]
    base, step = case.param("natural_baseline_base", True), case.param("lr_q", USUAL.lr_q)
    found = {name: [] for name in ("q", "q_track_down", "q_track_up", "g_rvar_avg", "g_cvar_avg")}
    tracked = torch.zeros(0, dtype=torch.float64)
    for scores in case.input("bundle_scores_per_step"):
        tracked = track(tracked, torch.tensor(scores, dtype=torch.float64), step)
        low, high = (at_level(tracked, level) for level in levels)
        values = (tracked.tolist(), float(low), float(high), *averages(tracked, low, high, base))
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return {f"{name}_per_step": values for name, values in found.items()}
