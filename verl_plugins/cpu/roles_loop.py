"""The agent loop of the preset `roles`: a planner and a solver, one after the other, two outputs of one session."""

from __future__ import annotations

import re
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_plugins.cpu.roles import WORDS

SUM = re.compile(r"\d+(?:\+\d+)*=")
SEEDS = ("seed", "sampling_seed")
"""Sampling parameters of rollout servers; the two roles draw different random numbers."""


class Relay(SingleTurnAgentLoop):
    """What the planner answers is the solver's question; nothing else of the conversation is handed on."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **columns: Any) -> list[AgentLoopOutput]:
        planner = await super().run(sampling_params, priority, **columns)
        plan, question = self._text(planner), columns["raw_prompt"]
        other = {name: value + 1 if name in SEEDS else value for name, value in sampling_params.items()}
        solver = await super().run(other, priority, **{**columns, "raw_prompt": handed_on(question, plan)})
        total = total_of(str(question[-1]["content"]))
        shares = (total_of(plan) == total, self._text(solver) == str(total_of(plan)))
        for role, output, own in zip(WORDS, (planner, solver), shares, strict=True):
            output.extra_fields |= {"role": role, "decision": float(own)}
        return [planner, solver]

    def _text(self, output: AgentLoopOutput) -> str:
        return self.tokenizer.decode(output.response_ids, skip_special_tokens=True)


def handed_on(messages: list[dict[str, Any]], plan: str) -> list[dict[str, Any]]:
    """The solver's messages: the planner's, with the solver's word and the plan in the place of the sum."""
    first, *_, last = messages
    word = first["content"].replace(WORDS["planner"], WORDS["solver"], 1)
    return [{**first, "content": word}, {**last, "content": SUM.sub(lambda _: plan, last["content"], count=1)}]


def total_of(text: str) -> int | None:
    """What the sum in a text comes to; None if there is none."""
    found = SUM.search(text)
    return sum(map(int, found[0][:-1].split("+"))) if found else None
