"""A-GRAE: the estimator's hook on a batch, and its function, which also has the rows whose response is empty."""

from cases import Case, Rows
from fakes import FakeRun

from verl_plugins.advantage.a_grae import AGrae, asymmetric_advantage, positive_scale


def level(given: bool | str) -> str:
    """On, off, or one of the paper's controls by name."""
    return given if isinstance(given, str) else "dynamic" if given else "none"


def replay(case: Case, expected: dict) -> dict:
    rows, run = Rows(case), FakeRun()
    config = AGrae.Config(
        variant=case.param("variant", "paper"),
        alpha=case.param("alpha", 1.0),
        epsilon=case.param("epsilon", 1e-6),
        scale="std" if case.param("norm_adv_by_std_in_grpo", True) else "none",
        sample_level=level(case.param("sample_level", True)),
        group_level=level(case.param("group_level", True)),
    )
    scores, groups = rows.batch.scores, rows.batch.groups
    found = {
        "advantages": AGrae(config).estimate_advantage(run, rows.batch),
        "seq_advantage": asymmetric_advantage(scores, scores, groups, config)[0],
    }
    omega = run.metrics["omega"]
    alone = scores * positive_scale(omega, config.alpha, config.group_level)
    alone = alone / (1 + config.epsilon) if config.scale == "std" else alone
    return {name: rows.with_lone(values, alone, expected, name) for name, values in found.items()} | {"omega": omega}
