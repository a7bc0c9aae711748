"""Responses without a token, and prompts that are longer than they may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agents import EOS, GROUP, Agents, Servers, answer, prompt
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_plugins import Batch, Plugin, hookimpl
from verl_plugins.bridge.loops import TOOLS
from verl_plugins.bridge.rows import TRUNCATED


async def count(data: Any) -> list[dict[str, Any]]:
    """Scores a response by the number of its tokens; one more, so that none is 0."""
    scores = [float(n + 1) for n in (data.batch["responses"] != 0).sum(-1)]
    return [{"reward_score": score, "reward_extra_info": {}} for score in scores]


class TestEmptyResponse:
    """It is a row: one end token that the policy did not generate bears its reward."""

    @pytest.mark.parametrize("agent", ["single_turn_agent", TOOLS])
    @pytest.mark.parametrize("log_probs", [True, False])
    def test_row(self, agents: Agents, agent: str, log_probs: bool) -> None:
        told = iter([[], [7, EOS]])
        calculated = f"actor_rollout_ref.rollout.calculate_log_probs={str(log_probs).lower()}"

        def give(*_: Any) -> Any:
            given = answer(next(told), "completed")
            return given if log_probs else given.model_copy(update={"log_probs": None})

        worker = agents.worker(Servers(give), calculated, score=count)
        failures = agents.generate(worker, prompt(agent_name=agent))
        assert (agents.queue.status, failures.causes) == ({"0-1-0": "finished"}, {})
        rows = [agents.queue.rows[f"0-1-0_{session}_0"] for session in range(GROUP)]
        (empty,) = [row for row in rows if row["responses"].tolist() == [EOS]]
        assert empty["response_mask"].tolist() == empty["loss_mask"].tolist() == [0]
        assert empty["rm_scores"].tolist() == [2.0]
        assert empty["input_ids"].tolist() == [*empty["prompts"].tolist(), EOS]
        assert not empty[TRUNCATED]
        assert all(("rollout_log_probs" in row) is log_probs for row in rows)
        assert not log_probs or empty["rollout_log_probs"].tolist() == [0.0]
        names = ("responses", "response_mask", "rm_scores", "input_ids", "loss_mask")
        list_of_dict_to_tensordict([{name: row[name] for name in names} for row in rows])

    def test_all_of_the_first_rows_are_empty(self, agents: Agents) -> None:
        """What is missing in them is not missed in the next."""
        worker = agents.worker(Servers(lambda ids, n: answer([] if n < GROUP else [7, EOS])))
        agents.generate(worker, prompt(0))
        assert agents.generate(worker, prompt(1)).causes == {}
        assert agents.queue.status == {"0-1-0": "finished", "1-1-0": "finished"}

    def test_in_a_batch(self) -> None:
        batch = Batch.from_tensors(
            uid=["0-1-0"] * 2,
            responses=torch.tensor([[EOS, 0], [7, EOS]]),
            response_lengths=torch.tensor([1, 2]),
            response_mask=torch.tensor([[0, 0], [1, 1]]),
            rm_scores=torch.tensor([[0.5, 0.0], [0.0, 1.0]]),
        )
        assert batch.scores.tolist() == [0.5, 1.0]
        assert batch.to_tokens(batch.scores).tolist() == [[0.0, 0.0], [1.0, 1.0]]

    def test_no_output_at_all_fails_the_session(self, agents: Agents) -> None:
        from verl_plugins.bridge.loops import SingleTurn

        class Nothing(SingleTurn):
            async def run(self, *args: Any, **kwargs: Any) -> Any:
                return []

        worker = agents.worker(Servers(lambda *_: answer([7, EOS])))
        agents.register("somebody_s", Nothing)
        failures = agents.generate(worker, prompt(agent_name="somebody_s"))
        assert agents.queue.status == {"0-1-0": "failure"}
        assert list(failures.causes) == ["the agent loop gave no output for a session"]


class TestLongPrompts:
    """None loses its beginning: the sessions fail, and the sentence says what would help."""

    LIMIT = ("data.max_prompt_length=16",)

    def refused(self, agents: Agents, tokens: int, *plugins: Plugin, sentence: Any, **columns: Any) -> None:
        servers = Servers(lambda *_: answer([7, EOS]))
        failures = agents.generate(agents.worker(servers, *self.LIMIT, plugins=plugins), prompt(**columns))
        assert agents.queue.status == {"0-1-0": "failure"} and servers.asked == []
        sentence(next(iter(failures.causes)), f"the prompt has {tokens} tokens", f"data.max_prompt_length={tokens}")

    @pytest.mark.parametrize("agent", ["single_turn_agent", TOOLS])
    def test_messages(self, agents: Agents, agent: str, sentence: Any) -> None:
        messages = [{"role": "user", "content": "1" * 17}]
        self.refused(agents, 17, sentence=sentence, agent_name=agent, raw_prompt=messages)

    def test_what_a_plugin_puts_behind_them(self, agents: Agents, sentence: Any) -> None:
        self.refused(agents, 20, sentence=sentence, __prefill__="1" * 16)

    def test_messages_of_a_plugin_s_own(self, agents: Agents, sentence: Any) -> None:
        class Longer(Plugin):
            name = "longer"

            @hookimpl
            async def rollout_group(self, run, prompt, sample):
                return await sample(messages=[{"role": "user", "content": "1" * 18}])

        self.refused(agents, 18, Longer(None), sentence=sentence)

    def test_a_loop_of_somebody_else_s(self, agents: Agents, sentence: Any) -> None:
        from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

        class Theirs(SingleTurnAgentLoop):
            pass

        agents.register("somebody_s", Theirs)
        messages = [{"role": "user", "content": "1" * 17}]
        self.refused(agents, 17, sentence=sentence, agent_name="somebody_s", raw_prompt=messages)

    @pytest.mark.parametrize("content", ["1" * 16, "1"])
    def test_what_fits_is_asked_whole(self, agents: Agents, content: str) -> None:
        servers = Servers(lambda *_: answer([7, EOS]))
        worker = agents.worker(servers, *self.LIMIT)
        agents.generate(worker, prompt(raw_prompt=[{"role": "user", "content": content}]))
        assert [len(one["prompt_ids"]) for one in servers.asked] == [len(content)] * GROUP


@pytest.mark.parametrize(("server", "name"), [("transformers", "seed"), ("vllm", "seed"), ("sglang", "sampling_seed")])
def test_each_session_has_a_seed_by_the_name_that_its_server_knows(agents: Agents, server: str, name: str) -> None:
    """SGLang refuses every request that has another."""
    asked = (f"actor_rollout_ref.rollout.name={server}", "actor_rollout_ref.rollout.full_determinism=true")
    servers = Servers(lambda ids, n: answer([7, EOS]))
    assert agents.generate(agents.worker(servers, *asked), prompt(0), prompt(1)).causes == {}
    assert all({"seed", "sampling_seed"} & request.keys() == {name} for request in servers.asked)
    assert len({request[name] for request in servers.asked}) == 2 * GROUP
