"""GRPO: the estimator's hook on a batch."""

from cases import Case, Rows
from fakes import FakeRun

from verl_plugins.advantage.grpo import Grpo, grpo_advantage


def replay(case: Case, expected: dict) -> dict:
    rows = Rows(case)
    scale = "std" if case.param("norm_adv_by_std_in_grpo", True) else "none"
    config = Grpo.Config(scale=scale, epsilon=case.param("epsilon", 1e-6))
    per_row = grpo_advantage(rows.batch.scores, rows.batch.groups, scale, config.epsilon)
    return {
        "advantages": rows.on_all(Grpo(config).estimate_advantage(FakeRun(), rows.batch)),
        "seq_advantage": rows.on_all(per_row),
    }
