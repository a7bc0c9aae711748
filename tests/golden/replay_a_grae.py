"""A-GRAE: the estimator's hook on a batch, and its function, which also has the rows whose response is empty."""

from cases import Case, Rows
from fakes import FakeRun

from verl_plugins.advantage.a_grae import AGrae, asymmetric_advantage

LEVEL = {True: "dynamic", False: "none"}


def replay(case: Case, expected: dict) -> dict:
    rows, run = Rows(case), FakeRun()
    config = AGrae.Config(
        variant=case.param("variant", "paper"),
        alpha=case.param("alpha", 1.0),
        epsilon=case.param("epsilon", 1e-6),
        scale="std" if case.param("norm_adv_by_std_in_grpo", True) else "none",
        sample_level=LEVEL[case.param("sample_level", True)],
        group_level=LEVEL[case.param("group_level", True)],
    )
    scores, groups = rows.batch.scores, rows.batch.groups
    return {
        "advantages": rows.on_all(AGrae(config).estimate_advantage(run, rows.batch)),
        "seq_advantage": rows.on_all(asymmetric_advantage(scores, scores, groups, config)[0]),
        "omega": run.metrics["omega"],
    }
