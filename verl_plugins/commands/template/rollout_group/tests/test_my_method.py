"""My method: how many groups are generated, by hand."""

import asyncio

import pytest
from my_method.method import MyMethod

from verl_plugins import Prompt, Rollout
from verl_plugins.testing import FakeRun


@pytest.mark.parametrize(("right_from", "attempts"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_by_hand(right_from: int, attempts: int) -> None:
    groups: list[list[Rollout]] = []

    async def sample() -> list[Rollout]:
        right = len(groups) + 1 >= right_from
        groups.append([Rollout("", [], float(right), right, False, {}, None)])
        return groups[-1]

    run, plugin = FakeRun(), MyMethod(MyMethod.Config(attempts=3))
    found = asyncio.run(plugin.rollout_group(run, Prompt(0, {}), sample))
    assert found is groups[-1]
    assert run.metrics == {"attempts": attempts} == {"attempts": len(groups)}
