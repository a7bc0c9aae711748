"""An agent loop for the training of `trouble.py`; it imports verl, which no module of a plugin may."""

from __future__ import annotations

import asyncio
from typing import Any

from verl_plugins.bridge.loops import SingleTurn


class Odd(SingleTurn):
    """Answers without a token, and sessions that end in ways that would end an event loop."""

    async def run(self, sampling_params: dict[str, Any], **columns: Any) -> Any:
        output = await super().run(sampling_params, **columns)
        prompt, session = int(columns["uid"].split("-")[0]), columns["session_id"]
        if session == 0:
            output.response_ids, output.response_mask, output.response_logprobs = [], [], None
        if session == 1:
            raised = [SystemExit("injected"), asyncio.CancelledError("injected"), StopIteration("injected"), None]
            if error := raised[prompt % 4]:
                raise error
        return output
