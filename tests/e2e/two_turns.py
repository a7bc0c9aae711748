"""An agent loop of two turns, in every second session: the answer is remarked on and given again, in one row."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

TURN, REMARK = 6, "no: "
"""Tokens of a turn, and what the environment says between two; together they fit the preset's response length."""


class TwoTurns(SingleTurnAgentLoop):
    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **columns: Any) -> AgentLoopOutput:
        params = {**sampling_params, "max_tokens": TURN}
        row = await super().run(params, priority, **columns)
        if columns["session_id"] % 2 == 0:
            return row
        remark = self.tokenizer(REMARK, add_special_tokens=False)["input_ids"]
        asked = [*row.prompt_ids, *row.response_ids, *remark]
        answer = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=asked, sampling_params=params, priority=int(priority)
        )
        row.response_ids = [*row.response_ids, *remark, *answer.token_ids]
        row.response_mask = [*row.response_mask, *[0] * len(remark), *[1] * len(answer.token_ids)]
        row.response_logprobs = [*row.response_logprobs, *[0.0] * len(remark), *answer.log_probs]
        row.num_turns = 4
        return row
