"""A training that goes wrong in every way it survives, and at last in one it does not."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from verl_plugins import Plugin, Tokens, hookimpl


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
