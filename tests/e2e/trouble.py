"""A training that goes wrong in every way it survives, and at last in one it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from verl_plugins import Plugin, Tokens, hookimpl
from verl_plugins.bridge.loops import SingleTurn


class Trouble(Plugin):
    """Gradients that are no numbers in the first step; in the second a loss too large for one."""

    name = "trouble"

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Generator[None, Tensor, Tensor]:
        losses = yield
        if tokens.step == 1:
            losses.register_hook(lambda gradient: gradient * torch.nan)
            return losses
        return losses + 3e38


class Unsaved(Plugin):
    """Cannot be saved."""

    name = "unsaved"

    def state_dict(self) -> dict[str, Any]:
        return {"asked": object()}


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
