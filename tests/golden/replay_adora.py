"""ADORA: the rule, and the wrapper around GRPO."""

import torch
from cases import Case, Rows

from verl_plugins.advantage.adora import Adora, generated, group_lengths, is_advantageous
from verl_plugins.advantage.grpo import grpo_advantage


def replay(case: Case, expected: dict) -> dict:
    rows, defaults = Rows(case), Adora.Config()
    batch, groups = rows.batch, rows.batch.groups
    plugin = Adora(
        Adora.Config(
            variant=case.param("variant", "llm"),
            tds_weight=case.param("lamda", defaults.tds_weight),
            tas_weight=case.param("tas_weight", defaults.tas_weight),
            success_rate_tau=case.param("success_rate_tau", defaults.success_rate_tau),
        )
    )
    # The threshold of the authors' scripts may lie beyond the width of the case, which the plugin refuses.
    lengths = generated(batch)
    cut_off = lengths >= case.param("max_length_threshold")
    found = group_lengths(lengths, batch.scores > case.param("correct_score"), cut_off, groups)
    advantageous = is_advantageous(found, plugin.config.variant, plugin.config.success_rate_tau)
    weight = torch.where(advantageous, *plugin.weights())[groups.index]
    base = grpo_advantage(batch.scores, groups, epsilon=case.param("epsilon", 1e-6))
    return {
        "weight": rows.on_all(weight, padding=1.0),
        "seq_advantage": rows.with_lone(base * weight, batch.scores * weight, expected, "seq_advantage"),
        "advantages": rows.with_lone(
            batch.to_tokens(base) * weight[:, None], batch.scores * weight, expected, "advantages"
        ),
    }
