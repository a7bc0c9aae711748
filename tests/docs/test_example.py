"""The example package: its formula, its hook, and the package as a third party installs it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import FakeRun

from verl_plugins import Batch, Groups

EXAMPLE = Path(__file__).parents[2] / "examples" / "rank_advantage"
COMMAND = Path(sys.executable).with_name("verl-plugins")


@pytest.fixture
def method(site):
    """The example's module, installed in a throw-away site with the entry points of its pyproject.toml."""
    shutil.copytree(EXAMPLE / "rank_advantage", site.path / "rank_advantage")
    section = (EXAMPLE / "pyproject.toml").read_text().split("[project.entry-points.verl_plugins]")[1]
    site.distribution("rank-advantage", "0.1.0", **dict(re.findall(r'^(\w+) = "(.+)"$', section, re.MULTILINE)))
    import rank_advantage.method

    return rank_advantage.method


class TestFormula:
    """Worst -bound, best +bound, evenly spaced between, ties at their average."""

    @pytest.mark.parametrize(
        ("scores", "expected"),
        [
            ([0.0, 10.0, 1.0], [-2.0, 2.0, 0.0]),  # ranks 0, 2, 1 of K-1 = 2
            ([1.0, 0.0, 0.0, 0.0], [2.0, -2 / 3, -2 / 3, -2 / 3]),  # ranks 3 and three times 1
            ([0.3, 0.3, 0.3], [0.0, 0.0, 0.0]),
            ([5.0], [0.0]),
        ],
    )
    def test_by_hand(self, method, scores, expected):
        groups = Groups(["1-1-0"] * len(scores))
        found = method.rank_advantage(torch.tensor(scores), groups, bound=2.0)
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_groups_do_not_mix(self, method):
        scores, groups = torch.tensor([0.0, 7.0, 1.0, 3.0]), Groups(["a", "b", "a", "b"])
        assert method.rank_advantage(scores, groups, bound=1.0).tolist() == [-1.0, 1.0, 1.0, -1.0]


def test_hook(method):
    batch = Batch.from_tensors(
        uid=["3-1-0", "3-1-0", "7-1-1"],
        rm_scores=torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]),
        response_mask=torch.tensor([[1, 1], [1, 0], [1, 1]]),
    )
    run, plugin = FakeRun(), method.RankAdvantage(method.RankAdvantage.Config())
    assert plugin.estimate_advantage(run, batch).tolist() == [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]
    assert run.metrics["zero_advantage_rows"] == pytest.approx(1 / 3)


def test_installed_package(method):
    """Listed with its recipe, and composed in the place of grpo's estimator."""

    def command(*args: str) -> str:
        return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=True).stdout

    found = json.loads(command("list", "--json"))
    for kind in ("recipes", "plugins"):
        assert any(item["distribution"] == "rank-advantage" for item in found[kind])
    estimator = "#   estimate_advantage: rank_advantage (implements), grpo (default)"
    assert estimator in command("run", "vade+rank_advantage", "--preset", "cpu", "--dry-run")
    assert estimator in command("run", "grpo", "--preset", "cpu", "--dry-run", "+plugins.rank_advantage={}")
