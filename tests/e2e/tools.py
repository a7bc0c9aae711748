"""A tool for verl's tool loop, and a parser that takes every answer for a call of it: the tiny model cannot ask."""

from __future__ import annotations

import json

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool

REMARK = " no: "


@ToolParser.register("every_answer")
class EveryAnswer(ToolParser):
    async def extract_tool_calls(
        self, responses_ids: list[int], tools: object = None
    ) -> tuple[str, list[FunctionCall]]:
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        return text, [FunctionCall(name="check", arguments=json.dumps({"answer": text}))]


@function_tool
def check(answer: str) -> str:
    """Remark on an answer.

    Args:
        answer: what was said.
    """
    return REMARK
