"""Whatever is raised between drawing a prompt and storing its status, nothing waits for it and the cause is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agents import EOS, GROUP, TOKENIZER, Agents, Ended, Servers, answer, prompt, right
from fakes import FakeDataset, FakeRun
from verl.tools import function_tool
from verl.tools.function_tool import FunctionTool
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder

from verl_plugins import Batch, Plugin, hookimpl
from verl_plugins.bridge import launch, rows
from verl_plugins.bridge.drawing import DrawsPrompts
from verl_plugins.bridge.estimating import EstimatesAdvantage
from verl_plugins.bridge.loops import TOOLS
from verl_plugins.bridge.queue import QueueSource
from verl_plugins.composition.manager import Plugins

BAD, GOOD = "0-1-0", "1-1-0"


class Mute(Exception):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


RAISED = [
    pytest.param(lambda: ValueError("injected"), "ValueError: injected", id="ordinary"),
    pytest.param(lambda: asyncio.CancelledError("injected"), "CancelledError", id="cancelled"),
    pytest.param(lambda: SystemExit("injected"), "SystemExit: injected", id="exit"),
    pytest.param(lambda: KeyboardInterrupt("injected"), "KeyboardInterrupt: injected", id="interrupt"),
    pytest.param(lambda: StopIteration("injected"), "StopIteration", id="stop iteration"),
    pytest.param(lambda: asyncio.TimeoutError("injected"), "TimeoutError: injected", id="timeout"),
    pytest.param(Mute, "Mute", id="mute"),
]
Make = Callable[[], BaseException]


def bad(ids: Any) -> bool:
    return "bad" in TOKENIZER.decode(list(ids))


def both() -> list[dict[str, Any]]:
    """A prompt where it happens, and another."""
    return [
        prompt(0, raw_prompt=[{"role": "user", "content": "bad"}]),
        prompt(1, raw_prompt=[{"role": "user", "content": "good"}]),
    ]


SERVERS = Servers(lambda *_: answer([7, EOS]))


def template(agents: Agents, make: Make, monkeypatch: pytest.MonkeyPatch) -> Any:
    build = ContinuousTokenBuilder.build_initial_tokens

    def broken(self: Any, messages: Any, **options: Any) -> list[int]:
        if messages[0]["content"] == "bad":
            raise make()
        return build(self, messages, **options)

    monkeypatch.setattr(ContinuousTokenBuilder, "build_initial_tokens", broken)
    return agents.worker(SERVERS)


def generate(agents: Agents, make: Make, _: Any) -> Any:
    return agents.worker(Servers(lambda ids, _: make() if bad(ids) else answer([7, EOS])))


def score(agents: Agents, make: Make, _: Any) -> Any:
    async def broken(data: Any) -> Any:
        if 0 in data.non_tensor_batch["index"]:
            raise make()
        return await right(data)

    return agents.worker(SERVERS, score=broken)


def too_few_scores(agents: Agents, make: Make, _: Any) -> Any:
    async def broken(data: Any) -> Any:
        return (await right(data))[1:] if 0 in data.non_tensor_batch["index"] else await right(data)

    return agents.worker(SERVERS, score=broken)


def group(agents: Agents, make: Make, _: Any) -> Any:
    class Broken(Plugin):
        name = "broken"

        @hookimpl
        async def rollout_group(self, run, prompt, sample):
            if prompt.id == 0:
                await sample(n=1)
                raise make()

    return agents.worker(SERVERS, plugins=[Broken(None)])


def publish(agents: Agents, make: Make, monkeypatch: pytest.MonkeyPatch) -> Any:
    convert = rows.list_of_dict_to_tensordict

    def broken(fields: list[dict[str, Any]]) -> Any:
        if any(row["uid"] == BAD for row in fields):
            raise make()
        return convert(fields)

    monkeypatch.setattr(rows, "list_of_dict_to_tensordict", broken)
    return agents.worker(SERVERS)


def store(agents: Agents, make: Make, _: Any) -> Any:
    agents.queue.refuse = lambda keys: make() if any(key.startswith(f"{BAD}_") for key in keys) else None
    return agents.worker(SERVERS)


@pytest.mark.parametrize(("make", "told"), RAISED)
@pytest.mark.parametrize("point", [template, generate, group, score, publish, store])
def test_the_prompt_fails_and_the_others_go_on(agents, monkeypatch, point, make, told) -> None:
    failures = agents.generate(point(agents, make, monkeypatch), *both())
    assert agents.queue.status == {BAD: "failure", GOOD: "finished"}
    (cause,) = failures.causes
    assert told in cause and failures.causes[cause] == "prompt 0"
    assert (failures.asked, failures.failed, failures.finished) == (2 * GROUP, GROUP, 1)
    assert f"{GROUP} of {2 * GROUP} sessions failed: " in failures.sentence()
    if point is group:
        assert f"(plugin 'broken' in rollout_group, {__file__}:" in cause or "Interrupt" in cause


@pytest.mark.parametrize("what", [too_few_scores])
def test_answers_that_are_missing(agents, monkeypatch, what) -> None:
    failures = agents.generate(what(agents, ValueError, monkeypatch), *both())
    assert agents.queue.status == {BAD: "failure", GOOD: "finished"}
    assert "the reward worker gave 0 answers for 1 responses" in next(iter(failures.causes))


@pytest.mark.parametrize("score", [None, "right", float("nan"), float("inf"), [1.0]])
def test_a_score_that_is_no_number(agents, score, sentence) -> None:
    async def broken(data: Any) -> Any:
        return [{"reward_score": score, "reward_extra_info": {}}] * len(data)

    failures = agents.generate(agents.worker(SERVERS, score=broken), prompt())
    assert agents.queue.status == {BAD: "failure"}
    sentence(next(iter(failures.causes)), "the reward function gave the score", "expected a finite number")


@pytest.mark.parametrize(("make", "told"), RAISED)
def test_a_tool(agents, make, told) -> None:
    """verl shows the policy what a tool raised; what is no ordinary error costs the session."""

    def look() -> str:
        """Looks."""
        raise make()

    ids = TOKENIZER('<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>')["input_ids"] + [EOS]
    servers = Servers(lambda prompt, _: answer([7, EOS] if EOS in prompt or not bad(prompt) else ids))
    worker = agents.worker(servers, "data.max_response_length=200", "actor_rollout_ref.rollout.max_model_len=264")
    worker.tools = [FunctionTool("look", look, function_tool._build_schema_from_fn(look, "look"))]
    failures = agents.generate(worker, *[one | {"agent_name": TOOLS} for one in both()])
    assert agents.queue.status[GOOD] == "finished"
    assert agents.queue.status[BAD] == ("failure" if failures.causes else "finished")
    ordinary = isinstance(make(), Exception)
    assert bool(failures.causes) is not ordinary or isinstance(make(), (StopIteration, Mute))
    assert all(told in cause or "StopIteration" in cause or "no words" in cause for cause in failures.causes)


@pytest.mark.parametrize(("make", "told"), RAISED)
def test_a_status_that_cannot_be_stored_ends_the_worker(agents, make, told) -> None:
    """Which ends the run: nothing else could tell the driver."""
    agents.queue.refuse = lambda keys: make() if BAD in keys else None
    worker = agents.worker(SERVERS)
    with pytest.raises(Ended):
        agents.generate(worker, *both())
    (sentence,) = agents.said
    assert sentence.startswith("the status of prompt 0 cannot be stored: ") and told in sentence


def test_the_worker_s_last_words(capfd, monkeypatch) -> None:
    from verl_plugins.bridge import failures

    ended = []
    monkeypatch.setattr(failures.os, "_exit", ended.append)
    monkeypatch.setattr(failures.time, "sleep", lambda _: None)
    failures.give_up("the status of prompt 3 cannot be stored: OSError: full")
    assert ended == [1]
    assert capfd.readouterr().out == "the status of prompt 3 cannot be stored: OSError: full\n"


@pytest.mark.parametrize("wrong", [{"__rollout_n__": "many"}, {"uid": "no number"}, {"__max_tokens__": "few"}])
def test_a_prompt_that_cannot_be_read(agents, wrong) -> None:
    row = prompt(0, **wrong)
    failures = agents.generate(agents.worker(SERVERS), row, prompt(1), validate="uid" in wrong)
    assert agents.queue.status == {row["uid"]: "finished" if "uid" in wrong else "failure", GOOD: "finished"}
    assert bool(failures.causes) is ("uid" not in wrong)


class TestDriver:
    """What is raised in the driver ends the run with a sentence."""

    def told(self, tmp_path: Path, run: Callable[[], Any]) -> str:
        said: list[str] = []
        terminal, signals = SimpleNamespace(say=said.append), SimpleNamespace(asked=None)
        code = launch._told(terminal, tmp_path, signals, run)
        assert code == (130 if said[0].startswith("injected: the run has ended") else 1)
        return said[0]

    @pytest.mark.parametrize(("make", "told"), RAISED)
    @pytest.mark.parametrize("stage", ["select_prompts", "prepare_prompts"])
    def test_drawing(self, tmp_path, stage, make, told) -> None:
        class Broken(Plugin):
            name = "broken"

        def broken(self, run: Any) -> None:
            raise make()

        setattr(Broken, stage, hookimpl(broken, specname=stage))

        class Trainer(DrawsPrompts):
            config = SimpleNamespace(data=SimpleNamespace(train_batch_size=2))
            global_steps, rows, run = 1, FakeDataset(4), FakeRun(FakeDataset(4))
            plugins = Plugins([Broken(None)])
            _next_in_order = staticmethod(lambda count: list(range(count)))

            def clock(self):
                from contextlib import nullcontext

                return nullcontext()

        said = self.told(tmp_path, Trainer()._next_train_batch)
        interrupted = "Interrupt" in told
        assert ("injected" if interrupted else told) in said
        assert interrupted or f"(plugin 'broken' in {stage}, {__file__}:" in said

    @pytest.mark.parametrize(("make", "told"), RAISED)
    def test_fetching_in_a_stage(self, tmp_path, monkeypatch, make, told) -> None:
        def broken(**_: Any) -> Any:
            raise make()

        monkeypatch.setattr("verl_plugins.bridge.queue.tq.kv_batch_get", broken)

        class Reads(Plugin):
            name = "reads"

            @hookimpl
            def shape_rewards(self, run, batch):
                batch.rewards = batch.scores

        batch = Batch(QueueSource(["0-1-0_0_0"], "train"))
        said = self.told(tmp_path, lambda: Plugins([Reads(None)]).hook.shape_rewards(run=FakeRun(), batch=batch))
        assert ("injected" if "Interrupt" in told else told) in said

    @pytest.mark.parametrize(("make", "told"), RAISED)
    def test_fetching_for_the_metrics(self, tmp_path, make, told) -> None:
        """In a thread of its own, whose error comes at the end of the step."""
        from concurrent.futures import ThreadPoolExecutor

        class Full:
            def prefetch(self, *_: str) -> None:
                raise make()

        trainer = object.__new__(EstimatesAdvantage)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(trainer._measure_health, SimpleNamespace(full=Full()), ["responses"])
            said = self.told(tmp_path, lambda: future.result(timeout=10))
        assert ("injected" if "Interrupt" in told else told) in said
