"""The tool of the preset `lookup` and how the tiny model asks for it; verl imports this by the tool's class name."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

from verl_plugins.cpu.lookup import ASKING, TOOL, reply

UNKNOWN = "-\n"
"""The reply to a letter that is not in the question."""


class Lookup(BaseTool):
    """Knows the digits of one question's letters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._digits: dict[str, dict[str, int]] = {}

    async def create(
        self, instance_id: str | None = None, create_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> tuple[str, ToolResponse]:
        name = instance_id or str(uuid4())
        pairs = filter(None, (create_kwargs or {}).get("digits", "").split(","))
        self._digits[name] = {pair[0]: int(pair[2:]) for pair in pairs}
        return name, ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **_: Any) -> tuple[ToolResponse, float, dict]:
        digit = self._digits[instance_id].get(str(parameters.get("letter")))
        return ToolResponse(text=UNKNOWN if digit is None else reply(digit)), 0.0, {}

    async def release(self, instance_id: str, **_: Any) -> None:
        self._digits.pop(instance_id, None)


@ToolParser.register(TOOL)
class LookupParser(ToolParser):
    """`?a` asks what a stands for."""

    async def extract_tool_calls(
        self, responses_ids: list[int], tools: list[Any] | None = None
    ) -> tuple[str, list[FunctionCall]]:
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        if not text.startswith(ASKING) or len(text) < 2:
            return text, []
        return "", [FunctionCall(name=TOOL, arguments=json.dumps({"letter": text[1]}))]
