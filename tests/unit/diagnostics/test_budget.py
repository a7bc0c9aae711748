"""The account of what was generated: counted in agent-loop workers, told by one row of the group, summed per step."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

from verl_plugins import Batch, Plugin, hookimpl
from verl_plugins.bridge import run as bridge_run
from verl_plugins.bridge.defaults import WorkerDefaults
from verl_plugins.bridge.failures import Executor, Failures
from verl_plugins.bridge.group import Session
from verl_plugins.bridge.late import Begun
from verl_plugins.bridge.rollout import PluginAgentLoopWorker
from verl_plugins.composition.manager import Plugins
from verl_plugins.diagnostics.budget import ACCOUNT_FIELD, Account, rollout_budget
from verl_plugins.services import Generated

N, TOKENS, TOOL = 4, 3, 2
ASIDE = [5, 6, 7]
"""An answer asked aside from the group."""


@dataclass
class NoSettings:
    """Of the plugins below."""


class OneMoreGroup(Plugin):
    """Asks twice aside, rolls out two groups and keeps one response of the second."""

    name = "one_more_group"
    Config = NoSettings

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        await sample()
        await run.generate([{"role": "user", "content": "?"}], n=2)
        return (await sample(n=2))[:1]


class AskedAside(Plugin):
    """Asks aside and leaves the group to verl."""

    name = "asked_aside"
    Config = NoSettings

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        await run.generate([{"role": "user", "content": "?"}])


class Worker(PluginAgentLoopWorker):
    """An agent-loop worker without its cluster; every response has two outputs, of the policy's tokens and a tool's."""

    def __init__(self, plugins: Plugins, failing: tuple[int, ...] = ()) -> None:
        self.failures, self._threads, self._begun = Failures(), Executor(), Begun()
        rollout = {"n": N, "val_kwargs": {"n": N}, "seed": 0, "prompt_length": 64, "response_length": 64}
        self.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {"max_response_length": 8}})
        self.rollout_config, self.tokenizer = self.config.actor_rollout_ref.rollout, FakeTokenizer()
        self.plugins, self._seeded, self._failing = plugins, False, failing
        self._has_group_control = plugins.implements("rollout_group")
        plugins.add_fallback(WorkerDefaults())
        self._publisher = self
        self.published: list[Session] = []

    async def _run_agent_loop(self, sampling_params, trajectory, *, session_id, **columns) -> Session:
        if session_id in self._failing:
            raise ValueError("this response fails")
        mask = [1] * TOKENS + [0] * TOOL
        outputs = [
            AgentLoopOutput(
                prompt_ids=[1],
                response_ids=mask,
                response_mask=mask,
                reward_score=0.0,
                metrics={},
                extra_fields={"truncated": False},
            )
            for _ in range(2)
        ]
        return Session(outputs, {"session_id": session_id})

    def single_turn(self) -> Any:
        async def generate(**request: Any) -> Any:
            return SimpleNamespace(token_ids=ASIDE, log_probs=None)

        builder = SimpleNamespace(build_initial_tokens=lambda messages: [1])
        return SimpleNamespace(continuous_token_builder=builder, server_manager=SimpleNamespace(generate=generate))

    async def _rows(self, sessions, validate) -> list[Session]:
        return sessions

    async def publish(self, partition, rows, uid, status) -> None:
        self.published, self.status = rows, status

    def play(self, validate: bool = False) -> list[dict[str, Any]]:
        """The extra fields of all outputs of one group."""
        row = {"uid": "3-1-0", "global_steps": 1, "index": 0, "raw_prompt": []}
        asyncio.run(self._run_prompt(row, {}, {"validate": validate}))
        return [output.extra_fields for session in self.published for output in session.outputs]


def accounts(extra_fields: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [fields[ACCOUNT_FIELD] for fields in extra_fields if ACCOUNT_FIELD in fields]


class TestWorker:
    """One row of a training group tells what the whole group has cost."""

    def test_without_group_control(self) -> None:
        worker = Worker(Plugins([]))
        assert accounts(worker.play()) == [{"responses": N, "tokens": N * 2 * TOKENS}]
        assert worker.status == "finished"

    def test_groups_thrown_away_and_answers_aside(self) -> None:
        worker = Worker(Plugins([OneMoreGroup(NoSettings())]))
        fields = worker.play()
        assert len(fields) == 2
        told = {"responses": N + 2 + 2, "tokens": (N + 2) * 2 * TOKENS + 2 * len(ASIDE)}
        assert accounts(fields) == [told]

    def test_a_group_left_to_verl(self) -> None:
        told = {"responses": N + 1, "tokens": N * 2 * TOKENS + len(ASIDE)}
        assert accounts(Worker(Plugins([AskedAside(NoSettings())])).play()) == [told]

    def test_failed_responses_are_not_counted(self) -> None:
        worker = Worker(Plugins([]), failing=(0, 2))
        assert accounts(worker.play()) == [{"responses": N - 2, "tokens": (N - 2) * 2 * TOKENS}]
        assert worker.status == "failure"
        assert Worker(Plugins([]), failing=tuple(range(N))).play() == []

    @pytest.mark.parametrize("plugins", [[], [OneMoreGroup(NoSettings())]])
    def test_a_group_of_which_nothing_came_back_has_failed(self, plugins) -> None:
        worker = Worker(Plugins(plugins), failing=tuple(range(N + 2)))
        assert worker.play() == []
        assert worker.status == "failure", "verl draws another prompt for it"

    def test_validation_has_no_account(self) -> None:
        fields = Worker(Plugins([OneMoreGroup(NoSettings())])).play(validate=True)
        assert len(fields) == 2 * N
        assert accounts(fields) == []


def make_batch(groups: list[tuple[int, int, int]], order: list[int]) -> Batch:
    """Groups of (prompt id, responses, tokens), two rows each of which the second tells."""
    rows = [(draw, turn) for draw in range(len(groups)) for turn in range(2)]
    rows = [rows[place] for place in order]
    told = [{"responses": responses, "tokens": tokens} for _, responses, tokens in groups]
    return Batch.from_tensors(
        uid=[f"{groups[draw][0]}-1-{draw}" for draw, _ in rows],
        response_mask=torch.ones(len(rows), 1),
        rm_scores=torch.zeros(len(rows), 1),
        extra_fields=[{ACCOUNT_FIELD: told[draw]} if turn else {"turn_scores": []} for draw, turn in rows],
    )


COUNTS = st.integers(1, 10**6)
GROUPS = st.lists(st.tuples(st.integers(0, 5), COUNTS, COUNTS), min_size=1, max_size=8)


class TestStep:
    """Sums and means over the step's prompts."""

    def test_two_draws_of_a_prompt_are_one_prompt(self) -> None:
        batch = make_batch([(7, 4, 40), (8, 2, 10), (7, 4, 60)], list(range(6)))
        assert rollout_budget(batch, Account(3, 30)) == {
            "rollout/responses": 13,
            "rollout/tokens": 140,
            "rollout/responses_per_prompt": 5,
            "rollout/tokens_per_prompt": 55,
            "rollout/tokens_per_prompt_max": 100,
        }

    @settings(max_examples=30, deadline=None)
    @given(GROUPS, st.data())
    def test_laws(self, groups, data) -> None:
        order = data.draw(st.permutations(range(2 * len(groups))))
        aside = data.draw(st.builds(Account, COUNTS, COUNTS))
        found = rollout_budget(make_batch(groups, order), aside)
        prompts = len({prompt for prompt, _, _ in groups})
        for place, name in ((1, "responses"), (2, "tokens")):
            of_groups = sum(group[place] for group in groups)
            assert found[f"rollout/{name}"] == of_groups + getattr(aside, name)
            assert found[f"rollout/{name}_per_prompt"] * prompts == pytest.approx(of_groups)
        assert found["rollout/tokens_per_prompt"] <= found["rollout/tokens_per_prompt_max"] <= found["rollout/tokens"]


class TestDriver:
    """What plugins generate there is told once, whichever plugin asked."""

    def test_generate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rollout = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "response_length": 8}
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
        trainer = SimpleNamespace(config=config, global_steps=1, seed=0, awake_replicas=nullcontext)
        run = bridge_run.DriverRun(trainer)

        async def ask(self, prompts, params, seeds):
            return [[Generated(ASIDE, [], "")] * seeds.shape[1] for _ in prompts]

        monkeypatch.setattr(bridge_run.DriverRun, "_ask", ask)
        run.scoped("one").generate([[1], [2]], n=3)
        run.scoped("other").generate([[1]])
        assert run.account.take() == Account(7, 7 * len(ASIDE))
        assert run.account.take() == Account()
