"""Recent RL methods for language models as plugins of verl's distributed trainer.

The public API. Importing this module loads neither torch nor verl; the names that need torch load on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from verl_plugins.errors import CompositionError, DataError, PluginError, StateError
from verl_plugins.hookspecs import API_VERSION, hookimpl
from verl_plugins.plugin import Plugin, setting

if TYPE_CHECKING:
    from verl_plugins.batch import Batch
    from verl_plugins.distilled import Distilled
    from verl_plugins.groups import Groups
    from verl_plugins.hidden import Hidden, Wish
    from verl_plugins.services import Actor, Answer, Prompt, Prompts, Rollout, Run, Segment, Verdict
    from verl_plugins.tokens import Tokens
    from verl_plugins.values import Values

__all__ = [
    "API_VERSION",
    "Actor",
    "Answer",
    "Batch",
    "CompositionError",
    "DataError",
    "Distilled",
    "Groups",
    "Hidden",
    "Plugin",
    "PluginError",
    "Prompt",
    "Prompts",
    "RECIPES",
    "Rollout",
    "Run",
    "Segment",
    "StateError",
    "Tokens",
    "Values",
    "Verdict",
    "Wish",
    "hookimpl",
    "setting",
]

_LAZY = {
    "Batch": "batch",
    "Distilled": "distilled",
    "Tokens": "tokens",
    "Values": "values",
    "Groups": "groups",
    "Hidden": "hidden",
    "Wish": "hidden",
    **dict.fromkeys(["Actor", "Answer", "Prompt", "Prompts", "Rollout", "Run", "Segment", "Verdict"], "services"),
}


def _recipes() -> Path:
    """The folder of shipped recipes: inside the wheel, or at the top of the checkout of an editable install."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


RECIPES = _recipes()


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'verl_plugins' has no attribute {name!r}")
    return getattr(importlib.import_module(f"verl_plugins.{_LAZY[name]}"), name)
