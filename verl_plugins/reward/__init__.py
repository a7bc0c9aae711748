"""Rewards. `verify` and `verify_all` judge answers anywhere: they load on first use, and neither verl nor torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_plugins.reward.comparer import REASONS, Comparer, Scored, verify, verify_all

__all__ = ["REASONS", "Comparer", "Scored", "verify", "verify_all"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'verl_plugins.reward' has no attribute {name!r}")
    return getattr(importlib.import_module("verl_plugins.reward.comparer"), name)
