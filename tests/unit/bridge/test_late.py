"""A rollout that never comes back is said once, with the line at which it waits; nothing is ended."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from agents import EOS, Servers, answer, prompt

from verl_plugins import Plugin, hookimpl
from verl_plugins.bridge import late
from verl_plugins.bridge.late import Lookout


class Waits(Plugin):
    """Waits for something that never happens."""

    name = "waits"

    @hookimpl
    async def rollout_group(self, run: Any, prompt: Any, sample: Any) -> Any:
        await asyncio.Event().wait()  # this line is the one to be named


def line_of(text: str) -> str:
    with open(__file__, encoding="utf-8") as file:
        number = next(at for at, line in enumerate(file, 1) if text in line)
    return f"{__file__}, line {number}"


def test_the_worker_knows_which_prompt_waits_and_where(agents):
    async def look() -> Any:
        worker = agents.worker(Servers(lambda *_: answer([7, EOS])), plugins=[Waits(None)])
        trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
        calls = [asyncio.create_task(worker._run_prompt(prompt(number), {}, trajectory)) for number in (0, 1)]
        await asyncio.sleep(0.3)
        found = await worker.late(0.2), await worker.late(60)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return *found, await worker.late(0.0)

    (count, name, seconds, where), early, over = asyncio.run(look())
    assert (count, name, where) == (2, "prompt 0", line_of("the one to be" + " named"))
    assert 0.2 < seconds < 10 and early is None and over is None


class Worker:
    """Stands for a handle of Ray's."""

    def __init__(self, said: Any) -> None:
        self.late = self
        self._said = said

    def remote(self, _: float) -> Any:
        return self._said


@pytest.fixture
def lookout(monkeypatch):
    """Asks quickly; an answer is what the worker holds, one that is None has none yet."""
    monkeypatch.setattr(late, "ASKED_SECONDS", 0.02)
    monkeypatch.setattr(
        late.ray, "wait", lambda asked, **_: ([one for one in asked if one], [one for one in asked if not one])
    )
    monkeypatch.setattr(late.ray, "get", lambda done: [one[0] for one in done])
    lines: list[str] = []

    def watch(*workers: Worker) -> list[str]:
        with Lookout(workers, lines.append):
            time.sleep(0.3)
        return lines

    return watch


def test_a_late_prompt_is_said_once(lookout, sentence):
    (line,) = lookout(Worker([(3, "prompt 7", 660.0, "tool.py, line 4")]), Worker([None]))
    sentence(line, "prompt 7 and 2 others began 11 min ago", "waits at tool.py, line 4", "^C")


def test_a_worker_that_is_blocked_is_said_once(lookout, sentence):
    (line,) = lookout(Worker(None), Worker([None]))
    sentence(line, "1 of 2 agent-loop workers do not answer", "not async")


def test_nothing_is_said_of_prompts_that_come_back(lookout):
    assert lookout(Worker([None])) == []
