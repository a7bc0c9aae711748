"""`truncated` is true whatever cut an answer off, and false for one that ended at its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from agents import EOS, GROUP, OTHER_EOS, TOKENIZER, Agents, Servers, answer, prompt
from verl.tools import function_tool
from verl.tools.function_tool import FunctionTool

from verl_plugins import Plugin, hookimpl
from verl_plugins.bridge.loops import TOOLS, SingleTurn
from verl_plugins.bridge.rows import TRUNCATED

LENGTHS = ("data.max_prompt_length=16", "data.max_response_length=8")


def truncated(agents: Agents, worker: Any, **columns: Any) -> bool:
    """Of the rows of one group, which agree."""
    failures = agents.generate(worker, prompt(**columns))
    assert agents.queue.status == {"0-1-0": "finished"}, failures.causes
    (found,) = {bool(row[TRUNCATED]) for row in agents.queue.rows.values()}
    assert not any("truncated" in row["extra_fields"] for row in agents.queue.rows.values())
    return found


CASES = [
    # answer, stop reason, own budget, model's positions -> cut off
    pytest.param([7] * 8, "completed", None, 64, True, id="response length, and the server does not say"),
    pytest.param([7] * 8, None, None, 64, True, id="response length, and the server says nothing"),
    pytest.param([7] * 8, "length", None, 64, True, id="response length, and the server says so"),
    pytest.param([7] * 7 + [EOS], "completed", None, 64, False, id="ends at the response length"),
    pytest.param([7] * 7 + [EOS], "length", None, 64, False, id="ends at the response length, and the server errs"),
    pytest.param([7] * 8, "stop", None, 64, False, id="ends at the response length by something else"),
    pytest.param([7] * 7 + [OTHER_EOS], "completed", None, 64, False, id="ends with the model's other end token"),
    pytest.param([7] * 3, "completed", 3, 64, True, id="budget of the prompt"),
    pytest.param([7] * 2 + [EOS], "completed", 3, 64, False, id="ends at the budget of the prompt"),
    pytest.param([7] * 6, "length", None, 64, True, id="the server stops early for want of room"),
    pytest.param([7] * 6, "completed", None, 10, True, id="positions of the model"),
    pytest.param([7] * 5 + [EOS], "completed", None, 10, False, id="ends at the last position"),
    pytest.param([7] * 9, "completed", 9, 64, True, id="the loop cuts what is longer than the response length"),
    pytest.param([7] * 8 + [EOS], "completed", 9, 64, True, id="the loop cuts the end token off"),
    pytest.param([7] * 2, "aborted", None, 64, True, id="interrupted"),
    pytest.param([7] * 2, "abort", None, 64, True, id="interrupted, in SGLang's word"),
    pytest.param([], "aborted", None, 64, True, id="interrupted before the first token"),
    pytest.param([EOS], "completed", None, 64, False, id="ends at once"),
    pytest.param([], "completed", None, 64, False, id="ends at once, and the server keeps the end token"),
    pytest.param([7] * 3, "completed", None, 64, False, id="ends by a stop string"),
]


class TestSingleTurn:
    @pytest.mark.parametrize(("ids", "reason", "budget", "positions", "expected"), CASES)
    def test_row(self, agents, ids, reason, budget, positions, expected) -> None:
        servers = Servers(lambda *_: answer(ids, reason))
        worker = agents.worker(servers, *LENGTHS, f"actor_rollout_ref.rollout.max_model_len={positions}")
        assert truncated(agents, worker, **({} if budget is None else {"__max_tokens__": budget})) is expected

    def test_an_end_token_that_is_ignored_does_not_end(self, agents) -> None:
        servers = Servers(lambda *_: answer([7] * 7 + [EOS]))
        assert truncated(agents, agents.worker(servers, *LENGTHS, "actor_rollout_ref.rollout.ignore_eos=true"))

    @pytest.mark.parametrize(("last", "expected"), [(7, True), (EOS, False)])
    def test_a_plugin_sees_the_same(self, agents, last, expected) -> None:
        """Also of a budget that it gives one session."""
        seen = []

        class Looks(Plugin):
            name = "looks"

            @hookimpl
            async def rollout_group(self, run, prompt, sample):
                found = await sample(max_tokens=2)
                seen.extend(rollout.truncated for rollout in found)
                return found

        worker = agents.worker(Servers(lambda *_: answer([7, last])), *LENGTHS, plugins=[Looks(None)])
        assert truncated(agents, worker) is expected
        assert seen == [expected] * 2


CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def ids(text: str, end: bool = True) -> list[int]:
    return TOKENIZER(text)["input_ids"] + [EOS] * end


def look(much: int = 1) -> str:
    """Looks.

    Args:
        much: how much is seen
    """
    return "seen " * much


TOOL = [FunctionTool("look", look, function_tool._build_schema_from_fn(look, "look"))]
MUCH = CALL.replace("{}", '{"much": 40}')
MULTI = "actor_rollout_ref.rollout.multi_turn"
TURNS = [
    # what the policy says in each turn, settings -> cut off
    pytest.param([ids("2")], [], False, id="no tool"),
    pytest.param([ids(CALL), ids("2")], [], False, id="the policy has the last word"),
    pytest.param([ids(CALL), ids(CALL), ids("2")], [f"{MULTI}.max_assistant_turns=3"], False, id="within its turns"),
    pytest.param([ids(CALL), ids(CALL)], [f"{MULTI}.max_assistant_turns=2"], True, id="turns of the policy"),
    pytest.param([ids(CALL), ids(CALL)], [f"{MULTI}.max_user_turns=1"], True, id="turns of the tool"),
    pytest.param([ids(CALL), ids("2", end=False)], [], False, id="stopped by something else"),
    pytest.param([ids(MUCH), ids("2")], [], True, id="the tool's answer does not fit"),
    pytest.param([ids(CALL), ids("2" * 200)], [], True, id="the last answer is longer than what is left"),
    pytest.param([ids("2" * 199)], [], False, id="ends at the response length"),
    pytest.param([ids("2" * (199 - len(CALL)) + CALL)], [], True, id="asks for a tool at the response length"),
    pytest.param([ids("2" * 200, end=False)], [], True, id="response length in the first turn"),
    pytest.param([ids(CALL), []], [], False, id="says nothing after the tool"),
    pytest.param([[]], [], False, id="says nothing at all"),
]


class TestTools:
    """A conversation with a tool ends in one of several ways."""

    @pytest.mark.parametrize(("turns", "settings", "expected"), TURNS)
    def test_row(self, agents, turns, settings, expected) -> None:
        def give(prompt_ids: Any, _: int) -> Any:
            return answer(turns[list(prompt_ids).count(EOS)])

        long = ("data.max_prompt_length=64", "data.max_response_length=200")
        servers = Servers(give)
        worker = agents.worker(servers, *long, "actor_rollout_ref.rollout.max_model_len=264", *settings)
        worker.tools = TOOL
        assert truncated(agents, worker, agent_name=TOOLS) is expected
        assert len(servers.asked) == GROUP * len(turns) or expected


class TestTurns:
    """The loop with tools says where each turn of the policy ends, also where a tool says nothing."""

    @pytest.mark.parametrize("much", [1, 0], ids=["the tool answers", "the tool says nothing"])
    def test_ends_of_turns(self, agents, much) -> None:
        call = CALL.replace("{}", f'{{"much": {much}}}')
        turns = [ids(call), ids("23")]
        long = ("data.max_prompt_length=64", "data.max_response_length=300")
        servers = Servers(lambda prompt_ids, _: answer(turns[list(prompt_ids).count(EOS)]))
        worker = agents.worker(servers, *long, "actor_rollout_ref.rollout.max_model_len=364")
        worker.tools = TOOL
        assert not truncated(agents, worker, agent_name=TOOLS)
        for row in agents.queue.rows.values():
            first, last = row["extra_fields"]["turn_ends"]
            assert first == len(turns[0]) - 1 and last == len(row["response_mask"]) - 1
            assert row["response_mask"][first] == row["response_mask"][last] == 1

    def test_of_what_was_cut_only_what_is_there(self, agents) -> None:
        turns = [ids(CALL), ids("2" * 200)]
        long = ("data.max_prompt_length=64", "data.max_response_length=200")
        servers = Servers(lambda prompt_ids, _: answer(turns[list(prompt_ids).count(EOS)]))
        worker = agents.worker(servers, *long, "actor_rollout_ref.rollout.max_model_len=264")
        worker.tools = TOOL
        assert truncated(agents, worker, agent_name=TOOLS)
        for row in agents.queue.rows.values():
            assert row["extra_fields"]["turn_ends"][-1] == len(row["response_mask"]) - 1 == 199


class TestOtherLoops:
    """An agent loop of somebody else's says how it ended, or is asked what the servers said."""

    @pytest.mark.parametrize("said", [True, False])
    def test_its_word_counts(self, agents, said) -> None:
        class Says(SingleTurn):
            async def run(self, *args: Any, **kwargs: Any) -> Any:
                output = await super().run(*args, **kwargs)
                output.extra_fields["truncated"] = said
                return output

        worker = self.with_loop(agents, Says, [7, EOS] if said else [7] * 8)
        assert truncated(agents, worker, agent_name="somebody_s") is said

    @pytest.mark.parametrize(("ids", "expected"), [([7] * 8, True), ([7] * 3, False), ([7] * 7 + [EOS], False)])
    def test_one_that_asks_no_server_of_ours(self, agents, ids, expected) -> None:
        class Elsewhere(SingleTurn):
            async def run(self, *args: Any, **kwargs: Any) -> Any:
                output = await super().run(*args, **kwargs)
                output.response_ids, output.response_mask = ids, [1] * len(ids)
                output.response_logprobs = [-1.0] * len(ids)
                return output

        worker = self.with_loop(agents, Elsewhere, [9])
        assert truncated(agents, worker, agent_name="somebody_s") is expected

    def test_the_last_words_are_the_tool_s(self, agents) -> None:
        class Tool(SingleTurn):
            async def run(self, *args: Any, **kwargs: Any) -> Any:
                output = await super().run(*args, **kwargs)
                output.response_ids, output.response_mask = [7, EOS, 3, 3, 3, 3, 3, 3], [1, 1, 0, 0, 0, 0, 0, 0]
                output.response_logprobs = [-1.0] * 8
                return output

        assert truncated(agents, self.with_loop(agents, Tool, [7, EOS]), agent_name="somebody_s")

    def test_each_output_has_its_own_end(self, agents) -> None:
        """A session of two outputs, the first of which was cut off."""

        class Two(SingleTurn):
            async def run(self, sampling_params: Any, **kwargs: Any) -> Any:
                params = [{**sampling_params, "max_tokens": 8}, {**sampling_params, "max_tokens": 2}]
                return [await super(Two, self).run(one, **kwargs) for one in params]

        worker = self.with_loop(agents, Two)
        servers = worker.llm_client._client
        servers.give = lambda *_: answer([7] * 8 if servers.asked[-1]["max_tokens"] == 8 else [9, EOS])
        agents.generate(worker, prompt(agent_name="somebody_s"))
        assert {key[-1]: bool(row[TRUNCATED]) for key, row in agents.queue.rows.items()} == {"0": True, "1": False}

    def with_loop(self, agents: Agents, loop: type, ids: Sequence[int] = ()) -> Any:
        worker = agents.worker(Servers(lambda *_: answer(ids)), *LENGTHS)
        agents.register("somebody_s", loop)
        return worker
