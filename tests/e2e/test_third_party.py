"""Packages from outside this repository train: the example, and one that `verl-plugins new` has just written."""

from __future__ import annotations

from pathlib import Path

import pytest
from packages import EXAMPLE, install
from training import SHORT, train

from verl_plugins.scaffold import create

pytestmark = pytest.mark.e2e


def test_an_estimator_and_a_loss_of_two_packages_train_together(tmp_path: Path) -> None:
    site = tmp_path / "site"
    create("doubtful", "policy_loss", tmp_path)
    install(EXAMPLE, site)
    install(tmp_path / "doubtful", site)
    steps = "trainer.total_training_steps=2"
    run = train("rank_advantage+doubtful", tmp_path / "run", *SHORT, steps, "plugins.doubtful.gamma=2.0", site=site)
    assert len(run.steps) == 2
    for step in run.steps:
        equal = 1 - step["health/mixed_groups"]
        assert step["plugins/rank_advantage/zero_advantage_rows"] == pytest.approx(equal, abs=1e-6)
        assert 0 < step["plugins/doubtful/weight_mean"] < 1
        assert step["actor/grad_norm"] > 0
    assert "plugins/grpo/zero_advantage_rows" not in run.steps[0], "the estimator replaces grpo's"
