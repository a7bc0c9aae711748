"""A tool, and a parser for which a model of bytes asks for it: by an answer that begins with a one."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

NAME, ASKED, REPLY = "again", "1", "no: "


class Again(BaseTool):
    async def execute(self, instance_id: str, parameters: dict[str, Any], **_: Any) -> tuple[ToolResponse, float, dict]:
        return ToolResponse(text=REPLY), 0.0, {}


@ToolParser.register("begins_with_one")
class BeginsWithOne(ToolParser):
    async def extract_tool_calls(
        self, responses_ids: list[int], tools: list[Any] | None = None
    ) -> tuple[str, list[FunctionCall]]:
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        return text, [FunctionCall(name=NAME, arguments="{}")] if text.startswith(ASKED) else []
