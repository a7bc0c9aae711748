"""Columns of a row, as the role of an agent is one: from the dataset, the agent loop and the loop's own name."""

from __future__ import annotations

from typing import Any

import pytest
from agents import EOS, Agents, Servers, answer, prompt
from test_segments import opened

from verl_plugins import DataError
from verl_plugins.bridge.loops import SingleTurn

ROLES = ("planner", "solver")


class Pair(SingleTurn):
    """Two outputs of a session, each with a role."""

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [await super(Pair, self).run(*args, **kwargs) for _ in ROLES]
        for role, output in zip(ROLES, outputs, strict=True):
            output.extra_fields["role"] = role
        return outputs


class Forgetful(Pair):
    """Names one of them only."""

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = await super().run(*args, **kwargs)
        del outputs[1].extra_fields["role"]
        return outputs


def seen(agents: Agents, name: str, loop: type | None = None, **columns: Any) -> Any:
    """The rows of a draw, and what the scorer was given with them."""
    told = []

    async def score(data: Any) -> list[dict[str, Any]]:
        told.append(data.non_tensor_batch)
        return [{"reward_score": 1.0, "reward_extra_info": {"acc": 1.0}} for _ in data]

    if loop is not None:
        agents.register(name, loop)
    worker = agents.worker(Servers(lambda ids, number: answer([7, EOS])), score=score)
    failures = agents.generate(worker, prompt(agent_name=name, **columns))
    assert not failures.failed, failures.sentence()
    return opened(agents.queue), told


def test_every_output_has_its_own_role_and_the_dataset_s_columns(agents: Agents) -> None:
    batch, told = seen(agents, "pair", Pair, stratum=3)
    assert batch.turn.tolist() == [0, 1, 0, 1]
    assert batch.labels("role") == [*ROLES, *ROLES]
    assert batch.labels("stratum") == ["3"] * 4
    assert batch.labels("agent_name") == ["pair"] * 4
    assert all(set(columns["agent_name"]) == {"pair"} for columns in told)


def test_verl_s_own_loop_is_a_name_as_well(agents: Agents) -> None:
    batch, _ = seen(agents, "single_turn_agent")
    assert batch.labels("agent_name") == ["single_turn_agent"] * 2


def test_a_role_that_only_some_outputs_have_is_named(agents: Agents, sentence) -> None:
    batch, _ = seen(agents, "forgetful", Forgetful)
    with pytest.raises(DataError) as error:
        batch.labels("role")
    sentence(error.value, "row 0-1-0_0_1 has no field 'role'")
